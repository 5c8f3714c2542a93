"""A Linear in FP32 on few rows, bound by reading its weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import on_device_of, why_not_triton
from . import naive

__all__ = ["MAX_ROWS", "linear", "why_not"]

MAX_ROWS = 8


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """The reason why the kernel does not take these, or None when it does: FP32 on one GPU, up to `MAX_ROWS` rows, and no gradients.

    Where the user lets matrix products of FP32 round their inputs (TF32), they stay torch's.
    """
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if not x.is_cuda or any(t.dtype != torch.float32 or t.device != x.device for t in tensors):
        return "not all tensors are FP32 on one GPU"
    if weight.dim() != 2 or not 0 < x.numel() <= MAX_ROWS * weight.shape[1] or x.shape[-1] != weight.shape[1]:
        return f"there are not 1 to {MAX_ROWS} rows"
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "it has no gradient"
    if torch.is_autocast_enabled("cuda"):
        return "autocast chooses the dtype"
    if not _ieee():
        return "products of FP32 may be rounded to TF32"
    return None if why_not_triton(x.new_empty(0, 64)) is None else "Triton does not run there"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, triton: bool) -> Tensor:
    """``x weight^T + bias``; `naive.linear` is the definition.

    Args:
        x: ``[..., C]`` FP32.
        weight: ``[C_out, C]`` FP32.
        bias: ``[C_out]`` FP32, or None.
        triton: Whether a Triton kernel does it, on what `why_not` lets through. Its results are the same bits in every call.

    Returns:
        ``[..., C_out]`` FP32.
    """
    if triton:
        from . import kernels

        with on_device_of(x):
            return kernels.linear(x, weight, bias)
    return naive.linear(x, weight, bias)


def _ieee() -> bool:
    """Whether torch multiplies FP32 matrices in FP32 on GPUs."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # since torch 2.9
    return not matmul.allow_tf32 if precision is None else precision in ("none", "ieee")
