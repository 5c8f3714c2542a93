"""A Linear in FP32 on few rows, bound by reading its weight, which may be stored in BF16 or FP16.

`naive` is the definition, `kernels` its Triton twin for the fewest rows, `parts` its twin for more rows and a weight in BF16. It has no
gradients.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..dispatch import constant_in_graphs, register, triton_installed
from . import naive, parts

__all__ = ["MAX_ROWS", "MAX_ROWS_NARROW", "fits", "is_narrow", "linear", "linear_in_compiled", "linear_operator", "parts", "takes"]

MAX_ROWS = 8
"""Of a weight in FP32: what a kernel multiplies by it in one reading."""

MAX_ROWS_NARROW = 16
"""Of one in FP16: two readings are as many bytes as one of FP32, where torch's product needs a copy, and thus five times as many."""


def is_narrow(x: Tensor, weight: Tensor) -> bool:
    """Whether `weight` is stored in BF16 or FP16, and `x`, in FP32 (or FP64), is to be multiplied by it in its own dtype."""
    return weight.dtype in (torch.bfloat16, torch.float16) and x.dtype in (torch.float32, torch.float64)


def fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these are FP32, but for a `weight` that may be narrow, on a CPU or a GPU, with no gradients wanted; of any number of rows.

    Where autocast chooses the dtype they do not.
    """
    tensors = (x, weight) if bias is None else (x, weight, bias)
    device = x.device
    return (
        device.type in ("cpu", "cuda")
        and weight.dim() == 2
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1]
        and all(t.dtype == torch.float32 or (t is weight and is_narrow(x, t)) for t in tensors)
        and all(t.device == device for t in tensors)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and not torch.is_autocast_enabled(device.type)
    )


def takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear` is for these: what `fits`, of few rows or with a weight in BF16, on a CPU or on a GPU on which it runs.

    It is not for a weight in FP32 where the user lets GPUs round what they multiply in FP32 (TF32). Of a narrow one torch's product needs a
    copy, which costs more than that saves.
    """
    if not fits(x, weight, bias) or not x.numel() or (x.is_cuda and not _runs_on(x.device)):
        return False
    if weight.dtype == torch.bfloat16:
        return True
    narrow = is_narrow(x, weight)
    few = x.numel() <= (MAX_ROWS_NARROW if narrow else MAX_ROWS) * weight.shape[1]
    return few and (narrow or not x.is_cuda or _ieee())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x weight^T + bias``; `naive.linear` is the definition.

    Args:
        x: ``[..., C]`` FP32.
        weight: ``[C_out, C]`` FP32, BF16 or FP16.
        bias: ``[C_out]`` FP32, or None. `takes` says which of these.

    Returns:
        ``[..., C_out]`` FP32, the same bits in every call. On a GPU one kernel makes it; of more than `MAX_ROWS` by a weight in BF16 it is
        made `in parts <parts.linear>`.
    """
    if not x.is_cuda:
        return naive.linear(x, weight, bias)
    if weight.dtype == torch.bfloat16 and x.numel() > MAX_ROWS * weight.shape[1]:
        return parts.linear(x, weight, bias)
    from . import kernels

    return kernels.linear(x, weight, bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(x, weight, bias) if takes(x, weight, bias) else naive.linear(x, weight, bias)


linear_operator = register(
    "skinny_linear",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _linear,
    lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
)
"""What `fits` for compiled code, in which the rows are not known: `linear` where it `takes` them, else the definition."""


def linear_in_compiled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` of a narrow weight that `fits`, for code that is compiled, which does not know how many rows there are."""
    in_parts = x.is_cuda and weight.dtype == torch.bfloat16 and _runs_on(x.device)
    return parts.linear(x, weight, bias) if in_parts else linear_operator(x, weight, bias)


@constant_in_graphs
def _runs_on(device: torch.device) -> bool:
    return _runs_on_cached(device)


@functools.lru_cache(maxsize=64)
def _runs_on_cached(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0) and triton_installed()


def _ieee() -> bool:
    """Whether torch multiplies FP32 matrices in FP32 on GPUs."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # since torch 2.9, where the other is not to be asked
    return not matmul.allow_tf32 if precision is None else precision in ("none", "ieee")
