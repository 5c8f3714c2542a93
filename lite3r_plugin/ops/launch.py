"""Launches of Triton kernels that cost less Python from the second on.

At each launch Triton looks at every argument and writes down a key, by which it finds the compiled form: 17 us of Python for 7 arguments
beside an H200, where many of our kernels run for less. A form that was found before is launched in 10, and looked up in 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

_forms: dict[tuple[Any, ...], tuple[Any, CompiledKernel, tuple[Any, ...]]] = {}
MOST_FORMS = 4096  # then all are looked up anew: sizes may differ at every call


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)`` on the GPU of the first argument.

    What Triton compiles a form for follows from what the form is remembered by: dtypes and alignment of tensors, values of integers and
    constants, the GPU. Kernels that are interpreted, and calls with other kinds of arguments (tensor descriptors), are left to Triton.

    Args:
        kernel: What `triton.jit` made, of a module. Its constants come last and have no defaults.
        grid: Programs in one to three dimensions.
        *args: What the kernel takes at run time, all of it: a tensor first, tensors, integers, floats and None.
        **constants: Its constants, and Triton's options such as ``num_warps``.
    """
    device = args[0].get_device()
    if device >= 0 and device != torch.cuda.current_device():  # Triton launches on the current GPU, whatever its arguments are on
        with torch.cuda.device(device):
            return launch(kernel, grid, *args, **constants)
    traits = [x if x.__class__ is int else (x.dtype, x.data_ptr() & 15) if isinstance(x, Tensor) else _trait(x) for x in args]
    key = (id(kernel), device, *traits, *constants.items())
    found = _forms.get(key)
    if found is not None:
        _, compiled, last = found
        compiled[grid if len(grid) == 3 else (*grid, 1, 1)[:3]](*args, *last)
        return None
    compiled = kernel[grid](*args, **constants)
    if isinstance(compiled, CompiledKernel) and None not in traits and torch.version.hip is None:
        if len(_forms) >= MOST_FORMS:
            _forms.clear()
        _forms[key] = kernel, compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])
    return None


def _trait(x: Any) -> Any:
    """What Triton compiles for, which is no value of a float; None: unknown."""
    return type(x) if x is None or isinstance(x, float) else None
