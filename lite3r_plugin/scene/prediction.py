"""What a reconstruction model predicts of a scene, and simple geometry of it.

Cameras are OpenCV's: x right, y down, z forward; a pixel (u, v) has its centre at (u + 0.5, v + 0.5); depth is the z
coordinate in the camera's frame. Units are the model's own, metres only where the model says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import AdapterError


@dataclass(frozen=True)
class Prediction:
    """A reconstructed scene of S views, float32 on the CPU.

    Attributes:
        depth: ``[S, H, W]``, along the camera's z axis.
        confidence: ``[S, H, W]``, larger is surer; the scale is the model's own.
        points: ``[S, H, W, 3]`` in world coordinates.
        world_to_camera: ``[S, 3, 4]``, rotation and translation.
        intrinsics: ``[S, 3, 3]`` in pixels of the images below.
        images: ``[S, H, W, 3]`` in [0, 1], what the model saw.

    Raises:
        AdapterError: the shapes do not fit together.
    """

    depth: Tensor
    confidence: Tensor
    points: Tensor
    world_to_camera: Tensor
    intrinsics: Tensor
    images: Tensor

    def __post_init__(self) -> None:
        size = tuple(self.depth.shape)
        views = size[:1]
        shapes = {
            "depth": size, "confidence": size, "points": (*size, 3), "images": (*size, 3),
            "world_to_camera": (*views, 3, 4), "intrinsics": (*views, 3, 3),
        }  # fmt: skip
        if len(size) != 3:
            raise AdapterError(f"Prediction.depth is [S, H, W], got {list(size)}")
        for name, shape in shapes.items():
            value = getattr(self, name)
            if tuple(value.shape) != shape:
                raise AdapterError(f"Prediction.{name} must be {list(shape)} to fit depth {list(size)}, got {list(value.shape)}")
            object.__setattr__(self, name, value.detach().to("cpu", torch.float32))

    @property
    def num_views(self) -> int:
        """S."""
        return self.depth.shape[0]


@dataclass(frozen=True)
class DepthError:
    """Absolute relative depth error |depth - reference| / reference over pixels: mean, 95th percentile, maximum."""

    mean: float
    p95: float
    maximum: float


def depth_error(depth: Tensor, reference: Tensor, align_scale: bool = False) -> DepthError:
    """Compare depth maps ``[S, H, W]`` where the reference is finite and positive.

    Args:
        depth: What is judged.
        reference: What it is compared with; 0, negative or not finite where unknown.
        align_scale: First multiply `depth` by one number for the whole scene, the median of reference / depth. For
            references from another source than the model, which knows no scale.
    """
    known = reference.isfinite() & (reference > 0)
    depth, reference = depth[known].double(), reference[known].double()
    if not len(reference):
        return DepthError(float("nan"), float("nan"), float("nan"))
    if align_scale:
        depth = depth * (reference / depth).median()
    error = (depth - reference).abs() / reference
    rank = max(1, round(0.95 * len(error)))
    return DepthError(error.mean().item(), error.kthvalue(rank).values.item(), error.max().item())


def unproject(depth: Tensor, world_to_camera: Tensor, intrinsics: Tensor) -> Tensor:
    """World points ``[S, H, W, 3]`` of depth maps ``[S, H, W]`` with cameras ``[S, 3, 4]`` and ``[S, 3, 3]``."""
    height, width = depth.shape[-2:]
    v, u = torch.meshgrid(
        torch.arange(height, device=depth.device) + 0.5, torch.arange(width, device=depth.device) + 0.5, indexing="ij"
    )  # fmt: skip
    pixels = torch.stack((u, v, torch.ones_like(u)), -1).to(depth.dtype)  # [H, W, 3]
    rays = torch.einsum("sij,hwj->shwi", torch.linalg.inv(intrinsics.to(depth.dtype)), pixels)
    rotation, translation = world_to_camera[:, :, :3].to(depth.dtype), world_to_camera[:, :, 3].to(depth.dtype)
    return torch.einsum("sji,shwj->shwi", rotation, rays * depth[..., None] - translation[:, None, None])


def fit_intrinsics(camera_points: Tensor) -> Tensor:
    """Pinhole intrinsics ``[S, 3, 3]`` with a central principal point that explain camera-frame points ``[S, H, W, 3]``.

    For models that predict points but no focal length. Robust: the median over pixels of each axis.
    """
    views, height, width = camera_points.shape[:3]
    x, y, z = camera_points.float().unbind(-1)
    u = (torch.arange(width, device=x.device) + 0.5 - width / 2).expand_as(x)
    v = (torch.arange(height, device=x.device) + 0.5 - height / 2)[:, None].expand_as(y)
    intrinsics = torch.zeros(views, 3, 3, device=x.device)
    for axis, pixel, coordinate in ((0, u, x), (1, v, y)):
        slope = coordinate / z
        focal = (pixel / torch.where(slope == 0, 1e-9, slope)).flatten(1).median(1).values
        intrinsics[:, axis, axis] = focal.clamp_min(1.0)
    intrinsics[:, 0, 2], intrinsics[:, 1, 2], intrinsics[:, 2, 2] = width / 2, height / 2, 1.0
    return intrinsics
