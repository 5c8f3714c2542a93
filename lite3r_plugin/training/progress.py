"""What people see of a run: what is trained, what it will cost, how far it is."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..files import to_json, write_atomically

METRICS_NAME = "metrics.jsonl"


class Progress:
    """Lines and a bar on standard error. One that is not `shown` says nothing.

    Args:
        shown: Whether this is the process that speaks.
    """

    def __init__(self, shown: bool) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False, emoji=False, quiet=not shown)
        self._bar: Any = None
        self._task: Any = None

    def say(self, text: str, style: str = "") -> None:
        """Print a sentence."""
        self._console.print(text, style=style, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.say(f"warning: {text}", "yellow")

    @contextlib.contextmanager
    def bar(self) -> Iterator[None]:
        """Show a bar inside the context."""
        from .bar import Bar

        if self._console.quiet:
            yield
            return
        self._bar = Bar(self._console, percent=True)
        self._task = self._bar.add_task("distilling", total=1.0)
        try:
            with self._bar:
                yield
        finally:
            self._bar = None

    def update(self, share: float, text: str) -> None:
        """Move the bar to `share` of the run."""
        if self._bar is not None:
            self._bar.update(self._task, completed=share, description=f"distilling, {text}")


class Pace:
    """How long steps take. The first ones are not counted where there are others: kernels are compiled and measured in them.

    Attributes:
        steps: All that were timed.
    """

    WARM_STEPS = 2

    def __init__(self) -> None:
        self.steps = 0
        self._warm, self._rest = 0.0, 0.0

    def add(self, seconds: float) -> None:
        """Count one step."""
        self.steps += 1
        if self.steps <= self.WARM_STEPS:
            self._warm += seconds
        else:
            self._rest += seconds

    @property
    def known(self) -> bool:
        """Whether a step was counted that was not one of the first."""
        return self.steps > self.WARM_STEPS

    @property
    def seconds(self) -> float:
        """Of a step; NaN before the first."""
        if self.known:
            return self._rest / (self.steps - self.WARM_STEPS)
        return self._warm / self.steps if self.steps else float("nan")


class JsonLines:
    """A file of one JSON object a line, each written at once.

    Args:
        path: The file.
        step: The step that a run goes on from: later lines, which it will write again, are taken out.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if _step(line) <= step]
            write_atomically(path, "".join(f"{line}\n" for line in kept))

    def log(self, values: dict[str, Any]) -> None:
        """Append a line. Raises `CheckpointError`."""
        line = " ".join(to_json(values).split()) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be written: {error.strerror}; free space and pass resume=True") from error


def _step(line: str) -> float:
    """The step of a line; infinity where it is half a line, which a killed process left."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def start_peak(device: torch.device) -> None:
    """Start counting the peak memory of `device` anew, where it counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """The most memory in use on a GPU since `start_peak`, on a CPU by the process since its start; None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
