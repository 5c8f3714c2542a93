"""Chooses between Triton kernels and torch operators for one call."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings

import torch
from torch import Tensor

from ..errors import BackendError

TRITON_HEAD_DIMS = (32, 64, 80, 96, 128)
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class SlowPathWarning(UserWarning):
    """Something that has a kernel ran in plain torch operators on a GPU."""


@functools.cache
def triton_installed() -> bool:
    """Whether the triton package is importable (it is not imported)."""
    return importlib.util.find_spec("triton") is not None


def why_not_triton(q: Tensor, needs_grad: bool = False) -> str | None:
    """The reason why the Triton kernels cannot take `q [..., D]`, or None when they can."""
    if not q.is_cuda:
        return f"the tensors are on {q.device}, not on a CUDA GPU"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if not triton_installed():
        return "triton is not installed"
    if q.dtype not in TRITON_DTYPES:
        return f"the dtype is {q.dtype}; they take {', '.join(str(d) for d in TRITON_DTYPES)}"
    if q.shape[-1] not in TRITON_HEAD_DIMS:
        return f"the head dimension is {q.shape[-1]}; they take {TRITON_HEAD_DIMS}"
    if q.dtype == torch.float32 and q.shape[-1] > 64:
        return f"FP32 tiles of head dimension {q.shape[-1]} do not fit into shared memory; they take FP32 up to 64"
    if needs_grad:
        return "a gradient is needed, and the kernels have no backward pass yet"
    return None


def use_triton(backend: str, q: Tensor, needs_grad: bool = False) -> bool:
    """Whether to run Triton for `q [..., D]`. Falling back on a GPU warns: plain torch operators are slow there.

    Raises:
        BackendError: `backend` is ``"triton"`` and the kernels cannot take these tensors.
    """
    if backend == "torch":
        return False
    reason = why_not_triton(q, needs_grad)
    if reason is None:
        return True
    if backend == "triton":
        raise BackendError(f'backend="triton" cannot run here: {reason}. Use backend="auto" or "torch".')
    if q.is_cuda and not torch.compiler.is_compiling():
        hint = "; run inference under torch.no_grad()" if needs_grad else ""
        warnings.warn(f"Lite3R runs plain torch operators on this GPU, which is slow: {reason}{hint}", SlowPathWarning, stacklevel=2)
    return False


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes x's GPU the current one: Triton launches on the current GPU, whatever its arguments are on."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
