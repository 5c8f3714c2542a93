"""Whether a difference between two methods is more than the choice of scenes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...errors import InputError
from .records import Record

LEAST_SCENES = 6
"""With fewer, differences that all have one sign are no rare chance: of five, one time in 16 (a test of signs, both sides)."""


@dataclass(frozen=True)
class Interval(Record):
    """A mean difference and the interval in which it lies.

    Attributes:
        difference: Mean of second - first over scenes.
        low, high: Bounds; NaN below `LEAST_SCENES` scenes.
        scenes: Number of scenes that both methods have a value for.
    """

    difference: float
    low: float
    high: float
    scenes: int

    @property
    def clear(self) -> bool:
        """Whether zero is outside, so that the sign of the difference is known."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Percentile bootstrap of the mean difference of two methods on the same scenes.

    Scenes are drawn with replacement, each with both of its values, so that hard and easy scenes cancel. The same seed gives
    the same interval. With few scenes (below ten, say) such intervals are too narrow; below `LEAST_SCENES` there is none.

    Args:
        first, second: One value per scene; scenes where either is NaN are left out.
        confidence: Between 0 and 1.
        resamples: Number of draws.
        seed: Of the draws.
    """
    if len(first) != len(second) or not len(first):
        raise InputError(f"a paired comparison needs values of the same scenes, got {len(first)} and {len(second)}")
    if not 0 < confidence < 1 or resamples < 1:
        raise InputError(f"the confidence lies between 0 and 1 and there is at least one draw, got {confidence} and {resamples}")
    before, after = (torch.tensor(values, dtype=torch.float64, device="cpu") for values in (first, second))
    difference = after - before
    difference = difference[~difference.isnan()]
    scenes = len(difference)
    if scenes < LEAST_SCENES:
        return Interval(difference.mean().item(), math.nan, math.nan, scenes)
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, 2**22 // scenes)  # a bound on memory
    counts = [min(at_once, resamples - done) for done in range(0, resamples, at_once)]
    means = torch.cat([difference[torch.randint(scenes, (count, scenes), generator=generator, device="cpu")].mean(1) for count in counts])
    tail = (1 - confidence) / 2
    low, high = means.quantile(means.new_tensor([tail, 1 - tail])).tolist()
    return Interval(difference.mean().item(), low, high, scenes)
