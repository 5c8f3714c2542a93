"""The procedural renderer: exact geometry, the same scenes for the same seed."""

from __future__ import annotations

import math

import pytest
import torch

from lite3r_plugin.errors import InputError
from lite3r_plugin.scene.geometry import unproject
from lite3r_plugin.scene.procedural import ProcScenes, TextureBank, covisibility, reprojection_check
from lite3r_plugin.scene.procedural.tracing import Primitives, trace


@pytest.fixture(scope="module")
def bank() -> TextureBank:
    return TextureBank.procedural(12, 32, seed=0)


def test_warped_views_agree(bank: TextureBank) -> None:
    sample = ProcScenes(bank, seed=1, augment=False, arcs=(0.35,))(2, 3, 48, 64)
    seen, warped, unwarped = reprojection_check(sample).T
    assert (seen > 0.3).all()
    assert (warped < 0.3 * unwarped).all()


def test_points_depth_and_cameras_describe_one_geometry(bank: TextureBank) -> None:
    sample = ProcScenes(bank, seed=2)(2, 2, 24, 32, want_points=True)
    torch.testing.assert_close(unproject(sample["depth"], sample["w2c"], sample["K"]), sample["points"], atol=1e-4, rtol=1e-4)
    shares = covisibility(sample, step=4)
    assert shares.shape == (2, 2, 2)
    assert (shares.diagonal(dim1=1, dim2=2) > 0.99).all()


def test_same_seed_same_scenes(bank: TextureBank) -> None:
    first, again, other = (ProcScenes(bank, seed=seed)(1, 2, 16, 16) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["depth"], other["depth"])


@pytest.mark.parametrize(
    ("kind", "distance"),
    [("box", 4.0), ("ellipsoid", 5 - math.sqrt(1 - 0.25)), ("cylinder", 5 - math.sqrt(1 - 0.25)), ("none", 15.0)],
)
def test_depth_in_closed_form(kind: str, distance: float) -> None:
    """One unit primitive at z = 5, and a ray along z half a unit beside its centre; the room's wall is at z = 15."""
    counts = Primitives(1, 1, 1)
    turned = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # the cylinder's axis along y
    centres = torch.tensor([[[0.0, 0, 5]] * 3 + [[0, 0, 5]]])
    maps = torch.stack([torch.eye(3), torch.eye(3), turned, torch.eye(3) / 10])[None]
    on = torch.tensor([[kind == "box", kind == "ellipsoid", kind == "cylinder", True]])
    t, k = trace(counts, centres, maps, on, torch.tensor([[[0.5, 0.0, 0.0]]]), torch.tensor([[[[0.0, 0.0, 1.0]]]]))
    assert t.item() == pytest.approx(distance, abs=1e-5)
    assert k.item() == ["box", "ellipsoid", "cylinder", "none"].index(kind)


def test_textures_of_another_shape_are_refused() -> None:
    with pytest.raises(InputError, match="power of two"):
        TextureBank(torch.rand(2, 3, 24, 24))
