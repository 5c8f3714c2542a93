"""Errors of point maps after Sim(3): accuracy, completeness, Chamfer distance and F-score."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...errors import InputError
from .alignment import fit_similarity
from .checks import same_shape
from .records import Record


@dataclass(frozen=True)
class PointMetrics(Record):
    """Distances to the nearest point of the other side, in the unit of the reference.

    Attributes:
        accuracy: Mean distance of predicted points to the reference.
        completeness: Mean distance of reference points to the prediction.
        chamfer: Mean of the two (some authors add them).
        f_score: Harmonic mean of the shares of predicted points (precision) and of reference points (recall) that are
            closer than `threshold`.
        precision, recall: The two shares.
        threshold: What they were counted with.
        scale: What the prediction was multiplied by.
    """

    accuracy: float
    completeness: float
    chamfer: float
    f_score: float
    precision: float
    recall: float
    threshold: float
    scale: float


def point_metrics(
    predicted: Tensor,
    reference: Tensor,
    valid: Tensor | None = None,
    *,
    threshold: float | None = None,
    align: Literal["sim3", "se3", "none"] = "sim3",
    max_points: int = 100_000,
    seed: int = 0,
) -> PointMetrics:
    """Compare world points of the same pixels.

    The alignment is by least squares over all pixels that both sides know. When there are more than `max_points` known pixels,
    the same seeded sample of pixels is taken on both sides, so that an exact prediction has distance 0 and F-score 1 whatever
    the sample. Distances of other predictions grow as the sample gets sparser: compare results of one `max_points` only.

    Args:
        predicted: ``[S, H, W, 3]`` or ``[N, 3]``; there is no prediction where it is not finite.
        reference: The same shape; unknown where it is not finite.
        valid: Bool, the shape without the 3; further points of the reference to leave out are False, on both sides.
        threshold: Of the F-score, in the unit of the reference; None: 2 % of the median distance of its points from their mean.
        align: Fit rotation, translation and scale, all but the scale, or nothing.
        max_points: See above.
        seed: Of the sample.

    Raises:
        InputError: the shapes do not fit, or fewer than three points can be compared.
    """
    same_shape(predicted, reference, valid, "points", "[views, height, width, 3] or [N, 3]", (2, 4))
    if reference.shape[-1] != 3:
        raise InputError(f"points have three coordinates, got {list(reference.shape)}")
    if align not in ("sim3", "se3", "none"):
        raise InputError(f"align is 'sim3', 'se3' or 'none', got {align!r}")
    mine, true = (x.detach().reshape(-1, 3).to("cpu", torch.float64) for x in (predicted, reference))
    known = true.isfinite().all(1)
    if valid is not None:
        known &= valid.flatten().to("cpu")
    mine, true = mine[known], true[known]
    both = mine.isfinite().all(1)
    if both.sum() < 3:
        raise InputError(f"points can be compared where both sides are known, here at {both.sum().item()} pixels; three are needed")
    scale = 1.0
    if align != "none":
        similarity = fit_similarity(mine[both], true[both], with_scale=align == "sim3")
        mine, scale = similarity(mine), similarity.scale
    if threshold is None:
        threshold = 0.02 * spread(true)
    if len(true) > max_points:
        sample = torch.randperm(len(true), generator=torch.Generator().manual_seed(seed), device="cpu")[:max_points]
        mine, true, both = mine[sample], true[sample], both[sample]
    return cloud_metrics(mine[both], true, threshold, scale)


def cloud_metrics(predicted: Tensor, reference: Tensor, threshold: float, scale: float = 1.0) -> PointMetrics:
    """Compare aligned clouds ``[N, 3]`` and ``[M, 3]`` of finite points that need not correspond; `scale` is only passed on."""
    from scipy.spatial import KDTree

    for name, cloud in (("predicted", predicted), ("reference", reference)):
        if cloud.ndim != 2 or cloud.shape[1] != 3 or not len(cloud) or not cloud.isfinite().all():
            raise InputError(f"the {name} cloud must be [N, 3] finite points, N > 0, got {list(cloud.shape)}")
    if not threshold > 0:
        raise InputError(f"the threshold of the F-score is a positive length, got {threshold}")
    mine, true = (x.detach().to("cpu", torch.float64).numpy() for x in (predicted, reference))
    to_reference, _ = KDTree(true).query(mine)
    to_prediction, _ = KDTree(mine).query(true)
    accuracy, completeness = float(to_reference.mean()), float(to_prediction.mean())
    precision, recall = float((to_reference < threshold).mean()), float((to_prediction < threshold).mean())
    f_score = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return PointMetrics(accuracy, completeness, (accuracy + completeness) / 2, f_score, precision, recall, float(threshold), scale)


def spread(points: Tensor) -> float:
    """The size of a cloud ``[N, 3]``: the median distance of its points from their mean; not zero."""
    size = (points - points.mean(0)).norm(dim=1).median().item()
    if not math.isfinite(size) or size <= 0:
        raise InputError("the reference points are all at one place")
    return size
