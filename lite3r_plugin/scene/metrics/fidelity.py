"""How far an accelerated model's output is from that of its dense teacher; no reference is needed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...errors import InputError
from ..geometry import Geometry
from .depth import depth_metrics
from .points import spread
from .pose import pair_errors
from .records import Record


@dataclass(frozen=True)
class Fidelity(Record):
    """Differences between student and teacher. Both speak of one world, so nothing is aligned and a change of scale counts.

    Attributes:
        depth_abs_rel: Mean of |student - teacher| / teacher over pixels.
        depth_delta1: Share of pixels within 25 %.
        depth_scale: Median of teacher / student: what of the difference is scale alone (1: none).
        rotation_mean, rotation_max: Angles of relative rotations over pairs of views, in degrees.
        translation_mean: Angle of directions of baselines; NaN where the teacher does not move.
        points: Median distance of the two points of a pixel, over the size of the teacher's cloud (the median distance of its
            points from their mean).
        coverage: Share of the teacher's pixels that the student has too.
    """

    depth_abs_rel: float
    depth_delta1: float
    depth_scale: float
    rotation_mean: float
    rotation_max: float
    translation_mean: float
    points: float
    coverage: float


def fidelity(student: Geometry, teacher: Geometry) -> Fidelity:
    """Compare the outputs of one model with and without acceleration, on the same images.

    Raises:
        InputError: the two do not fit together, or nothing can be compared.
    """
    depth = depth_metrics(student.depth, teacher.depth, teacher.valid, align="none")
    scale = depth_metrics(student.depth, teacher.depth, teacher.valid).scales[0]
    pairs = pair_errors(student.world_to_camera, teacher.world_to_camera)
    mine, true = student.points(), teacher.points()
    if mine.shape != true.shape:
        raise InputError(f"the points of student and teacher have other shapes: {list(mine.shape)} and {list(true.shape)}")
    both = (mine.isfinite() & true.isfinite()).all(-1)
    if teacher.valid is not None:
        both &= teacher.valid.to("cpu")
    if not both.any():
        raise InputError("student and teacher have no valid point in common")
    mine, true = mine[both], true[both]
    return Fidelity(
        depth.abs_rel,
        depth.delta1,
        scale,
        pairs.rotation.mean().item(),
        pairs.rotation.max().item(),
        pairs.translation[pairs.defined].mean().item(),
        torch.linalg.vector_norm(mine - true, dim=1).median().item() / spread(true),
        depth.coverage,
    )
