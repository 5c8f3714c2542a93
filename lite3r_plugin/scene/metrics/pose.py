"""Errors of camera poses: relative poses of all pairs of views, and the trajectory after Sim(3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from .alignment import fit_similarity
from .checks import Cameras, camera_pair
from .records import Record


@dataclass(frozen=True)
class PairErrors:
    """Errors of the P = S (S - 1) / 2 pairs of two different views, in degrees.

    Attributes:
        views: ``[P, 2]``, the first below the second; a view is never paired with itself.
        rotation: ``[P]``, angle of the rotation that is left between the relative rotations.
        translation: ``[P]``, angle between the directions of the baselines; NaN where the reference has no baseline.
    """

    views: Tensor
    rotation: Tensor
    translation: Tensor

    @property
    def defined(self) -> Tensor:
        """``[P]``, pairs whose reference has a baseline."""
        return ~self.translation.isnan()

    @property
    def larger(self) -> Tensor:
        """The larger of the two angles, of the defined pairs only."""
        return torch.maximum(self.rotation, self.translation)[self.defined]


@dataclass(frozen=True)
class PoseMetrics(Record):
    """Angles in degrees, areas in percent.

    Attributes:
        rotation_mean, rotation_median: Of all pairs.
        translation_mean, translation_median: Of the direction, over pairs that have a baseline.
        auc3, auc5, auc15, auc30: `auc` of the larger of the two angles, over pairs that have a baseline.
        ate: Root mean square distance of the camera centres after Sim(3), in the unit of the reference. NaN below three views,
            which Sim(3) always brings together, and where the reference does not move.
        pairs: Number of pairs.
        undefined: How many of them have no baseline in the reference, so that no direction is right or wrong.
    """

    rotation_mean: float
    rotation_median: float
    translation_mean: float
    translation_median: float
    auc3: float
    auc5: float
    auc15: float
    auc30: float
    ate: float
    pairs: int
    undefined: int


def pose_metrics(predicted: Tensor, reference: Tensor) -> PoseMetrics:
    """Compare cameras whose world frames and units may differ.

    Args:
        predicted: World to camera, ``[S, 3, 4]`` or ``[S, 4, 4]``, at least two.
        reference: The same number of cameras.

    Raises:
        InputError: see `lite3r_plugin.scene.metrics.checks.cameras`.
    """
    mine, true = camera_pair(predicted, reference)
    errors = _pair_errors(mine, true)
    defined = errors.translation[errors.defined]
    return PoseMetrics(
        errors.rotation.mean().item(),
        errors.rotation.quantile(0.5).item(),
        defined.mean().item(),
        defined.quantile(0.5).item() if len(defined) else math.nan,
        *(auc(errors.larger, degrees) for degrees in (3, 5, 15, 30)),
        ate=_trajectory_error(mine, true),
        pairs=len(errors.rotation),
        undefined=len(errors.rotation) - len(defined),
    )


def pair_errors(predicted: Tensor, reference: Tensor) -> PairErrors:
    """Errors of all pairs of views; arguments as in `pose_metrics`.

    The direction of a baseline is compared as both of its cameras see it, and the two angles are averaged, so that the order of
    the views does not matter (where rotations are wrong, one camera alone would give another angle than the other). Opposite
    directions are 180 degrees apart; some published code folds this to 0. A predicted baseline of length zero, which has no
    direction, is 90 degrees off: as far as a random one is on average.
    """
    return _pair_errors(*camera_pair(predicted, reference))


def auc(errors: Tensor, threshold: float) -> float:
    """Area under the curve of recall over error up to `threshold`, in percent; NaN without errors.

    The recall at an error is the share of `errors` up to it. Its exact integral over [0, threshold], divided by threshold, is
    the mean of ``max(0, 1 - error / threshold)``. Much published code sums a histogram with bins of one degree, which counts an
    error as if it lay at the lower edge of its bin: up to 100 / threshold percent points more, half of that on average, so some
    1.7 points at 30 degrees and 17 at 3.
    """
    if errors.isnan().any() or (errors < 0).any() or not threshold > 0:
        raise InputError("the area under the curve is of errors that are not negative and not NaN, up to a positive threshold")
    return 100 * (1 - errors.double() / threshold).clamp(min=0).mean().item()


def _pair_errors(mine: Cameras, true: Cameras) -> PairErrors:
    views = torch.combinations(torch.arange(len(true.centre), device=true.centre.device))
    i, j = views.unbind(1)
    left = (mine.rotation[j] @ mine.rotation[i].mT) @ (true.rotation[j] @ true.rotation[i].mT).mT
    my_baseline, baseline = mine.centre[j] - mine.centre[i], true.centre[j] - true.centre[i]
    translation = torch.stack([_angle(_turn(mine.rotation[k], my_baseline), _turn(true.rotation[k], baseline)) for k in (i, j)]).mean(0)
    translation[my_baseline.norm(dim=1) <= mine.resolution] = 90.0
    translation[baseline.norm(dim=1) <= true.resolution] = torch.nan
    return PairErrors(views, _rotation_angle(left), translation)


def _trajectory_error(mine: Cameras, true: Cameras) -> float:
    moves = (true.centre - true.centre.mean(0)).norm(dim=1).max().item() > true.resolution
    if len(true.centre) < 3 or not moves:
        return math.nan
    aligned = fit_similarity(mine.centre, true.centre)(mine.centre)
    return (aligned - true.centre).square().sum(1).mean().sqrt().item()


def _turn(rotation: Tensor, vector: Tensor) -> Tensor:
    return torch.einsum("pij,pj->pi", rotation, vector)


def _angle(a: Tensor, b: Tensor) -> Tensor:
    """Degrees between vectors ``[P, 3]``; unlike acos it is exact for small angles."""
    return torch.rad2deg(torch.atan2(torch.linalg.cross(a, b).norm(dim=1), (a * b).sum(1)))


def _rotation_angle(rotation: Tensor) -> Tensor:
    """Degrees by which matrices ``[P, 3, 3]`` turn, from sine and cosine."""
    trace = rotation.diagonal(dim1=1, dim2=2).sum(1)
    sine = (rotation - rotation.mT).flatten(1).norm(dim=1) / math.sqrt(2)  # this norm is sqrt(8) |sin|, and the trace 1 + 2 cos
    return torch.rad2deg(torch.atan2(sine, trace - 1))
