"""A Linear whose weight is in FP8 and whose input is not."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import on_device_of
from ..fp8 import Quantized
from . import naive

__all__ = ["linear"]


def linear(x: Tensor, weight: Quantized, bias: Tensor | None, *, triton: bool) -> Tensor:
    """`naive.linear`, in one Triton kernel if `triton`, which takes BF16, FP16 and FP32 on CUDA GPUs from sm80 on."""
    if triton and x.numel():
        from . import kernels

        with on_device_of(x):
            return kernels.linear(x, weight, bias)
    return naive.linear(x, weight, bias)
