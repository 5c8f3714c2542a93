"""FP8 rows: quantise, and the operations that end in a quantisation, in one pass."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..dispatch import constant_in_graphs, triton_installed
from . import naive
from .naive import E4M3, E5M2, Quantized, dequantize, fake_quantize, quantize

__all__ = ["E4M3", "E5M2", "Quantized", "dequantize", "fake_quantize", "passes", "quantize", "why_no_kernels"]

MAX_WIDTH = 32768  # entries of a row that fit into the registers of one program


@constant_in_graphs
def why_no_kernels(device: torch.device) -> str | None:
    """The reason why the one-pass kernels do not run on `device`, or None when they do."""
    return _why_no_kernels(device)


@functools.lru_cache(maxsize=64)
def _why_no_kernels(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the tensors are on {device}, not on a CUDA GPU"
    if torch.cuda.get_device_capability(device) < (8, 9):
        return "the GPU is older than compute capability 8.9 and has no FP8"
    return None if triton_installed() else "triton is not installed"


def passes(x: Tensor) -> Any:
    """The module whose `quantize`, `layer_norm_quantize`, ... take x ``[..., C]``: `kernels` where they run, else `naive`.

    `kernels` take floating-point tensors but FP64, of at most `MAX_WIDTH` entries in a row, on a GPU with FP8 (sm89 on).
    """
    if not x.numel() or x.shape[-1] > MAX_WIDTH or x.dtype == torch.float64 or why_no_kernels(x.device) is not None:
        return naive
    from . import kernels

    return kernels
