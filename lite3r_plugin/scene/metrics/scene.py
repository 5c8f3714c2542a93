"""Depth, pose and points of one scene together."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..geometry import Geometry
from .depth import DepthMetrics, depth_metrics
from .points import PointMetrics, point_metrics
from .pose import PoseMetrics, pose_metrics
from .records import Record


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
    if not reference.known().any():
        return SceneMetrics(None, pose_metrics(predicted.world_to_camera, reference.world_to_camera), None)
    return SceneMetrics(
        depth_metrics(predicted.depth, reference.depth, reference.valid),
        pose_metrics(predicted.world_to_camera, reference.world_to_camera),
        point_metrics(predicted.points(), reference.points(), reference.valid, threshold=threshold, max_points=max_points)
        if points
        else None,
    )


def constant_geometry(reference: Geometry) -> Geometry:
    """What a model gets that ignores the images: one depth everywhere (the best one for the scene), and cameras that are all equal.

    It is told the true focal length, and its one depth is the median of the truth (1 where no depth is known).
    """
    depth, known = reference.depth.detach().to("cpu", torch.float64), reference.known()
    middle = depth[known].median().item() if known.any() else 1.0
    same = torch.eye(3, 4, dtype=torch.float64, device="cpu").expand(len(depth), 3, 4)
    return Geometry(torch.full_like(depth, middle), same, reference.intrinsics)
