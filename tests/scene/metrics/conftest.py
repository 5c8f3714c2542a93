"""Random reconstructions from a seed, for the tests of the measures."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lite3r_plugin.scene.metrics import Geometry

Make = Callable[..., Tensor]


def _rotations(count: int, generator: torch.Generator, degrees: float = 180.0) -> Tensor:
    axis = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator, dtype=torch.float64), dim=1)
    x, y, z = axis.unbind(1)
    zero = torch.zeros_like(x)
    cross = torch.stack((zero, -z, y, z, zero, -x, -y, x, zero), 1).view(-1, 3, 3)
    return torch.linalg.matrix_exp(cross * math.radians(degrees))


@pytest.fixture
def rotations() -> Make:
    """``rotations(count, seed, degrees)``: ``[count, 3, 3]``, by that angle about random axes."""
    return lambda count, seed=0, degrees=120.0: _rotations(count, torch.Generator().manual_seed(seed), degrees)


@pytest.fixture
def cameras() -> Make:
    """``cameras(views, seed)``: random world-to-camera matrices ``[views, 3, 4]``, FP64."""

    def make(views: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        translation = torch.randn(views, 3, 1, generator=generator, dtype=torch.float64)
        return torch.cat((_rotations(views, generator, 100.0), translation), 2)

    return make


@pytest.fixture
def moved() -> Callable[..., Tensor]:
    """``moved(cameras, rotation, translation, scale)``: the same cameras in another world frame and unit."""

    def move(world_to_camera: Tensor, rotation: Tensor, translation: Tensor, scale: float = 1.0) -> Tensor:
        turned = world_to_camera[:, :, :3] @ rotation.T  # a world point x becomes scale (rotation x + translation)
        return torch.cat((turned, scale * (world_to_camera[:, :, 3:] - turned @ translation[:, None])), 2)

    return move


@pytest.fixture
def scene() -> Callable[..., Geometry]:
    """``scene(seed, views)``: smooth depth seen by cameras a little apart, FP32."""

    def make(seed: int = 0, views: int = 3) -> Geometry:
        generator = torch.Generator().manual_seed(seed)
        phase, slope = torch.rand(2, views, 1, 1, generator=generator)
        v, u = torch.meshgrid(torch.linspace(0, 3, 18), torch.linspace(0, 4, 24), indexing="ij")
        depth = 3 + (u + 6 * phase).sin() * (v + slope).cos()
        turn = _rotations(views, generator, 15.0).float()
        shift = torch.randn(views, 3, 1, generator=generator)
        intrinsics = torch.tensor([[20.0, 0, 12], [0, 20, 9], [0, 0, 1]]).expand(views, 3, 3)
        return Geometry(depth, torch.cat((turn, shift), 2), intrinsics)

    return make
