"""Plots of benchmarks: time and memory over the number of views, from what `lite3r bench` stored, and quality lost over time gained."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..files import write_atomically
from ..scene.metrics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GIB = 2**30
# Of Okabe and Ito, told apart by colour-blind readers; the marker changes with it, for print.
COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A", "#7F7F7F")
MARKERS = "osD^vP*Xh"


@dataclasses.dataclass(frozen=True)
class Tradeoff:
    """What a way to run a model loses and gains, beside the dense model.

    Attributes:
        series: Of which way it is; points of one series are joined.
        views: The number of views of both measurements.
        keep_ratio: Of both measurements.
        gain: How many times faster than dense.
        lost: What is lost, with its interval, by the label of its axis; below zero it is won. All points have the same measures.
        precision: In which quality was measured, such as ``"FP8"``.
    """

    series: str
    views: int
    keep_ratio: float
    gain: float
    lost: Mapping[str, Interval]
    precision: str


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


def quality_over_gain(points: Sequence[Tradeoff], series: Sequence[str], dense: str, timed_in: str, title: str) -> Figure:
    """Quality lost over time gained: a row of panels a measure, a column a number of views. Up and to the right is better.

    Args:
        points: What is drawn, with the intervals of what is lost. Points at one gain stand side by side, lest bars hide each other.
        series: All series in their order, which decides their looks. One without points is not in the legend.
        dense: What gains are over; it is the black point that gains and loses nothing.
        timed_in: The precision that gains were measured in. Points whose quality was measured in another one are hollow.
        title: One line.

    Returns:
        A figure that belongs to no window.

    Raises:
        InputError: there is no point, or a point of an unknown series.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not points:
        raise InputError("there is no point to draw")
    if unknown := {point.series for point in points}.difference(series):
        raise InputError(f"{', '.join(sorted(unknown))} is none of the series {', '.join(series)}")
    columns, measures = sorted({point.views for point in points}), list(points[0].lost)
    figure = Figure(figsize=(max(7.4, 2 + 2.8 * len(columns)), 1.2 + 2.3 * len(measures)), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(measures), len(columns), sharex=True, sharey="row", squeeze=False)
    shown = [name for name in series if any(point.series == name for point in points)]
    widest = max(point.gain for point in points) - 1
    for row, measure in zip(panels, measures, strict=True):
        for axes, views in zip(row, columns, strict=True):
            here = [point for point in points if point.views == views]
            axes.axhline(0, color="0.6", linewidth=1, linestyle="--")
            axes.plot([1], [0], "o", color=COLORS[0])
            axes.annotate(dense, (1, 0), (6, 5), textcoords="offset points", fontsize=8)
            for name in shown:
                _bars(figure, axes, [point for point in here if point.series == name], measure, series.index(name), len(series), timed_in)
            marks = sorted({(point.gain, point.keep_ratio) for point in here})
            for (before, _), (gain, ratio), (after, _) in zip([(-math.inf, 0), *marks], marks, [*marks[1:], (math.inf, 0)], strict=False):
                axes.axvline(gain, color="0.85", linewidth=0.8, zorder=0)
                at, box = ("data", "axes fraction"), {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
                side = "right" if after - gain < 0.1 * widest else "left" if gain - before < 0.1 * widest else "center"
                axes.annotate(f"{ratio:g}", (gain, 0.02), xycoords=at, fontsize=7, ha=side, bbox=box)
            axes.annotate("keep_ratio", (0.02, 0.02), xycoords="axes fraction", fontsize=7)
            axes.grid(axis="y", alpha=0.35)
        row[0].set_ylabel(measure)
        reach = [value for point in points for value in _reach(point.lost[measure])]
        margin = 0.12 * (max(*reach, 0) - min(*reach, 0) or 1)
        row[0].set_ylim(max(*reach, 0) + margin, min(*reach, 0) - margin)  # losses go down
    for axes, views in zip(panels[0], columns, strict=True):
        axes.set_title(f"{views} views", fontsize=9)
        axes.annotate("better ↗", (0.98, 0.97), xycoords="axes fraction", fontsize=8, color="0.4", ha="right", va="top")
    for axes in panels[-1]:
        axes.set_xlabel(f"times faster than {dense}")
    panels[0, 0].set_xlim(0.9, 1 + 1.12 * widest + 0.05)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    _legend(figure, shown, series, sorted({point.precision for point in points}), timed_in)
    return figure


def save_figure(figure: Figure, path: Path, dpi: float | None = None, description: str | None = None) -> None:
    """Write a figure in one step, as its suffix says (``.png``, ``.svg``, ``.pdf``), at `dpi` or its own.

    Args:
        figure: What is drawn.
        path: The file.
        dpi: Pixels per inch.
        description: A text for the header of a PNG or an SVG.

    Raises:
        InputError: it is no kind of picture, or cannot be written.
    """
    buffer = io.BytesIO()
    kind = path.suffix.removeprefix(".").lower()
    if kind not in figure.canvas.get_supported_filetypes():
        raise InputError(f"{path} is no kind of picture; name a file that ends in .png, .svg or .pdf")
    figure.savefig(buffer, format=kind, dpi=dpi or "figure", metadata={"Description": description} if description else None)
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


def _bars(figure: Figure, axes: Axes, points: Sequence[Tradeoff], measure: str, place: int, places: int, timed_in: str) -> None:
    """A series in one panel: its line, and for each point its bar and marker, shifted by its place among the series."""
    from matplotlib.transforms import ScaledTranslation

    shift = axes.transData + ScaledTranslation(5 * (place - (places - 1) / 2) / 72, 0, figure.dpi_scale_trans)
    look = _look(place)
    points = sorted(points, key=lambda point: point.gain)
    axes.plot([p.gain for p in points], [p.lost[measure].difference for p in points], color=look["color"], linewidth=1.4, transform=shift)
    for point in points:
        lost = point.lost[measure]
        bar = None if math.isnan(lost.low) else [[lost.difference - lost.low], [lost.high - lost.difference]]
        fill = look["color"] if point.precision == timed_in else "white"
        axes.errorbar([point.gain], [lost.difference], bar, **look, capsize=2.5, markerfacecolor=fill, transform=shift)


def _look(place: int) -> dict[str, Any]:
    """Of a series; the first colour and marker are those of dense."""
    return {"color": COLORS[1 + place], "marker": MARKERS[1 + place], "markersize": 5.5, "linewidth": 1.4}


def _reach(lost: Interval) -> tuple[float, ...]:
    return tuple(value for value in (lost.difference, lost.low, lost.high) if not math.isnan(value))


def _legend(figure: Figure, shown: Sequence[str], series: Sequence[str], precisions: Sequence[str], timed_in: str) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=name, **_look(series.index(name))) for name in shown]
    for name in precisions:
        fill = "0.4" if name == timed_in else "white"
        handles.append(Line2D([], [], color="0.4", marker="s", linestyle="", markerfacecolor=fill, label=f"quality in {name}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
