"""One tolerance for kernels: no worse than twice the error of the same computation in torch at the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from lite3r_plugin.ops.fp8 import Quantized, dequantize, quantize


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


def assert_quantizes(found: Quantized, exact: Tensor, other: float = 0.01) -> None:
    """`found` holds the rows of `exact` (FP64) in FP8: but for a share `other` (and two) the same codes, never more than one apart."""
    expected = quantize(exact, found.data.dtype)
    assert found.data.shape == exact.shape
    torch.testing.assert_close(found.scale, expected.scale, rtol=1e-5, atol=0, equal_nan=True)
    different = found.data.view(torch.uint8) != expected.data.view(torch.uint8)
    different &= ~((found.data.float() == 0) & (expected.data.float() == 0))  # signed zeros
    assert different.sum() <= other * exact.numel() + 2
    info = torch.finfo(found.data.dtype)
    step = torch.maximum(exact.abs() * info.eps, found.scale * (info.tiny * info.eps))
    difference = dequantize(found, torch.float64) - dequantize(expected, torch.float64)
    assert (difference.abs() <= step * 1.01).logical_or(exact.isnan() & difference.isnan()).all()
