"""A Linear whose weight is in FP8 and whose input is not."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import register, under_trace
from ..fp8 import Quantized
from . import naive

__all__ = ["linear"]


def linear(x: Tensor, weight: Quantized, bias: Tensor | None, *, triton: bool) -> Tensor:
    """``x weight'^T + bias`` in x's dtype; `naive.linear` is the definition.

    Args:
        x: ``[..., C]``.
        weight: ``[C_out, C]``, E4M3, finite.
        bias: ``[C_out]`` or None.
        triton: Whether one Triton kernel does it, which takes BF16, FP16 and FP32 (rounded to TF32) on CUDA GPUs from sm80 on.

    Returns:
        ``[..., C_out]``.
    """
    if triton and x.numel():
        return (linear_operator if under_trace() else _linear)(x, weight.data, weight.scale, bias)
    return naive.linear(x, weight, bias)


def _linear(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    from . import kernels

    return kernels.linear(x, Quantized(data, scale, x.dtype), bias)


linear_operator = register(
    "weight_only_linear",
    "(Tensor x, Tensor data, Tensor scale, Tensor? bias) -> Tensor",
    _linear,
    lambda x, data, scale, bias: x.new_empty(*x.shape[:-1], data.shape[0]),
)
