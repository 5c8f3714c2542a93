"""A Linear in FP32 on few rows, bound by reading its weight.

`naive` is the definition, `kernels` its Triton twin. It has no gradients.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..dispatch import triton_installed
from . import naive

__all__ = ["MAX_ROWS", "linear", "takes"]

MAX_ROWS = 8


def takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear` is for these: FP32, 1 to `MAX_ROWS` rows, on a CPU or on a GPU on which the kernel runs, and no gradients wanted.

    Nor is it where autocast chooses the dtype, or where the user lets GPUs round what they multiply in FP32 (TF32).
    """
    tensors = (x, weight) if bias is None else (x, weight, bias)
    device = x.device
    return (
        device.type in ("cpu", "cuda")
        and weight.dim() == 2
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1]
        and 0 < x.numel() <= MAX_ROWS * weight.shape[1]
        and all(t.dtype == torch.float32 and t.device == device for t in tensors)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and not torch.is_autocast_enabled(device.type)
        and (not x.is_cuda or (_runs_on(device) and _ieee()))
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x weight^T + bias``; `naive.linear` is the definition.

    Args:
        x: ``[..., C]`` FP32.
        weight: ``[C_out, C]`` FP32.
        bias: ``[C_out]`` FP32, or None. `takes` says which of these.

    Returns:
        ``[..., C_out]`` FP32, the same bits in every call. On a GPU one kernel makes it.
    """
    if not x.is_cuda:
        return naive.linear(x, weight, bias)
    from . import kernels

    return kernels.linear(x, weight, bias)


@functools.lru_cache(maxsize=64)
def _runs_on(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0) and triton_installed()


def _ieee() -> bool:
    """Whether torch multiplies FP32 matrices in FP32 on GPUs."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # since torch 2.9, where the other is not to be asked
    return not matmul.allow_tf32 if precision is None else precision in ("none", "ieee")
