"""Values that are made from a tensor once and again only when it changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class TensorCache(Generic[T]):
    """Remembers what was made from a tensor. Copies and pickles of it remember nothing.

    A change is told by the tensor's identity, place, dtype and version counter. Writing through ``tensor.data`` counts
    no version, nor do fused optimisers: see `forget`.
    """

    def __init__(self) -> None:
        self._last: tuple[tuple[Any, ...], T] | None = None

    def get(self, source: Tensor, make: Callable[[], T]) -> T:
        """What `make` gives, which depends on `source` alone."""
        if torch.compiler.is_compiling() or source.is_inference():  # no version counter to go by
            return make()
        state = (id(source), source.data_ptr(), source._version, source.dtype, source.device)
        last = self._last  # read once: another thread may replace it
        if last is None or last[0] != state:
            last = self._last = (state, make())
        return last[1]

    def forget(self) -> None:
        """Make it anew next time."""
        self._last = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_last": None}
