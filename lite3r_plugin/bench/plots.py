"""Time and memory over the number of views, from what `lite3r bench` stored. Both axes are logarithmic."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GIB = 2**30
# Of Okabe and Ito, told apart by colour-blind readers; the marker changes with it, for print.
COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A", "#7F7F7F")
MARKERS = "osD^vP*Xh"


def time_over_views(report: Mapping[str, Any]) -> Figure:
    """Median milliseconds of a forward over views, a line for each variant; bars reach from the fastest run to the slowest.

    Args:
        report: What `BenchReport.to_dict` gives, or the JSON file holds (`records.read_report`).

    Returns:
        A figure that belongs to no window; `figure.savefig` takes it from there. A variant that did not run at some number of views,
        or at none, is in the legend with the reason.

    Raises:
        InputError: no cell has a time.
    """
    figure, axes = _figure(report, "ms per forward")
    for label, style, cells in _lines(report, lambda cell: _won(cell).get("median_ms")):
        times = [_won(cell) for cell in cells]
        middle = [won["median_ms"] for won in times]
        spread = [
            [m - won["min_ms"] for m, won in zip(middle, times, strict=True)],
            [won["max_ms"] - m for m, won in zip(middle, times, strict=True)],
        ]
        axes.errorbar([cell["views"] for cell in cells], middle, yerr=spread, label=label, capsize=2, **style)
    return _finished(figure, axes, report, "time")


def memory_over_views(report: Mapping[str, Any]) -> Figure:
    """Most memory during a forward over views in GiB, weights included: allocated as lines, reserved by the allocator dotted.

    Args, returns: as of `time_over_views`.

    Raises:
        InputError: no cell has a peak, as on a CPU.
    """
    figure, axes = _figure(report, "peak GiB (dotted: reserved)")
    for label, style, cells in _lines(report, lambda cell: _won(cell).get("peak_bytes")):
        axes.plot([cell["views"] for cell in cells], [_won(cell)["peak_bytes"] / GIB for cell in cells], label=label, **style)
        held = [cell for cell in cells if _won(cell).get("reserved_bytes")]
        reserved = [_won(cell)["reserved_bytes"] / GIB for cell in held]
        axes.plot([cell["views"] for cell in held], reserved, **style | {"marker": "", "linestyle": ":", "linewidth": 1.0})
    return _finished(figure, axes, report, "memory")


def save_figure(figure: Figure, path: Path, dpi: float | None = None) -> None:
    """Write a figure in one step, as its suffix says (``.png``, ``.svg``, ``.pdf``), at `dpi` or its own. Raises `InputError` where that
    fails."""
    buffer = io.BytesIO()
    kind = path.suffix.removeprefix(".").lower()
    if kind not in figure.canvas.get_supported_filetypes():
        raise InputError(f"{path} is no kind of picture; name a file that ends in .png, .svg or .pdf")
    figure.savefig(buffer, format=kind, dpi=dpi or "figure")
    write_atomically(path, buffer.getvalue())


def _figure(report: Mapping[str, Any], quantity: str) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("views")
    axes.set_ylabel(quantity)
    axes.grid(alpha=0.35)
    conditions = report["conditions"]
    axes.set_title(f"{conditions['model']} at {conditions['resolution']} px on {conditions['device']}", fontsize=10, loc="left")
    return figure, axes


def _lines(
    report: Mapping[str, Any], value: Callable[[Mapping[str, Any]], float | None]
) -> list[tuple[str, dict[str, Any], list[Mapping[str, Any]]]]:
    """The variants in their order: label, style, and the cells that have the value by views. One without any has an empty list."""
    variants = list(dict.fromkeys(cell["variant"] for cell in report["cells"]))
    looks = itertools.cycle(zip(COLORS, MARKERS, strict=True))
    found = []
    for name, (color, marker) in zip(variants, looks, strict=False):
        cells = sorted((cell for cell in report["cells"] if cell["variant"] == name), key=lambda cell: cell["views"])
        missing = [cell for cell in cells if not value(cell)]
        label = f"{name} ({_why(missing[0])} at {', '.join(str(cell['views']) for cell in missing)})" if missing else name
        style = {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.6}
        found.append((label, style, [cell for cell in cells if value(cell)]))
    return found


def _why(cell: Mapping[str, Any]) -> str:
    return {"ok": "not measured", "oom": "out of memory"}.get(cell["status"], str(cell["status"]))


def _won(cell: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fastest candidate of a cell; empty where none ran."""
    return {} if cell["best"] is None else cell["candidates"][cell["best"]]


def _finished(figure: Figure, axes: Axes, report: Mapping[str, Any], quantity: str) -> Figure:
    from matplotlib.ticker import LogLocator

    shown = {views for line in axes.lines for views in map(float, line.get_xdata())}  # pyright: ignore[reportArgumentType]
    if not shown:
        raise InputError(f"the report has no {quantity} of any cell, so there is nothing to draw")
    views = sorted({cell["views"] for cell in report["cells"]})
    axes.set_xticks(views, [str(number) for number in views])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda number, _: f"{number:g}")
    axes.legend(fontsize=7.5, frameon=False)
    return figure
