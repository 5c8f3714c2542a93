"""Fixed protocols: which views they take, what they measure, which dense kernel both arms run on, and what they refuse."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lite3r_plugin import Lite3RConfig
from lite3r_plugin.adapter.models import ModelEntry
from lite3r_plugin.adapter.plugins import find_model
from lite3r_plugin.errors import InputError
from lite3r_plugin.evaluation import DENSE, LITE3R, PROTOCOLS, Evaluation, ModelPair, compare, find_protocol
from lite3r_plugin.scene.data import Frame, Scene
from lite3r_plugin.scene.images import to_tensor
from lite3r_plugin.scene.metrics import auc, pair_errors, published_auc
from lite3r_plugin.scene.prediction import Prediction
from lite3r_plugin.testbed import Testbed, TestbedConfig

SIZE = 16
SPARSE = Lite3RConfig(keep_ratio=0.25, dense_below=0, block_q=16, block_k=16)


def preprocess(images: Sequence[Image.Image]) -> Tensor:
    """All at 16 pixels in height, in the shape of the first."""
    width, height = images[0].size
    return to_tensor([image.resize((round(SIZE * width / height / 8) * 8, SIZE)) for image in images])


@pytest.fixture(scope="module")
def entry() -> ModelEntry:
    tiny = TestbedConfig(dim=64, head_dim=32, depth=1, stem=8)
    return dataclasses.replace(find_model("testbed"), name="tiny", create=lambda: Testbed(tiny), preprocess=preprocess)


@pytest.fixture(scope="module")
def pair(entry: ModelEntry) -> ModelPair:
    return ModelPair.build(entry, SPARSE, "random")


def scene(name: str, views: int) -> Scene:
    """Noise, with cameras on a line that turn, and depth."""
    generator = torch.Generator().manual_seed(views)
    frames = []
    for i in range(views):
        angle = torch.tensor(0.05 * i)
        turn = torch.eye(3)
        turn[0, 0], turn[0, 2], turn[2, 0], turn[2, 2] = angle.cos(), angle.sin(), -angle.sin(), angle.cos()
        pose = torch.cat((turn, torch.tensor([[0.1 * i], [0.0], [0.0]])), 1)
        focal = torch.tensor([[20.0, 0, 12], [0, 20, 8], [0, 0, 1]])
        frames.append(Frame(str(i), torch.rand(3, 16, 24, generator=generator), focal, pose, 1 + torch.rand(16, 24, generator=generator)))
    return Scene(name, tuple(frames), name)


def text(found: Evaluation) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(found.table())
    return " ".join(capture.get().split())


def test_da3bench_takes_all_views_and_measures_poses(pair: ModelPair) -> None:
    seen: list[Prediction] = []

    def predict(model: nn.Module, images: Tensor) -> Prediction:
        seen.append(pair.entry.predict(model, images))
        return seen[-1]

    scenes = [scene("a", 3), scene("b", 5)]
    watched = dataclasses.replace(pair, entry=dataclasses.replace(pair.entry, predict=predict))
    found = compare(watched, scenes, protocol="da3bench")
    stored = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [len(prediction.depth) for prediction in seen] == [3, 3, 5, 5]
    assert (stored["protocol"], stored["views"], stored["rule"]) == ("da3bench", "all views of a scene, at most 100", "at equal distances")
    assert stored["views_of_sets"] == stored["views_of_scenes"] == [3, 5]
    assert stored["sizes"] == [[16, 24]]
    assert stored["seed"] is stored["max_points"] is None
    assert list(stored["means"][DENSE]) == ["AUC@3, %", "AUC@30, %", "AUC@3 as published, %", "AUC@30 as published, %"]
    assert stored["scenes"][DENSE][0]["depth"] is None
    assert 0 < found.density < 1
    for method, predictions in ((DENSE, seen[::2]), (LITE3R, seen[1::2])):
        truth = [torch.stack([torch.as_tensor(frame.world_to_camera) for frame in s.frames]) for s in scenes]
        cameras = [(prediction.world_to_camera, poses) for prediction, poses in zip(predictions, truth, strict=True)]
        means = stored["means"][method]
        exact, published = ([f(mine, true) for mine, true in cameras] for f in (exact30, lambda a, b: published_auc(a, b, 30)))
        assert means["AUC@30, %"] == pytest.approx(sum(exact) / 2, abs=1e-3)
        assert means["AUC@30 as published, %"] == pytest.approx(sum(published) / 2, abs=1e-3)
    shown = text(found)
    assert "Poses as the Depth Anything 3 benchmark judges them: all views of a scene, at most 100, 24 x 16 pixels" in shown
    assert "AUC@3 as published" in shown
    assert "more than 100" not in shown


def exact30(mine: Tensor, true: Tensor) -> float:
    return auc(pair_errors(mine, true).larger, 30)


def test_above_100_views_are_even_and_that_is_said(pair: ModelPair) -> None:
    protocol = find_protocol("da3bench")
    picked = protocol.pick(scene("long", 250))
    assert (len(picked), picked[0]) == (100, 0)
    assert {b - a for a, b in itertools.pairwise(picked)} == {2, 3}
    assert protocol.pick(scene("just", 100)) == list(range(100))
    found = compare(pair, [scene("long", 103), scene("short", 2)], protocol="da3bench")
    assert found.conditions["views_of_sets"] == [100, 2]
    assert found.conditions["views_of_scenes"] == [103, 2]
    assert "Of 1 scenes with more than 100 views, 100 are taken at equal distances." in text(found)


def test_the_papers_protocol_is_one_random_pair_of_32_scenes(pair: ModelPair) -> None:
    protocol, many = find_protocol("lite3r"), scene("many", 40)
    assert protocol.pick(many) == protocol.pick(many)
    assert len({tuple(protocol.pick(many, seed)) for seed in range(20)}) > 15
    assert all(len(set(protocol.pick(scene("two", 2), seed))) == 2 for seed in range(5))
    found = compare(pair, [scene(str(i), 3) for i in range(34)], protocol="lite3r", seed=1, max_points=50)
    stored = found.to_dict()
    assert stored["views_of_sets"] == [2] * 32
    assert stored["sizes"] == [(SIZE, SIZE)]  # squares, of images that are none
    assert (stored["seed"], stored["max_points"]) == (1, 50)
    assert {"AbsRel", "rotation, degrees", "Chamfer"} < set(stored["means"][DENSE])
    assert not [row for row in stored["means"][DENSE] if "AUC" in row]
    assert any("halves the errors of rotation" in note for note in stored["notes"])
    shown = text(found)
    assert "The protocol of the Lite3R paper: one random pair of views a scene, 16 x 16 pixels. Means over 32 scenes" in shown
    assert "This is thin" in shown


def test_both_run_the_same_dense_kernel_and_it_is_named(pair: ModelPair) -> None:
    with sdpa_kernel(SDPBackend.MATH):  # whatever the process prefers
        found = compare(pair, [scene("a", 3)], protocol="da3bench")
    assert found.conditions["preferred_dense_kernel"] == "flash"
    assert found.conditions["dense_kernels"] == {DENSE: ["flash float32"], LITE3R: ["flash float32"]}
    assert found.conditions["same_dense_kernel"] is True
    assert "ran on the same kernels in both: flash float32 (dense), flash float32 (Lite3R where it is dense)" in text(found)
    assert "dense_kernels" not in compare(pair, [scene("a", 3)], views=2).conditions


def test_a_model_with_a_mind_of_its_own_is_found_out(pair: ModelPair) -> None:
    """It runs every second prediction, that of Lite3R, on another dense kernel."""
    calls = itertools.count()

    def predict(model: nn.Module, images: Tensor) -> Prediction:
        with sdpa_kernel(SDPBackend.MATH if next(calls) % 2 else SDPBackend.FLASH_ATTENTION):
            return pair.entry.predict(model, images)

    wilful = dataclasses.replace(pair, entry=dataclasses.replace(pair.entry, predict=predict))
    found = compare(wilful, [scene("a", 3)], protocol="da3bench")
    assert found.conditions["dense_kernels"] == {DENSE: ["flash float32"], LITE3R: ["math float32"]}
    assert found.conditions["same_dense_kernel"] is False
    assert "did not run on the same kernels in both, which alone moves results" in text(found)


@pytest.mark.parametrize(
    ("protocol", "options", "message"),
    [
        ("da3bench", {"views": 8}, "da3bench takes no views: it is all views of a scene, at most 100"),
        ("da3bench", {"rule": "spread", "draws": 1}, "da3bench takes no rule, no draws"),
        ("da3bench", {"seed": 0}, "takes no seed"),
        ("da3bench", {"max_points": 9}, "takes no max_points"),
        ("lite3r", {"views": 2}, "lite3r takes no views: it is one random pair of views a scene"),
        ("lite3r", {"draws": 2}, "takes no draws"),
        ("megadepth", {}, "no protocol 'megadepth'; choose one of da3bench, lite3r"),
    ],
)
def test_what_contradicts_a_protocol_is_refused(pair: ModelPair, protocol: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare(pair, [scene("a", 3)], protocol=protocol, **options)


def test_their_names_are_their_keys() -> None:
    assert all(name == protocol.name for name, protocol in PROTOCOLS.items())
