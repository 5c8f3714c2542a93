"""Exceptions at every line of the package: a call runs again and again, and each time it comes a little further before it fails."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lite3r_plugin
from lite3r_plugin.fp8.linear import Fp8Linear

PACKAGE = str(Path(lite3r_plugin.__file__).parent)
TABLES = tuple(vars(nn.Module()))


class Interruption(BaseException):
    """As KeyboardInterrupt: whoever catches `Exception` does not catch it."""


class Full(Exception):
    """There is no memory left."""


@contextlib.contextmanager
def full_after(count: int) -> Iterator[None]:
    """Inside, a conversion to FP8 fails by `Full` when it has made so many Linears."""
    real, made = Fp8Linear.quantized, 0

    def quantized(linear: nn.Linear, backend: Any) -> Fp8Linear:
        nonlocal made
        if made == count:
            raise Full
        made += 1
        return real(linear, backend)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fp8Linear, "quantized", quantized)
        yield


def lines_of(call: Callable[[], object], before: Callable[..., object] | None = None) -> int:
    """How many lines of the package `call` runs, or how many of them before it comes to the function `before`."""
    seen = 0
    found: int | None = None

    def count(frame: FrameType) -> None:
        nonlocal seen, found
        if before is not None and found is None and frame.f_code is before.__code__:
            found = seen
        seen += 1

    _traced(call, count)
    if before is None:
        return seen
    assert found is not None, f"{before} was not reached"
    return found


def interrupted(call: Callable[[], object], line: int, *more: int) -> bool:
    """Run `call` and raise `Interruption` before its `line`-th line of the package, and before those of `more`, which come after.

    Returns whether an interruption left the call. Any other exception passes.
    """
    seen, wanted = 0, {line, *more}

    def count(frame: FrameType) -> None:
        nonlocal seen
        seen += 1
        if seen in wanted:
            raise Interruption(f"before line {seen}")

    try:
        _traced(call, count)
    except Interruption:
        return True
    return False


def say(what: str, seen: Counter[str]) -> None:
    """Print what became of the models of a test, for ``pytest -s``."""
    sys.stdout.write(f"{what}: {seen.total()} lines, {dict(seen)}\n")


def contents(model: nn.Module) -> dict[str, Any]:
    """Everything that a verb may touch, to be compared: modules, tensors and their values, what learns, hooks, training flags."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules(remove_duplicate=False)},
        "tables": {name: {table: _plain(vars(module)[table]) for table in TABLES} for name, module in model.named_modules()},
        "learns": {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)},
        "keys": list(model.state_dict()),
        "values": {name: _bytes(t) for pairs in (model.named_parameters(), model.named_buffers()) for name, t in pairs},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return [(key, id(entry)) for key, entry in value.items()]
    return sorted(value) if isinstance(value, set) else value


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _traced(call: Callable[[], object], each: Callable[[FrameType], None]) -> None:
    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            each(frame)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
