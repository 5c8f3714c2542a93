"""Chooses between Triton kernels and torch operators for one call; registers operators for compilers."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError, ConfigError, WeightsError

TRITON_HEAD_DIMS = (32, 64, 80, 96, 128)
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class SlowPathWarning(UserWarning):
    """Something that has a kernel ran in plain torch operators on a GPU."""


def constant_in_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compiler.assume_constant_result`, which would import the whole compiler: traced calls run, and are constants."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
def triton_installed() -> bool:
    """Whether the triton package is importable (it is not imported)."""
    return importlib.util.find_spec("triton") is not None


def why_not_triton(q: Tensor, needs_grad: bool = False) -> str | None:
    """The reason why the Triton kernels cannot take `q [..., D]`, or None when they can."""
    return _why_not(q.device, q.dtype, int(q.shape[-1]), needs_grad)


@constant_in_graphs
def _why_not(device: torch.device, dtype: torch.dtype, dim: int, needs_grad: bool) -> str | None:
    return _why_not_cached(device, dtype, dim, needs_grad)


@functools.lru_cache(maxsize=256)
def _why_not_cached(device: torch.device, dtype: torch.dtype, dim: int, needs_grad: bool) -> str | None:
    if device.type != "cuda":
        return f"the tensors are on {device}, not on a CUDA GPU"
    return why_not_on(torch.cuda.get_device_capability(device), dtype, dim, needs_grad)


def why_not_on(capability: tuple[int, int], dtype: torch.dtype, dim: int, needs_grad: bool) -> str | None:
    """The reason why the Triton kernels cannot run on a GPU of that compute capability, or None when they can."""
    if capability < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if not triton_installed():
        return "triton is not installed"
    if dtype not in TRITON_DTYPES:
        return f"the dtype is {dtype}; they take {', '.join(str(d) for d in TRITON_DTYPES)}"
    if dim not in TRITON_HEAD_DIMS:
        return f"the head dimension is {dim}; they take {TRITON_HEAD_DIMS}"
    if shared_kib(dtype, dim, needs_grad) > SHARED_KIB.get(capability, 99):
        what = "gradients need more" if needs_grad else "they need more"
        return f"{what} shared memory for {dtype} and head dimension {dim} than this GPU has"
    return None


SHARED_KIB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 1): 227, (10, 3): 227}  # of a block; else 99


def shared_kib(dtype: torch.dtype, dim: int, needs_grad: bool) -> int:
    """KiB of shared memory that the largest kernel takes, rounded up, of a block; GPUs of 227 KiB may take more.

    `tests/ops/sla/test_aot.py` checks it.
    """
    if dtype == torch.float32:
        forward, backward = (128, 192) if dim <= 64 else (160, 640)
    else:
        forward, backward = 97, 97 if dim <= 64 else 137
    return backward if needs_grad else forward


def has_tma(device: torch.device) -> bool:
    """Whether the GPU copies tiles to shared memory by itself (TMA) as Triton's tensor descriptors ask it to: Hopper."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def use_triton(backend: str, q: Tensor, needs_grad: bool = False) -> bool:
    """Whether to run Triton for `q [..., D]`. Falling back on a GPU warns: plain torch operators are slow there.

    Raises:
        BackendError: `backend` is ``"triton"`` and the kernels cannot take these tensors.
    """
    if backend == "naive":
        return False
    reason = why_not_triton(q, needs_grad)
    if reason is None:
        return True
    if backend == "triton":
        raise BackendError(f'the "triton" backend of attention cannot run here: {reason}. Use "auto" or "naive".')
    if q.is_cuda and not torch.compiler.is_compiling():
        warnings.warn(f"Lite3R runs plain torch operators on this GPU, which is slow: {reason}", SlowPathWarning, stacklevel=2)
    return False


def require_one_device(v: Tensor, **others: Tensor | None) -> None:
    """Raise unless all tensors are where `v` is: a tensor without values would make others of its kind, a kernel would read elsewhere.

    Raises:
        WeightsError: one of `others` is on the meta device, or `v` alone is.
        ConfigError: one is on another device.
    """
    for name, x in others.items():
        if x is None or x.device == v.device:
            continue
        if x.is_meta or v.is_meta:
            raise WeightsError(
                f"{name} is on {x.device} and the values on {v.device}: tensors on the meta device have none. Load weights first; hooks "
                "that bring them in for the call of a block as a whole (CPU offload) come after apply_lite3r"
            )
        raise ConfigError(f"{name} is on {x.device} and the values on {v.device}: move the model as a whole, or the tensor")


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes x's GPU the current one: Triton launches on the current GPU, whatever its arguments are on. Compilers see to it themselves."""
    if torch.compiler.is_compiling() or not x.is_cuda or torch.cuda.current_device() == x.device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


@contextlib.contextmanager
def side_stream(device: torch.device, pays: bool = True) -> Iterator[contextlib.AbstractContextManager[object]]:
    """Yields a context whose launches run on a side stream: beside those of the rest of the block, before them where both want the GPU.

    What follows the block waits for both. Memory that is allocated in the context must not be used outside it: it belongs to
    another stream. On a CPU, and where it does not pay, all runs in turn.
    """
    if device.type != "cuda" or not pays:
        yield contextlib.nullcontext()
        return
    current = torch.cuda.current_stream(device)
    side = _side_stream_of(device, current.stream_id)
    side.wait_stream(current)
    try:
        yield torch.cuda.stream(side)
    finally:  # also after an error: memory that is then freed must not be written to any more
        current.wait_stream(side)


@functools.cache
def _side_stream_of(device: torch.device, current: int) -> torch.cuda.Stream:
    """One for each current stream, of which one may be captured by a CUDA graph while another is not."""
    return torch.cuda.Stream(device, priority=-1)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Keeps autocast for x's device from what is inside, which chooses its precision itself."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):  # which knows no meta device
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def under_trace() -> bool:
    """Whether something looks at the operators that run: a compiler, or a dispatch mode (tensors without data, what memory is held).

    The launch of a kernel would be hidden from it, and cannot be given tensors without data: registered operators run instead.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def register(name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define the operator ``lite3r::name`` of `torch.library`, which compilers keep as it is, and return it; for what is `under_trace`.

    Args:
        name, schema: Its name, its arguments and results.
        function: What runs, on any device. Its results share no memory with its arguments.
        fake: Empty tensors like the results, from tensors without data.
    """
    torch.library.define(f"lite3r::{name}", schema)
    torch.library.impl(f"lite3r::{name}", ("cpu", "cuda"))(function)
    torch.library.register_fake(f"lite3r::{name}")(fake)
    return getattr(torch.ops.lite3r, name).default
