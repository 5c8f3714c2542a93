"""Depth to points and back: projection inverted, cameras found again, precision kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lite3r_plugin.scene.geometry import fit_intrinsics, relative_to_first, unproject


def cameras(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Depth ``[*shape, 12, 16]``, poses and intrinsics with skew, FP64."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(*shape, 3, 3, generator=generator, dtype=torch.float64)).Q
    camera = torch.cat((rotation, torch.randn(*shape, 3, 1, generator=generator, dtype=torch.float64)), -1)
    intrinsics = torch.tensor([[30.0, 0.5, 8], [0, 25, 6], [0, 0, 1]], dtype=torch.float64).expand(*shape, 3, 3)
    return 1 + torch.rand(*shape, 12, 16, generator=generator, dtype=torch.float64), camera, intrinsics


@pytest.mark.parametrize("shape", [(2,), (3, 2)])
def test_unproject_inverts_projection(shape: tuple[int, ...]) -> None:
    """One scene, and a batch of scenes."""
    depth, camera, intrinsics = cameras(*shape)
    points = unproject(depth, camera, intrinsics)
    seen = torch.einsum("...ij,...hwj->...hwi", camera[..., :3], points) + camera[..., None, None, :, 3]
    torch.testing.assert_close(seen[..., 2], depth)
    pixels = torch.einsum("...ij,...hwj->...hwi", intrinsics, seen)
    expected = torch.stack(torch.meshgrid(torch.arange(16) + 0.5, torch.arange(12) + 0.5, indexing="xy"), -1).double()
    torch.testing.assert_close(pixels[..., :2] / pixels[..., 2:], expected.expand(*shape, 12, 16, 2))


def test_unproject_is_not_rounded_under_autocast() -> None:
    """Adapters call it where the model runs in 16 bit."""
    parts = [x.float() for x in cameras(2)]
    with torch.autocast("cpu", torch.bfloat16):
        points = unproject(*parts)
    assert points.dtype == torch.float32
    assert torch.equal(points, unproject(*parts))


def test_the_first_camera_becomes_the_world() -> None:
    _, camera, _ = cameras(3)
    relative = relative_to_first(camera)
    torch.testing.assert_close(relative[0], torch.eye(3, 4, dtype=torch.float64))
    rotation, translation = camera[..., :3], camera[..., 3]
    torch.testing.assert_close(relative[2, :, :3] @ rotation[0], rotation[2])
    torch.testing.assert_close(relative[2, :, :3] @ translation[0] + relative[2, :, 3], translation[2])


def test_intrinsics_are_found_again() -> None:
    intrinsics = torch.tensor([[300.0, 0, 32], [0, 280, 24], [0, 0, 1]]).expand(2, 3, 3)
    points = unproject(1 + torch.rand(2, 48, 64), torch.eye(3, 4).expand(2, 3, 4), intrinsics)
    points[:, :5] += torch.randn(2, 5, 64, 3)  # outliers
    torch.testing.assert_close(fit_intrinsics(points), intrinsics, rtol=0.01, atol=0.01)
