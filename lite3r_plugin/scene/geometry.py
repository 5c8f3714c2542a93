"""Geometry of views with cameras: `Geometry`, what every measure takes, and the way from depth to points and back.

Cameras are OpenCV's: x right, y down, z forward; a pixel (u, v) has its centre at (u + 0.5, v + 0.5); depth is the z
coordinate in the camera's frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class Geometry:
    """Depth and cameras of S views, predicted or true: what `Views.geometry` and `Prediction.geometry` give, in any unit, on any device.

    Attributes:
        depth: ``[S, H, W]``, z; not positive or not finite where unknown.
        world_to_camera: ``[S, 3, 4]`` or ``[S, 4, 4]``.
        intrinsics: ``[S, 3, 3]`` in pixels of these images.
        valid: Bool ``[S, H, W]``, pixels to look at; None: all.
        world_points: ``[S, H, W, 3]`` where they come from elsewhere than from depth and cameras.
    """

    depth: Tensor
    world_to_camera: Tensor
    intrinsics: Tensor
    valid: Tensor | None = None
    world_points: Tensor | None = None

    def points(self) -> Tensor:
        """World points ``[S, H, W, 3]``, FP64 on the CPU, NaN where depth is unknown; unprojected with this scene's own cameras.

        Raises:
            InputError: the parts do not fit together, or the intrinsics of a view are no pinhole camera's.
        """
        if self.world_points is not None:
            return self.world_points.detach().to("cpu", torch.float64)
        shapes = tuple(tuple(x.shape[1:]) for x in (self.world_to_camera, self.intrinsics))
        counts = {len(x) for x in (self.depth, self.world_to_camera, self.intrinsics)}
        if self.depth.ndim != 3 or shapes not in (((3, 4), (3, 3)), ((4, 4), (3, 3))) or len(counts) != 1:
            found = ", ".join(str(list(x.shape)) for x in (self.depth, self.world_to_camera, self.intrinsics))
            raise InputError(f"depth [S, H, W], cameras [S, 3, 4] and intrinsics [S, 3, 3] do not fit together: {found}")
        depth, cameras, intrinsics = (
            x.detach().to("cpu", torch.float64) for x in (self.depth, self.world_to_camera[:, :3], self.intrinsics)
        )
        upright = (intrinsics[:, 1, 0] == 0) & (intrinsics[:, 2] == intrinsics.new_tensor([0, 0, 1])).all(-1)
        if not (upright & (torch.linalg.det(intrinsics).abs() > 0)).all():
            raise InputError("the intrinsics of a view are no pinhole camera's: finite, invertible, 0 below the diagonal, 1 at its end")
        return unproject(torch.where(depth.isfinite() & (depth > 0), depth, torch.nan), cameras, intrinsics)

    def known(self) -> Tensor:
        """Bool ``[S, H, W]`` on the CPU: where the depth is known and valid."""
        depth = self.depth.detach().to("cpu")
        known = depth.isfinite() & (depth > 0)
        return known if self.valid is None else known & self.valid.to("cpu")


def unproject(depth: Tensor, world_to_camera: Tensor, intrinsics: Tensor) -> Tensor:
    """World points of depth maps, in the depth's dtype and on its device.

    Sums of products and no matrix products: these would be rounded under autocast and TF32, and be small ones.

    Args:
        depth: ``[..., S, H, W]``, z in any unit.
        world_to_camera: ``[..., S, 3, 4]``, translation in the same unit.
        intrinsics: ``[..., S, 3, 3]`` in pixels, pinhole cameras: 0 below the diagonal, 1 at its end.

    Returns:
        ``[..., S, H, W, 3]``.
    """
    height, width = depth.shape[-2:]
    K, pose = intrinsics.to(depth.dtype), world_to_camera.to(depth.dtype)
    focal_x, skew, centre_x = (K[..., 0, i, None, None] for i in range(3))
    focal_y, centre_y = (K[..., 1, i, None, None] for i in (1, 2))
    u = torch.arange(width, device=depth.device, dtype=depth.dtype) + 0.5
    v = (torch.arange(height, device=depth.device, dtype=depth.dtype) + 0.5)[:, None]
    y = (v - centre_y) / focal_y
    x = (u - centre_x - skew * y) / focal_x
    camera = (x * depth, y * depth, depth)
    # R^T (x - t), a row of R for each coordinate of the camera
    rows = [(camera[i] - pose[..., i, 3, None, None])[..., None] * pose[..., i, None, None, :3] for i in range(3)]
    return rows[0] + rows[1] + rows[2]


def relative_to_first(world_to_camera: Tensor) -> Tensor:
    """World to camera ``[..., S, 3, 4]`` with the first camera's frame as the world: the first becomes the identity. Computed in FP64."""
    rotation, translation = world_to_camera.double().split((3, 1), -1)
    rotated = rotation @ rotation[..., :1, :, :].mT
    return torch.cat((rotated, translation - rotated @ translation[..., :1, :, :]), -1).to(world_to_camera.dtype)


def fit_intrinsics(camera_points: Tensor) -> Tensor:
    """Pinhole intrinsics ``[S, 3, 3]``, FP32, with a central principal point that explain camera-frame points ``[S, H, W, 3]``.

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
