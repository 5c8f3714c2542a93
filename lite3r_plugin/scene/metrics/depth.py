"""Errors of depth maps after one scale per scene, or per view."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...errors import InputError
from .checks import same_shape
from .records import Record

Align = Literal["scene", "view", "none"]


@dataclass(frozen=True)
class DepthMetrics(Record):
    """Over all pixels that both sides know, after alignment; means where nothing else is said.

    Attributes:
        abs_rel, abs_rel_p95, abs_rel_max: |predicted - reference| / reference: mean, 95th percentile, maximum.
        rmse: Root of the mean squared error, in the unit of the reference.
        delta1, delta2, delta3: Shares of pixels whose ratio, the larger over the smaller, is below 1.25, 1.25², 1.25³.
        coverage: Share of the reference's pixels for which there is a prediction.
        scales: What the prediction was multiplied by: one number per scene, or one per view (NaN for a view that has no pixel).
    """

    abs_rel: float
    abs_rel_p95: float
    abs_rel_max: float
    rmse: float
    delta1: float
    delta2: float
    delta3: float
    coverage: float
    scales: tuple[float, ...]


def depth_metrics(predicted: Tensor, reference: Tensor, valid: Tensor | None = None, align: Align = "scene") -> DepthMetrics:
    """Compare depth maps.

    A model does not know the scale of the world, but it should know the scale of one view against another. So by default *one*
    number aligns the whole scene: the median of reference / predicted over its pixels (the lower one of two middles). With a
    scale per view, errors between views are forgiven.

    Args:
        predicted: ``[S, H, W]``, z in any unit; there is no prediction where it is not finite or not positive.
        reference: ``[S, H, W]``, unknown where it is not finite or not positive.
        valid: Bool ``[S, H, W]``; further pixels of the reference to leave out are False.
        align: One scale per ``"scene"``, per ``"view"``, or ``"none"``.

    Raises:
        InputError: the shapes do not fit, or no pixel can be compared.
    """
    same_shape(predicted, reference, valid, "depth", "[views, height, width]", (3,))
    if align not in ("scene", "view", "none"):
        raise InputError(f"align is 'scene', 'view' or 'none', got {align!r}")
    mine, true = (x.detach().to("cpu", torch.float64) for x in (predicted, reference))
    known = true.isfinite() & (true > 0)
    if valid is not None:
        known &= valid.to("cpu")
    both = known & mine.isfinite() & (mine > 0)
    if not known.any():
        raise InputError("the reference depth has no valid pixel")
    if not both.any():
        raise InputError("the predicted depth is not finite or not positive at every valid pixel of the reference")
    scales = true.new_ones(1)
    if align == "scene":
        scales = (true[both] / mine[both]).median()[None]
    elif align == "view":
        views = zip(true, mine, both, strict=True)
        scales = torch.stack([(t[b] / m[b]).median() if b.any() else scales[0] * torch.nan for t, m, b in views])
    mine = (mine * scales[:, None, None])[both]
    true = true[both]
    error = (mine - true).abs()
    relative = error / true
    ratio = torch.maximum(mine / true, true / mine)
    return DepthMetrics(
        relative.mean().item(),
        relative.kthvalue(max(1, round(0.95 * len(relative)))).values.item(),
        relative.max().item(),
        error.square().mean().sqrt().item(),
        *((ratio < 1.25**k).double().mean().item() for k in (1, 2, 3)),
        coverage=both.sum().item() / known.sum().item(),
        scales=tuple(scales.tolist()),
    )
