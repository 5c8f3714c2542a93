"""Changes of a model that are all made or none."""

from __future__ import annotations

import functools
from collections.abc import Callable, MutableMapping
from types import TracebackType
from typing import Any


class Changes:
    """Changes of a model that belong together: an error or an interruption inside the context takes all of them back.

    What can fail is to be made before, so that only small steps are left to do inside. How a change is undone is written down
    before it is made, lest an interruption come in between; so undoing one that was not made must do no harm.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> Changes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            return
        try:
            self.undo()
        finally:
            self.undo()  # the rest, where a second interruption came

    def undo(self) -> None:
        """Take all changes back, the last one first."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    def make(self, do: Callable[[], object], undo: Callable[[], object]) -> None:
        """Make a change by calling `do`, which `undo` takes back."""
        self._undo.append(undo)
        do()

    def put(self, table: MutableMapping[str, Any], key: str, value: Any) -> None:
        """``table[key] = value``."""
        undo = functools.partial(table.__setitem__, key, table[key]) if key in table else functools.partial(table.pop, key, None)
        self.make(functools.partial(table.__setitem__, key, value), undo)

    def drop(self, table: MutableMapping[str, Any], key: str) -> None:
        """``del table[key]``, if it is there."""
        if key in table:
            self.make(functools.partial(table.pop, key, None), functools.partial(table.__setitem__, key, table[key]))
