"""Depth, pose and points of one scene together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ..prediction import unproject
from .depth import DepthMetrics, depth_metrics
from .points import PointMetrics, point_metrics
from .pose import PoseMetrics, pose_metrics
from .records import Record


@dataclass(frozen=True)
class Geometry:
    """S views, predicted or true.

    Attributes:
        depth: ``[S, H, W]``, z; not positive or not finite where unknown.
        world_to_camera: ``[S, 3, 4]`` or ``[S, 4, 4]``.
        intrinsics: ``[S, 3, 3]``, of these images.
        valid: Bool ``[S, H, W]``, pixels to look at; None: all.
        world_points: ``[S, H, W, 3]`` where they come from elsewhere than from depth and cameras.
    """

    depth: Tensor
    world_to_camera: Tensor
    intrinsics: Tensor
    valid: Tensor | None = None
    world_points: Tensor | None = None

    def points(self) -> Tensor:
        """World points ``[S, H, W, 3]``, FP64 on the CPU, NaN where depth is unknown; unprojected with this scene's own cameras."""
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
        if not (torch.linalg.det(intrinsics).abs() > 0).all():
            raise InputError("the intrinsics of a view cannot be inverted, or are not finite")
        return unproject(torch.where(depth.isfinite() & (depth > 0), depth, torch.nan), cameras, intrinsics)


@dataclass(frozen=True)
class SceneMetrics(Record):
    """All measures of one scene; depth and points are None where the reference has cameras alone, points where they were left out."""

    depth: DepthMetrics | None
    pose: PoseMetrics
    points: PointMetrics | None


def scene_metrics(
    predicted: Geometry, reference: Geometry, threshold: float | None = None, max_points: int = 100_000, points: bool = True
) -> SceneMetrics:
    """Compare a reconstruction with the truth at the reference's valid pixels.

    Args:
        predicted: At the size of the reference; its own mask is not used.
        reference: What is known of the scene.
        threshold, max_points: As in `point_metrics`.
        points: Whether to measure points, which takes longest.

    Raises:
        InputError: the two do not fit together, or nothing can be compared.
    """
    if not known_depth(reference).any():
        return SceneMetrics(None, pose_metrics(predicted.world_to_camera, reference.world_to_camera), None)
    return SceneMetrics(
        depth_metrics(predicted.depth, reference.depth, reference.valid),
        pose_metrics(predicted.world_to_camera, reference.world_to_camera),
        point_metrics(predicted.points(), reference.points(), reference.valid, threshold=threshold, max_points=max_points)
        if points
        else None,
    )


def known_depth(scene: Geometry) -> Tensor:
    """Bool ``[S, H, W]`` on the CPU: where the depth is known and valid."""
    depth = scene.depth.detach().to("cpu")
    known = depth.isfinite() & (depth > 0)
    return known if scene.valid is None else known & scene.valid.to("cpu")


def constant_geometry(reference: Geometry) -> Geometry:
    """What a model gets that ignores the images: one depth everywhere (the best one for the scene), and cameras that are all equal.

    It is told the true focal length, and its one depth is the median of the truth (1 where no depth is known).
    """
    depth, known = reference.depth.detach().to("cpu", torch.float64), known_depth(reference)
    middle = depth[known].median().item() if known.any() else 1.0
    same = torch.eye(3, 4, dtype=torch.float64).expand(len(depth), 3, 4)
    return Geometry(torch.full_like(depth, middle), same, reference.intrinsics)
