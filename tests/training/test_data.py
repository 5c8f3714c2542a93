"""Data of training: every kind that people have, each process its share, from any place on."""

from __future__ import annotations

import dataclasses
import itertools
from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lite3r_adapters.testbed.model import ENTRIES
from lite3r_plugin.adapter.outputs import ModelOutputs
from lite3r_plugin.errors import ConfigError, InputError
from lite3r_plugin.scene.data import open_scenes
from lite3r_plugin.training.config import DistillConfig
from lite3r_plugin.training.data import Feed, Sample, as_sample, join, share_of
from lite3r_plugin.training.scenes import SceneSamples

ITEMS = [torch.tensor([float(i)]) for i in range(5)]
Pair = namedtuple("Pair", ["a", "b"])


class Numbered:
    """As much as a data set needs to have."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Tensor:
        return ITEMS[index]


class Stream(IterableDataset):
    """Items that have no number."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(ITEMS)


class Counted(Stream):
    """Such that tell how many they are."""

    def __len__(self) -> int:
        return 5


def take(feed: Feed, count: int) -> list[float]:
    return [sample.inputs.item() for sample in itertools.islice(feed, count)]


KINDS: dict[str, Callable[[], Any]] = {
    "list": lambda: ITEMS,
    "numbered": Numbered,
    "stream": Stream,
    "counted stream": Counted,
    "generator": lambda: iter(ITEMS * 3),
    "loader": lambda: DataLoader(Numbered(), shuffle=True),  # pyright: ignore[reportArgumentType]
    "loader of a stream": lambda: DataLoader(Stream()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_goes_on_from_any_place(kind: str) -> None:
    config = DistillConfig()
    whole = take(Feed(KINDS[kind](), config), 12)
    assert set(whole) == {0.0, 1.0, 2.0, 3.0, 4.0}
    for before in (1, 4, 5, 7):
        feed = Feed(KINDS[kind](), config)
        take(feed, before)
        again = Feed(KINDS[kind](), config)
        again.epoch, again.batch = feed.epoch, feed.batch
        assert take(again, 12 - before) == whole[before:]


@pytest.mark.parametrize("kind", ["list", "numbered"])
@pytest.mark.parametrize("size", [1, 2])
def test_processes_together_take_what_one_takes(kind: str, size: int) -> None:
    """Whatever their number, over the ends of epochs."""
    config = DistillConfig(batch_size=size)
    whole = [sample.inputs.tolist() for sample in itertools.islice(Feed(KINDS[kind](), config), 12)]
    for processes in (2, 3):
        shares = [
            [sample.inputs.tolist() for sample in itertools.islice(Feed(KINDS[kind](), config, processes, i), 12 // processes)]
            for i in range(processes)
        ]
        assert [batch for batches in zip(*shares, strict=True) for batch in batches] == whole


@pytest.mark.parametrize("kind", ["stream", "counted stream", "generator", "loader", "loader of a stream"])
def test_processes_share_an_epoch(kind: str) -> None:
    shares = [take(Feed(KINDS[kind](), DistillConfig(), 2, i), 2) for i in (0, 1)]
    assert len({*shares[0], *shares[1]}) == 4


def test_each_epoch_is_in_another_order_and_each_seed_too() -> None:
    feed = Feed(ITEMS, DistillConfig())
    first, second = take(feed, 5), take(feed, 5)
    assert sorted(first) == sorted(second) == [0, 1, 2, 3, 4]
    assert first != second
    assert take(Feed(ITEMS, DistillConfig(seed=1)), 5) != first


def test_epochs_are_counted_in_batches_of_a_process() -> None:
    assert Feed(ITEMS, DistillConfig(batch_size=2), 2, 0).batches(4) == 5
    assert Feed(KINDS["loader"](), DistillConfig(), 2, 0).batches(2) == 6
    assert Feed(Stream(), DistillConfig()).batches(2) is None
    assert Feed(Counted(), DistillConfig(batch_size=2)).batches(2) == 6


def test_random_numbers_of_the_process_are_left_alone() -> None:
    before = torch.get_rng_state()
    take(Feed(ITEMS, DistillConfig()), 7)
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_are_joined_whatever_is_in_them() -> None:
    def item(i: int) -> Sample:
        inputs = {"images": torch.full((1, 2), i), "more": [Pair(torch.tensor([i]), "x"), (3,)]}
        return Sample(inputs, ModelOutputs(depth=torch.full((1, 2, 3, 3), float(i)), other=(torch.tensor([1.0 * i]),)))

    joined = join([item(1), item(2)])
    assert joined.inputs["images"].tolist() == [[1, 1], [2, 2]]
    assert joined.inputs["more"] == [Pair(joined.inputs["more"][0].a, "x"), (3,)]
    assert joined.inputs["more"][0].a.tolist() == [1, 2]
    assert joined.labels is not None
    assert joined.labels.depth is not None
    assert joined.labels.depth.shape == (2, 2, 3, 3)
    assert joined.labels.points is None
    moved = joined.to("meta")
    assert moved.inputs["images"].is_meta
    assert moved.labels is not None
    assert moved.labels.other[0].is_meta
    assert as_sample(joined) is joined


@pytest.mark.parametrize(
    ("items", "says"),
    [
        ([torch.zeros(1, 2), torch.zeros(1, 3)], r"first dimension at inputs, \[1, 2\], \[1, 3\]"),
        ([torch.zeros(1), {"x": torch.zeros(1)}], "different forms, Tensor and dict"),
        ([{"x": torch.zeros(1)}, {"y": torch.zeros(1)}], "different keys"),
        ([(torch.zeros(1),), (torch.zeros(1),) * 2], "different lengths"),
        ([(torch.zeros(1), 1), (torch.zeros(1), 2)], r"1 and others at inputs\[1\]"),
    ],
)
def test_what_cannot_be_joined_is_named(items: list[Any], says: str) -> None:
    with pytest.raises(InputError, match=f"{says}.*use batch_size=1"):
        join(items)


def test_a_loader_without_batches_is_not_shared() -> None:
    loader = DataLoader(Stream(), batch_size=None)
    assert take(Feed(loader, DistillConfig()), 2) == [0, 1]
    with pytest.raises(ConfigError, match="give it a size"):
        Feed(loader, DistillConfig(), 2, 0)


def test_validation_is_shared_in_order() -> None:
    for kind in ("list", "numbered", "stream", "loader of a stream"):
        assert [sample.inputs.item() for sample in share_of(KINDS[kind](), 1, 2)] == [1, 3]


def test_scenes_are_samples() -> None:
    scenes = open_scenes("procedural:scenes=2,views=3,size=16")
    samples = SceneSamples(ENTRIES["testbed"], scenes, 2, (16, 24), draws=3, labels=True)
    assert len(samples) == 6
    sample, again = samples[3], samples[3]
    assert sample.inputs.shape == (1, 2, 3, 16, 24)
    assert torch.equal(sample.inputs, again.inputs)
    assert any(not torch.equal(sample.inputs, samples[i].inputs) for i in (1, 5))  # another draw of the same scene
    assert sample.labels is not None
    assert sample.labels.depth is not None
    assert sample.labels.depth.shape == (1, 2, 16, 24)
    listed = dataclasses.replace(ENTRIES["testbed"], arguments=lambda images: ([{"img": view} for view in images.unbind(1)],))
    (views,) = SceneSamples(listed, scenes, 2, (16, 24))[0].inputs
    assert [view["img"].shape for view in views] == [(1, 3, 16, 24)] * 2
    assert SceneSamples(ENTRIES["testbed"], scenes, 2)[0].labels is None
    with pytest.raises(InputError, match="no scenes"):
        SceneSamples(ENTRIES["testbed"], scenes[:0], 2)
