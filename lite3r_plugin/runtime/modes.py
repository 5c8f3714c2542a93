"""Who sees the operators that run: modes of torch, tracers and function transforms."""

from __future__ import annotations

import functools

import torch
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad


def functions_are_seen() -> bool:
    """Whether a mode sees the functions of torch, other than that of a default device."""
    if not torch._C._len_torch_function_stack():
        return False
    from torch.overrides import _get_current_function_mode_stack

    return any(not isinstance(mode, _device_context()) for mode in _get_current_function_mode_stack())


def operators_are_seen() -> bool:
    """Whether somebody records or transforms the operators that run, and would miss what no operator of torch does."""
    return bool(torch._C._len_torch_dispatch_stack() or functions_are_seen() or operators_are_transformed())


def operators_are_transformed() -> bool:
    """Whether another function is made of what runs: by `torch.func`, by forward-mode derivatives, by `torch.jit.trace`."""
    return bool(peek_interpreter_stack() is not None or forward_ad._current_level >= 0 or torch._C._is_tracing())


@functools.cache
def _device_context() -> type:
    from torch.utils._device import DeviceContext

    return DeviceContext
