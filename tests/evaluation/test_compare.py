"""Dense and accelerated over scenes, and the way of views into a model."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from PIL import Image

from lite3r_plugin import Lite3RConfig, describe
from lite3r_plugin.adapter.models import ModelEntry
from lite3r_plugin.adapter.plugins import find_model, model_entries
from lite3r_plugin.errors import InputError
from lite3r_plugin.evaluation import DENSE, LITE3R, ModelPair, compare, model_inputs, sample_views
from lite3r_plugin.scene.data import Frame, Scene, open_scenes
from lite3r_plugin.scene.images import to_tensor
from lite3r_plugin.testbed import Testbed, TestbedConfig

SPARSE = Lite3RConfig(keep_ratio=0.25, dense_below=0, block_q=16, block_k=16)


@pytest.fixture(scope="module")
def entry() -> ModelEntry:
    """A tiny testbed, which takes images as they are."""
    tiny = TestbedConfig(dim=64, head_dim=32, depth=1, stem=8)
    return dataclasses.replace(find_model("testbed"), name="tiny", create=lambda: Testbed(tiny), preprocess=to_tensor)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return list(open_scenes("procedural:scenes=2,views=4,size=64"))


def test_every_set_of_views_is_measured(entry: ModelEntry, scenes: list[Scene]) -> None:
    pair = ModelPair.build(entry, SPARSE, "random")
    told: list[tuple[int, int, str]] = []
    found = compare(pair, scenes, views=3, draws=2, max_points=500, progress=lambda *what: told.append(what))
    assert told == [(i, 4, scenes[i // 2].name) for i in range(4)]
    assert len(found.densities) == len(found.fidelity) == 4
    assert 0 < found.density < 1
    assert max(score.depth_abs_rel for score in found.fidelity) > 0
    stored = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert stored["model"] == "tiny"
    assert stored["config"]["keep_ratio"] == 0.25
    assert (stored["views"], stored["draws"], stored["rule"], stored["dtype"], stored["device"]) == (3, 2, "spread", "float32", "cpu")
    assert set(stored["means"]) == set(stored["scenes"]) == {DENSE, LITE3R, "constant"}
    assert len(stored["scenes"][LITE3R]) == 4
    assert found.table().row_count == len(found.comparison.rows())


def test_all_kept_is_dense(entry: ModelEntry, scenes: list[Scene]) -> None:
    pair = ModelPair.build(entry, SPARSE.replace(keep_ratio=1.0, linear_branch="none"), "random")
    found = compare(pair, scenes[:1], views=2, max_points=500)
    assert found.fidelity[0].depth_abs_rel < 1e-5
    assert found.density == 1


def test_a_model_in_fp8_has_its_dense_one_beside_it(entry: ModelEntry) -> None:
    """Of its weights nothing dense is left to switch back to."""
    wide = dataclasses.replace(entry, create=lambda: Testbed(TestbedConfig(dim=64, head_dim=32, depth=1, stem=8)))
    config = SPARSE.replace(precision="fp8", fp8_backend="emulated")
    pair, full = ModelPair.build(wide, config, "random"), ModelPair.build(wide, SPARSE, "random")
    assert full.original is None
    assert "fp8" in describe(pair.model).config.precision
    images = torch.rand(2, 3, 64, 64)
    expected = full.run(DENSE, images, torch.float32).prediction.depth
    assert torch.equal(pair.run(DENSE, images, torch.float32).prediction.depth, expected)
    assert not torch.equal(pair.run(LITE3R, images, torch.float32).prediction.depth, expected)


@pytest.mark.parametrize("name", ["vggt", "da3-small", "pi3", "testbed"])
def test_views_reach_a_model_as_if_they_were_files(name: str, scenes: list[Scene]) -> None:
    """Bit for bit what the model makes of 8-bit images of its own size."""
    entry = model_entries()[name]
    views = sample_views(entry, scenes[0], [2, 0])
    pictures = [Image.fromarray((x.permute(1, 2, 0) * 255).round().byte().numpy()) for x in views.images]
    inputs, expected = model_inputs(entry, views), entry.inputs(pictures)
    assert torch.equal(inputs, expected)
    assert inputs.stride() == expected.stride()  # convolutions round by it
    torch.testing.assert_close(views.world_to_camera[0], torch.eye(3, 4))
    geometry = views.geometry()
    assert geometry.depth.shape == views.images[:, 0].shape
    assert torch.equal(geometry.valid, views.valid)


def test_what_cannot_be_compared(entry: ModelEntry, scenes: list[Scene]) -> None:
    pair = ModelPair.build(entry, SPARSE, "random")
    with pytest.raises(InputError, match="no scenes"):
        compare(pair, [])
    with pytest.raises(InputError, match="has 4 views, asked for 5"):
        compare(pair, scenes, views=5)
    blind = Scene("blind", tuple(Frame(str(i), torch.rand(3, 32, 32)) for i in range(2)), "a folder")
    with pytest.raises(InputError, match="a folder has no cameras"):
        compare(pair, [blind], views=2)
    with pytest.raises(InputError, match="no cameras"):
        blind.sample([0, 1]).geometry()
