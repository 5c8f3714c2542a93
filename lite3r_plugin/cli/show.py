"""What commands print: one console, tables of runs, sentences about what was done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from ..evaluation.run import Run
    from ..scene.prediction import DepthError

console = Console(highlight=False)
err_console = Console(stderr=True, highlight=False)


def progress() -> Progress:
    """A bar over the stages of a command, on standard error, gone when it is done."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"))
    return Progress(*columns, TimeElapsedColumn(), console=err_console, transient=True)


def say(text: str, style: str = "") -> None:
    """Print a sentence as it is, wrapped by the terminal."""
    console.print(text, style=style, markup=False, soft_wrap=True)


def error(text: str) -> None:
    """Print one red line ``error: ...`` on standard error."""
    err_console.print(f"error: {text}", style="bold red", markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """Print one yellow line ``warning: ...`` on standard error."""
    err_console.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)


def what_ran(run: Run) -> str | None:
    """A sentence where Lite3R's sites ran dense after all, else None."""
    if run.density != 1:
        return None
    return (
        "Every site ran dense: with so few tokens sparse attention does not pay, so the result is the dense model's. "
        "Use more views, or --dense-below 0 to see the sparse path anyway."
    )


def table_of_runs(title: str, runs: Mapping[str, Run], errors: Mapping[str, Mapping[str, DepthError]]) -> Table:
    """Time, density and memory of runs by name, and their depth errors by what they are compared with."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for header in ("time", "density", "peak memory", *(f"{what}\nmean / p95 / max" for what in errors)):
        table.add_column(header, justify="right", no_wrap=header == "time")
    for name, run in runs.items():
        row = [_seconds(run), "1 (dense)" if run.density is None else f"{run.density:.2f}", _bytes(run.peak_bytes)]
        row += [_error(column.get(name)) for column in errors.values()]
        table.add_row(name, *row)
    return table


def _seconds(run: Run) -> str:
    """The median, and where there are several runs the fastest and the slowest, which show how far to trust it."""
    unit, factor, digits = ("s", 1, 2) if run.seconds >= 1 else ("ms", 1e3, 0)
    median, low, high = (f"{t * factor:.{digits}f}" for t in (run.seconds, min(run.times), max(run.times)))
    return f"{median} {unit}" + (f"\n({low} to {high})" if len(run.times) > 1 else "")


def _bytes(n: int | None) -> str:
    return "not measured" if n is None else f"{n / 2**30:.2f} GiB"


def _error(e: DepthError | None) -> str:
    return "" if e is None else f"{e.mean:.2%} / {e.p95:.2%} / {e.maximum:.1%}"
