"""How far a long call is: a bar with the time to go on a terminal, and where nobody watches, such as in a log, a line now and then."""

from __future__ import annotations

import threading
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .units import duration

EVERY_S = 30.0  # between two lines
ESTIMATE_S = 900.0  # what the time to go is estimated from


class Bar(Progress):
    """A bar on standard error, gone when it is done; on no terminal a line each `EVERY_S` seconds.

    Args:
        console: Where to.
        percent: Tell how far in percent instead of steps.
    """

    def __init__(self, console: Console, percent: bool = False) -> None:
        done = "{task.percentage:.0f} %" if percent else "{task.completed:.0f}/{task.total:.0f}"
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), _Done(done), TimeElapsedColumn())
        super().__init__(*columns, TimeRemainingColumn(), console=console, transient=True, speed_estimate_period=ESTIMATE_S)
        self._percent = percent
        self._ended: threading.Event | None = None

    def start(self) -> None:
        """Show the bar, or start to print lines."""
        if self.console.is_terminal:
            super().start()
        elif not self.console.quiet and self._ended is None:
            self._ended = threading.Event()
            threading.Thread(target=self._lines, args=(self._ended,), daemon=True).start()

    def stop(self) -> None:
        """Take the bar away, or print no more."""
        if self._ended is not None:
            self._ended.set()
            self._ended = None
        if self.console.is_terminal:
            super().stop()

    def stage(self, task: TaskID, what: str, done: int, total: int | None) -> None:
        """As a `reporting.Listener`: `done` steps of `total` of `what`. The time to go is that of the stage."""
        if done == 0:
            self.reset(task, description=what)
        next(each for each in self.tasks if each.id == task).total = total  # for `update` None is to leave it as it is
        self.update(task, description=what, completed=done)

    def _lines(self, ended: threading.Event) -> None:
        while not ended.wait(EVERY_S):
            for task in self.tasks:
                self.console.print(self._line(task), markup=False, soft_wrap=True)

    def _line(self, task: Task) -> str:
        parts = [task.description] if task.description else []
        if task.completed:
            end = f" of {task.total:.0f}" if task.total else " done"
            parts.append(f"{task.percentage:.0f} %" if self._percent else f"{task.completed:.0f}{end}")
        if task.elapsed is not None:
            parts.append(f"{duration(round(task.elapsed))} so far")
        if task.time_remaining:
            parts.append(f"about {duration(task.time_remaining)} to go")
        return ", ".join(parts)


class _Done(TextColumn):
    """What is done alone where the end is not known."""

    def render(self, task: Task) -> Any:
        """The text."""
        return super().render(task) if task.total is not None else f"{task.completed:.0f}" if task.completed else ""
