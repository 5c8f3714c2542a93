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
        published_auc3, published_auc30: `published_auc`, over all pairs.
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
    published_auc3: float
    published_auc30: float
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
    published = _published_errors(mine, true)
    return PoseMetrics(
        errors.rotation.mean().item(),
        errors.rotation.quantile(0.5).item(),
        defined.mean().item(),
        defined.quantile(0.5).item() if len(defined) else math.nan,
        *(auc(errors.larger, degrees) for degrees in (3, 5, 15, 30)),
        *(_histogram_auc(published, degrees) for degrees in (3, 30)),
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


def published_auc(predicted: Tensor, reference: Tensor, threshold: int) -> float:
    """AUC of relative poses as the Depth Anything 3 benchmark computes it, to set beside its figures; arguments as in `pose_metrics`.

    It is no better a measure than `auc` of `PairErrors.larger`; it may be larger or smaller, for what follows from its code
    (``bench/utils.py`` of ByteDance-Seed/Depth-Anything-3, arXiv 2511.10647), which much other code has too:

    * errors count in whole degrees: the mean, over k = 1 to `threshold`, of the share of errors below k (up to the last k);
    * opposite directions are equal, so no direction is more than 90 degrees off;
    * with E the world-to-camera matrices and the first view as the world, the poses of a pair are compared as inv(E_i) E_j, while
      E_j inv(E_i) takes the one camera to the other. So the direction is that of R_i^T (t_j - t_i), not of a baseline, and which view
      is the first matters. For pairs with it the two agree;
    * where there is no direction, on either side, it is 90 degrees off, and no pair is left out.

    Args:
        predicted, reference: World to camera, ``[S, 3, 4]`` or ``[S, 4, 4]``.
        threshold: In degrees, a whole number from 1 on.

    Returns:
        Percent.

    Raises:
        InputError: as `pose_metrics`, or for another threshold.
    """
    if not isinstance(threshold, int) or threshold < 1:
        raise InputError(f"the histogram has bins of one degree up to a whole number of degrees, got {threshold!r}")
    return _histogram_auc(_published_errors(*camera_pair(predicted, reference)), threshold)


def _histogram_auc(errors: Tensor, threshold: int) -> float:
    edges = torch.arange(1, threshold + 1, device=errors.device)
    below = errors[:, None] < edges
    below[:, -1] |= errors == threshold
    return 100 * below.double().mean().item()


def _published_errors(mine: Cameras, true: Cameras) -> Tensor:
    """The larger of the two angles of each pair as `published_auc` explains them, ``[P]`` in degrees."""
    i, j = torch.combinations(torch.arange(len(true.centre), device=true.centre.device)).unbind(1)
    turns, directions, defined = [], [], torch.ones(len(i), dtype=torch.bool, device=i.device)
    for side in (mine, true):
        rotation = side.rotation @ side.rotation[0].mT  # of the first view's frame
        translation = -_turn(rotation, _turn(side.rotation[:1], side.centre - side.centre[0]))
        direction = _turn(rotation[i].mT, translation[j] - translation[i])
        defined &= direction.norm(dim=1) > side.resolution
        turns.append(rotation[i].mT @ rotation[j])
        directions.append(direction)
    angle = _angle(*directions)
    angle = torch.where(defined, torch.minimum(angle, 180 - angle), 90.0)
    return torch.maximum(_rotation_angle(turns[0] @ turns[1].mT), angle)


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
