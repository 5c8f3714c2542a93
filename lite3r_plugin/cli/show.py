"""What commands print: one console, tables of runs, sentences about what was done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..evaluation import Run
    from ..scene.export import Facts, Panel
    from ..scene.metrics import DepthMetrics
    from ..training.bar import Bar

NOTHING_SPARSE = "nothing sparse"

console = Console(highlight=False, emoji=False)
err_console = Console(stderr=True, highlight=False, emoji=False)


def progress() -> Bar:
    """A bar over the stages of a command, on standard error, gone when it is done; lines where that is no terminal."""
    from ..training.bar import Bar

    return Bar(err_console)


def say(text: str, style: str = "") -> None:
    """Print a sentence as it is, wrapped by the terminal."""
    console.print(text, style=style, markup=False, soft_wrap=True)


def listing(title: str, entries: Iterable[tuple[str, ...]]) -> None:
    """Print names and, beside each, a line about it and further lines in grey."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, about, *rest in entries:
        grid.add_row(Text(name, style="bold"), Text(about))
        for line in rest:
            grid.add_row("", Text(line, style="dim"))
    console.print(title, style="bold", markup=False)
    console.print(grid)
    console.print()


def error(text: str) -> None:
    """Print one red line ``error: ...`` on standard error."""
    err_console.print(f"error: {text}", style="bold red", markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """Print one yellow line ``warning: ...`` on standard error."""
    err_console.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)


def what_ran(density: float | None, model: nn.Module, device: torch.device) -> str | None:
    """A sentence where nothing was sparse in runs of a `model` with Lite3R, `density` in the mean; else None."""
    from ..apply.report import describe
    from ..evaluation import why_dense

    reason = why_dense(density, describe(model).config, device)
    return None if reason is None else f"Nothing was sparse: {reason}. Attention is the dense model's."


def labels(runs: Mapping[str, Run]) -> dict[str, Run]:
    """The runs by what they are called for people: nothing is called Lite3R in which nothing was sparse."""
    return {NOTHING_SPARSE if run.density == 1 else name: run for name, run in runs.items()}


def facts_of_runs(
    title: str, runs: Mapping[str, Run], errors: Mapping[str, Mapping[str, DepthMetrics | None]], notes: Iterable[str] = ()
) -> Facts:
    """Time, density and memory of runs by name, and their depth errors by what they are compared with."""
    from ..scene.export import Facts

    columns = ("", "time", "density", "peak memory", *(f"{what}\nmean / p95 / max" for what in errors))
    rows = []
    for (name, run), label in zip(runs.items(), labels(runs), strict=True):
        row = [label, _seconds(run), "1 (dense)" if run.density is None else f"{run.density:.2f}", _bytes(run.peak_bytes)]
        rows.append((*row, *(_error(column.get(name)) for column in errors.values())))
    return Facts(title, columns, tuple(rows), tuple(notes))


def table(facts: Facts) -> Table:
    """Facts for the terminal, without their notes."""
    found = Table(title=escape(facts.title), title_justify="left", title_style="bold")
    found.add_column("")
    for header in facts.columns[1:]:
        found.add_column(escape(header), justify="right", no_wrap=header == "time")
    for row in facts.rows:
        found.add_row(*map(escape, row))
    return found


def depth_error(predicted: Tensor, reference: Tensor, align: Literal["scene", "none"]) -> DepthMetrics | None:
    """`depth_metrics` of depth maps ``[S, H, W]``; None where they have no pixel to compare, as with random weights."""
    from ..errors import InputError
    from ..scene.metrics import depth_metrics

    try:
        return depth_metrics(predicted, reference, align=align)
    except InputError:
        return None


def panels(runs: Mapping[str, Run]) -> list[Panel]:
    """Rows of a picture: the views, each run's depth, and how two runs differ."""
    from ..scene.export import Panel

    first = next(iter(runs.values())).prediction
    rows = [Panel("views", first.images, "image")]
    named = labels(runs)
    rows += [Panel(f"depth, {name}", run.prediction.depth, "depth") for name, run in named.items()]
    if len(runs) == 2:
        before, after = (run.prediction.depth for run in runs.values())
        rows.append(Panel(f"difference of {' and '.join(named)}", (after - before).abs() / before, "error"))
    return rows


def _seconds(run: Run) -> str:
    """The median, and where there are several runs the fastest and the slowest, which show how far to trust it."""
    unit, factor, digits = ("s", 1, 2) if run.seconds >= 1 else ("ms", 1e3, 0)
    median, low, high = (f"{t * factor:.{digits}f}" for t in (run.seconds, min(run.times), max(run.times)))
    return f"{median} {unit}" + (f"\n({low} to {high})" if len(run.times) > 1 else "")


def _bytes(n: int | None) -> str:
    return "not measured" if n is None else f"{n / 2**30:.2f} GiB"


def _error(e: DepthMetrics | None) -> str:
    return "" if e is None else f"{e.abs_rel:.2%} / {e.abs_rel_p95:.2%} / {e.abs_rel_max:.1%}"
