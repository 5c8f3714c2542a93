"""Least-squares Sim(3) and SE(3) between corresponding points, in closed form (Umeyama, PAMI 1991)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError


@dataclass(frozen=True)
class Similarity:
    """``x -> scale * rotation @ x + translation``.

    Attributes:
        scale: Positive; 1 in SE(3).
        rotation: ``[3, 3]``, FP64.
        translation: ``[3]``, FP64.
    """

    scale: float
    rotation: Tensor
    translation: Tensor

    def __call__(self, points: Tensor) -> Tensor:
        """Transform points ``[..., 3]``."""
        return self.scale * points.to("cpu", torch.float64) @ self.rotation.T + self.translation


def fit_similarity(source: Tensor, target: Tensor, with_scale: bool = True) -> Similarity:
    """The transform of `source` that comes closest to `target` in the sum of squared distances.

    It is never a reflection. Where the points leave it open (all on one line, or all at one place), it is one of the best.

    Args:
        source: ``[N, 3]``.
        target: ``[N, 3]``, in the same order.
        with_scale: Sim(3) rather than SE(3).
    """
    if source.ndim != 2 or source.shape != target.shape or source.shape[1] != 3 or not len(source):
        raise InputError(f"an alignment needs two sets of points [N, 3], N > 0, got {list(source.shape)} and {list(target.shape)}")
    source, target = (x.detach().to("cpu", torch.float64) for x in (source, target))
    if not (source.isfinite().all() and target.isfinite().all()):
        raise InputError("an alignment needs finite points")
    source_mean, target_mean = source.mean(0), target.mean(0)
    source, target = source - source_mean, target - target_mean
    left, stretch, right = torch.linalg.svd(target.T @ source / len(source))
    sign = torch.ones_like(stretch)
    sign[2] = (torch.linalg.det(left) * torch.linalg.det(right)).sign()
    rotation = left * sign @ right
    variance = source.square().sum() / len(source)
    scale = ((stretch * sign).sum() / variance).item() if with_scale and variance > 0 else 1.0
    return Similarity(scale, rotation, target_mean - scale * rotation @ source_mean)
