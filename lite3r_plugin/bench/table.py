"""The report as a table for people."""

from __future__ import annotations

from rich.table import Table

from .records import BASELINES, BenchReport, Cell

FP8 = "in FP8"  # how `describe` begins what runs a Linear in FP8


def table(report: BenchReport) -> Table:
    """One row per cell, with its speed against stock and against the strong dense baselines."""
    conditions = report.conditions
    title = (
        f"{conditions['model']} at {conditions['resolution']} px on {conditions['device']}, torch {conditions['torch']}, "
        f"triton {conditions['triton']}"
    )
    result = Table(title=title, caption="Random weights: the depth error is numerical fidelity to stock, not quality.")
    result.add_column("views", justify="right")
    result.add_column("variant")
    result.add_column("run as")
    for name in (
        "ms",
        "min-max",
        *(f"x {name}" for name in BASELINES),
        "weights GiB",
        "peak GiB",
        "x memory of stock",
        "density",
        "depth error",
    ):
        result.add_column(name, justify="right")
    for cell in sorted(report.cells, key=lambda cell: cell.views):
        result.add_row(str(cell.views), cell.variant, *_numbers(report, cell))
    return result


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
        _number(memory),
        _number(cell.density),
        "" if depth is None else f"{depth:.1e}",
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
