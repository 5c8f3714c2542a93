"""Resizing moves cameras exactly; splits share nothing; draws depend on the seed alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from written_scenes import render, write_layout

from lite3r_plugin.errors import InputError
from lite3r_plugin.scene.data import Frame, Scene, Scenes, ViewSets, open_scenes, pick_views
from lite3r_plugin.scene.data.cameras import Fit
from lite3r_plugin.scene.data.mvsnet import BLENDEDMVS_TEST, DTU_TEST, DTU_VALIDATION, dtu_scans

SIDES = st.tuples(st.integers(24, 90), st.integers(24, 90))


def scene(frames: int, name: str = "s") -> Scene:
    partners = [tuple(j for j in (i + 1, i - 1) if 0 <= j < frames) for i in range(frames)]
    images = [torch.full((3, 8, 8), i / frames) for i in range(frames)]
    return Scene(name, tuple(Frame(str(i), images[i], covisible=partners[i]) for i in range(frames)), name)


@given(SIDES, SIDES)
def test_intrinsics_follow_the_pixels(source: tuple[int, int], size: tuple[int, int]) -> None:
    """An image whose colour is the position of its pixels' centres tells where each new pixel came from."""
    v, u = torch.meshgrid(torch.arange(source[0]) + 0.5, torch.arange(source[1]) + 0.5, indexing="ij")
    fit = Fit.make(source, size)
    image = fit.image(torch.stack((u / source[1], v / source[0])))
    K = fit.intrinsics(torch.eye(3, dtype=torch.float64))  # the map from old pixels to new ones
    new_v, new_u = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    old_u, old_v = (new_u - K[0, 2]) / K[0, 0], (new_v - K[1, 2]) / K[1, 1]
    inside = (old_u > 4) & (old_u < source[1] - 4) & (old_v > 4) & (old_v < source[0] - 4)  # the filter is cut at borders
    for found, expected, side in ((image[0], old_u, source[1]), (image[1], old_v, source[0])):
        reach = max(0.02, 0.6 / K[0, 0].item() - 0.5) if K[0, 0] < 1 else 0.02
        assert ((found * side - expected).abs()[inside] < reach).all()
    assert (fit.nearest(u) - old_u).abs().max() <= 0.5 + 1e-4
    assert (fit.nearest(v) - old_v).abs().max() <= 0.5 + 1e-4
    assert 0 <= fit.corner[0] <= fit.whole[0] - size[0]


def test_nothing_changes_at_the_same_size() -> None:
    image, K = torch.rand(3, 9, 7), torch.tensor([[5.0, 0, 3], [0, 5, 4], [0, 0, 1]])
    for fit in (Fit.make((9, 7), None), Fit.make((9, 7), (9, 7))):
        assert torch.equal(fit.image(image), image)
        assert torch.equal(fit.nearest(image[0]), image[0])
        assert torch.equal(fit.intrinsics(K), K)


@pytest.mark.parametrize("rule", ["spread", "consecutive", "covisible"])
def test_draws_are_distinct_and_seeded(rule: str) -> None:
    many = scene(20)
    draws = [pick_views(many, 6, rule, seed) for seed in range(20)]  # type: ignore[arg-type]
    assert all(len(set(draw)) == 6 and set(draw) <= set(range(20)) for draw in draws)
    assert draws == [pick_views(many, 6, rule, seed) for seed in range(20)]  # type: ignore[arg-type]
    assert len({tuple(draw) for draw in draws}) > 2
    assert sorted(pick_views(many, 20, rule)) == list(range(20))  # type: ignore[arg-type]
    if rule != "spread":
        assert all(max(draw) - min(draw) < 12 for draw in draws)


def test_more_views_than_there_are() -> None:
    with pytest.raises(InputError, match="s has 3 views, asked for 4"):
        pick_views(scene(3), 4)
    lonely = Scene("l", tuple(Frame(str(i), torch.zeros(3, 8, 8)) for i in range(3)), "l")
    with pytest.raises(InputError, match="0 listed partners, asked for 1"):
        pick_views(lonely, 2, "covisible")


def test_partners_come_from_the_pair_file(tmp_path: Path) -> None:
    (read,) = open_scenes(f"blendedmvs:{write_layout(render(3, 16, 24), 'blendedmvs', tmp_path)}")
    assert all(set(frame.covisible) == {0, 1, 2} - {i} for i, frame in enumerate(read.frames))
    first, *_ = pick_views(read, 2, "covisible", seed=3)
    assert pick_views(read, 2, "covisible", seed=3) == [first, read.frames[first].covisible[0]]


def test_draws_of_a_data_set_do_not_depend_on_their_order() -> None:
    sets = ViewSets([scene(9, "a"), scene(7, "b")], 3, (8, 8), draws=2)
    assert len(sets) == 4
    again = [sets[i].names for i in (3, 1, 0, 2)]
    assert [sets[i].names for i in range(4)] == [again[2], again[1], again[3], again[0]]


def test_published_splits_share_nothing() -> None:
    assert len(DTU_TEST) == 22
    assert len(set(DTU_TEST) & set(DTU_VALIDATION)) == 0
    assert len(set(BLENDEDMVS_TEST)) == 7
    train, test = dtu_scans([f"scan{i}" for i in range(1, 129) if i not in (78, 79, 80, 81)], lambda name: scene(2, name)).split()
    assert not set(train.names) & set(test.names)
    assert not set(train.names) & {f"scan{i}" for i in DTU_VALIDATION}
    assert dtu_scans(["dtu_scan24", "dtu_scan6"], lambda name: scene(2, name)).split()[1].names == ("dtu_scan24",)


def test_own_splits() -> None:
    scenes = Scenes(["a", "b", "c"], lambda name: scene(2, name))
    train, test = scenes.split(["b"])
    assert (train.names, test.names) == (("a", "c"), ("b",))
    assert [s.name for s in scenes[1:]] == ["b", "c"]
    with pytest.raises(InputError, match="no scene d"):
        scenes.split(["d"])
    with pytest.raises(InputError, match="no published split"):
        scenes.split()


def test_a_part_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = write_layout(render(2, 16, 24), "7scenes", tmp_path)
    assert open_scenes(f"7scenes:{path}", "test").names == ("kitchen/seq-01",)
    with pytest.raises(InputError, match="no scene of the published train split"):
        open_scenes(f"7scenes:{path}", "train")
