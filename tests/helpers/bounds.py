"""Triton's interpreter with bounds: a kernel that reads or writes outside of its tensors fails, as on a GPU it may or may not."""

from __future__ import annotations

from typing import Any

import numpy as np


def keep_to_bounds() -> None:
    """Let every interpreted load and store look whether its pointers are inside of what the kernel was given."""
    from triton.runtime import interpreter

    arguments = interpreter.GridExecutor._init_args_hst
    builder: Any = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    inside: list[tuple[int, int]] = []  # of the kernel that runs: from, to
    running = [""]

    def to_host(kernel: Any, args: Any, kwargs: Any) -> Any:
        host_args, host_kwargs = arguments(kernel, args, kwargs)
        parts = [y for x in (*host_args, *host_kwargs.values()) for y in (x if isinstance(x, tuple) else (x,))]
        given = [getattr(x, "base", x) for x in parts]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in given if hasattr(x, "untyped_storage")}
        inside[:] = [(start, start + storage.nbytes()) for start, storage in storages.items()]
        running[0] = kernel.fn.__name__
        return host_args, host_kwargs

    def check(what: str, pointers: Any, mask: Any) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        wanted = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        allowed = np.zeros(wanted.shape, dtype=bool)
        for start, end in inside:
            allowed |= (wanted >= start) & (wanted + size <= end)
        if not allowed.all():
            raise IndexError(f"{running[0]} {what} outside of its tensors: {(~allowed).sum()} of {allowed.size} elements")

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        check("reads", pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        check("writes", pointers, mask)
        return store(self, pointers, value, mask, *rest, **named)

    interpreter.GridExecutor._init_args_hst = to_host
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
