"""The report as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from .records import BASELINES, BenchReport, Cell

COLUMNS = (
    "views", "variant", "run as", "ms", "min-max", *(f"x {name}" for name in BASELINES), "weights GiB", "peak GiB", "reserved GiB",
    "x memory of stock", "density", "depth error",
)  # fmt: skip
CAPTION = "Random weights: the depth error is numerical fidelity to stock, or to the peer's own dense model, not quality."
FP8 = "in FP8"  # how `describe` begins what runs a Linear in FP8


def table(report: BenchReport) -> Table:
    """One row per cell, with its speed against stock and against the strong dense baselines."""
    conditions = report.conditions
    title = (
        f"{conditions['model']} at {conditions['resolution']} px on {conditions['device']}, torch {conditions['torch']}, "
        f"triton {conditions['triton']}"
    )
    result = Table(title=escape(title), caption=CAPTION)
    for i, name in enumerate(COLUMNS):
        result.add_column(name, justify="left" if i in (1, 2) else "right", no_wrap=name == "variant")
    for cell in sorted(report.cells, key=lambda cell: cell.views):
        result.add_row(*map(escape, (str(cell.views), cell.variant, *_numbers(report, cell))))
    return result


def markdown(report: BenchReport) -> str:
    """The same as a page of Markdown, with the line of each variant and all conditions."""
    conditions = report.conditions
    lines = [f"# {conditions['model']} at {conditions['resolution']} px on {conditions['device']}", "", CAPTION, ""]
    lines += [_row(COLUMNS), _row([":---" if i in (1, 2) else "---:" for i in range(len(COLUMNS))])]
    for cell in sorted(report.cells, key=lambda cell: cell.views):
        numbers = [str(cell.views), cell.variant, *_numbers(report, cell)]
        lines.append(_row([*numbers, *[""] * (len(COLUMNS) - len(numbers))]))
    lines += ["", "| variant | what it is | line |", "|---|---|---|"]
    typed = {cell.variant: cell.line for cell in report.cells}
    for name, summary in conditions["variants"].items():
        lines.append(_row([name, summary, f"`{typed[name]}`" if typed.get(name) else ""]))
    lines += ["", *(f"- {name}: {value}" for name, value in conditions.items() if name != "variants"), ""]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _numbers(report: BenchReport, cell: Cell) -> list[str]:
    won = cell.winner
    if won is None or won.median_ms is None:
        return [f"{cell.status}: {cell.error}"[:100]]
    stock = report.find("stock", cell.views)
    memory = None
    if stock is not None and stock.winner is not None and stock.winner.peak_bytes and won.peak_bytes:
        memory = stock.winner.peak_bytes / won.peak_bytes
    depth = next((value for name, value in cell.fidelity.items() if name in ("depth_rel_l2", "output_rel_l2")), None)
    return [
        ", ".join([cell.best or "", *(kind for kind in cell.linears if kind.startswith(FP8))]),
        f"{won.median_ms:.1f}",
        f"{won.min_ms:.1f}-{won.max_ms:.1f}",
        *(_number(report.speedup(cell, name)) for name in BASELINES),
        _number(sum(cell.weight_bytes.values()) / 2**30),
        _number(won.peak_bytes and won.peak_bytes / 2**30),
        _number(won.reserved_bytes and won.reserved_bytes / 2**30),
        _number(memory),
        _number(cell.density),
        "" if depth is None else f"{depth:.1e}",
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
