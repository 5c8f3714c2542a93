"""One tolerance for kernels: no worse than twice the error of the same computation in torch at the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference|| in FP64; NaN stays NaN and fails every comparison."""
    value, reference = value.double(), reference.double()
    return ((value - reference).norm() / reference.norm().clamp_min(1e-30)).item()


def assert_as_accurate(value: Tensor, same_dtype: Tensor, reference: Tensor, factor: float = 2.0) -> None:
    """`value` is at most `factor` times as far from the FP32 (or FP64) `reference` as the torch result `same_dtype`."""
    assert value.shape == reference.shape
    floor = 32 * torch.finfo(torch.float32).eps  # FP32 accuracy: sums in another order, products of three TF32 terms
    error, allowed = relative_error(value, reference), max(factor * relative_error(same_dtype, reference), floor)
    assert error <= allowed, f"relative error {error:.2e}, allowed {allowed:.2e}"
