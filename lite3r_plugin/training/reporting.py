"""Progress of a function that a library calls: a bar, lines in a log, or whatever the caller makes of it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Listener = Callable[[str, int, int | None], object]
"""Is told what is done, how often it was done, and how often it will be, None where that is not known."""


class Report:
    """Tells a listener how far stages came, one after another."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._what, self._done, self._total = "", 0, None

    def start(self, what: str, total: int | None) -> None:
        """A new stage, of `total` steps if that is known."""
        self._what, self._done, self._total = what, 0, total
        self._listener(what, 0, total)

    def advance(self) -> None:
        """A step is done."""
        self._done += 1
        self._listener(self._what, self._done, self._total)

    def over(self, items: Iterable[Any], what: str) -> Iterator[Any]:
        """A stage of a step for each of `items`."""
        self.start(what, len(items) if hasattr(items, "__len__") else None)  # pyright: ignore[reportArgumentType]
        for item in items:
            yield item
            self.advance()


@contextlib.contextmanager
def reporting(progress: bool | Listener) -> Iterator[Report]:
    """A report to `progress`, if that is a function; if it is true, to a bar or lines on standard error; else to nobody."""
    if callable(progress):
        yield Report(progress)
        return
    if progress:
        from rich.console import Console

        from .bar import Bar

        with Bar(Console(stderr=True, highlight=False, emoji=False)) as bar:
            yield Report(functools.partial(bar.stage, bar.add_task("calibrating", total=None)))
        return
    yield Report(lambda what, done, total: None)
