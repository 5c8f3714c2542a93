"""Input of the measures: refused when it makes no sense, else in FP64 on the CPU, where results do not depend on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError

ORTHOGONAL = 2e-2  # rotations that went through BF16 pass, shears and scales do not


@dataclass(frozen=True)
class Cameras:
    """S checked cameras.

    Attributes:
        rotation: World to camera, ``[S, 3, 3]``.
        centre: In the world, ``[S, 3]``.
        resolution: Distances between centres up to this length are rounding.
    """

    rotation: Tensor
    centre: Tensor
    resolution: float


def cameras(world_to_camera: Tensor, name: str) -> Cameras:
    """Check at least two world-to-camera matrices, ``[S, 3, 4]`` or ``[S, 4, 4]``."""
    shape = tuple(world_to_camera.shape)
    if len(shape) != 3 or shape[1:] not in ((3, 4), (4, 4)):
        raise InputError(f"the {name} cameras must be [views, 3, 4] or [views, 4, 4], got {list(shape)}")
    if shape[0] < 2:
        raise InputError(f"relative poses need at least two views, the {name} cameras have {shape[0]}")
    matrix = world_to_camera.detach().to("cpu", torch.float64)
    _refuse(~matrix.isfinite().all((1, 2)), f"the {name} cameras have values that are not finite")
    if shape[1] == 4:
        last = matrix.new_tensor([0, 0, 0, 1])
        _refuse((matrix[:, 3] - last).abs().amax(1) > 1e-6, f"the last row of the {name} cameras is not 0 0 0 1")
    rotation, translation = matrix[:, :3, :3], matrix[:, :3, 3]
    skew = (rotation @ rotation.mT - torch.eye(3, dtype=torch.float64, device="cpu")).abs().amax((1, 2))
    _refuse(skew > ORTHOGONAL, f"the {name} cameras have 3x3 parts that are no rotations (rows not orthonormal)")
    _refuse(torch.linalg.det(rotation) < 0, f"the {name} cameras have reflections (determinant -1) where rotations belong")
    centre = -torch.einsum("sji,sj->si", rotation, translation)
    precision = torch.finfo(world_to_camera.dtype).eps if world_to_camera.is_floating_point() else 0.0
    extent = (centre - centre.mean(0)).norm(dim=1).max().item()
    return Cameras(rotation, centre, max(64 * precision * translation.norm(dim=1).max().item(), 1e-6 * extent))


def camera_pair(predicted: Tensor, reference: Tensor) -> tuple[Cameras, Cameras]:
    """Check both sides; they must have the same number of views."""
    mine, true = cameras(predicted, "predicted"), cameras(reference, "reference")
    if len(mine.centre) != len(true.centre):
        raise InputError(f"{len(mine.centre)} predicted cameras do not fit {len(true.centre)} reference cameras")
    return mine, true


def same_shape(predicted: Tensor, reference: Tensor, valid: Tensor | None, what: str, shape: str, sizes: tuple[int, ...]) -> None:
    """Check that both sides are `shape`, that is one of `sizes` dimensions, and that `valid` is one bool per element."""
    if predicted.shape != reference.shape or reference.ndim not in sizes:
        raise InputError(f"predicted and reference {what} must both be {shape}, got {list(predicted.shape)} and {list(reference.shape)}")
    elements = reference.shape[:-1] if what == "points" else reference.shape
    if valid is not None and (valid.shape != elements or valid.dtype != torch.bool):
        raise InputError(f"the mask must be bool {list(elements)}, got {valid.dtype} {list(valid.shape)}")


def _refuse(wrong: Tensor, message: str) -> None:
    if wrong.any():
        views = wrong.nonzero()[:, 0].tolist()
        shown = ", ".join(map(str, views[:5])) + (", ..." if len(views) > 5 else "")
        raise InputError(f"{message}: view {shown}")
