"""Quality over speed, from what `lite3r eval` stored."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..files import read_json
from ..scene.metrics.comparison import ROWS
from .compare import DENSE, LITE3R

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = ("AbsRel", "AUC@30, %", "AUC@3, %", "RMSE")  # the first two of these that were measured
SAME = ("model", "data", "split", "views", "rule", "draws", "seed", "protocol", "device", "dtype", "weights")


def read_evaluation(path: Path) -> dict[str, Any]:
    """What ``lite3r eval --json`` wrote. Raises `InputError` where it is something else."""
    stored = read_json(path)
    if not isinstance(stored, dict) or not all(isinstance(stored.get(key), dict) for key in ("config", "means", "differences", "seconds")):
        raise InputError(f"{path} is no result of lite3r eval with times; measure again with --json")
    return stored


def speedup(report: Mapping[str, Any]) -> float:
    """How many times faster than dense: by the medians over sets of views, without the first, in which kernels are compiled."""
    dense, lite3r = (report["seconds"][method][1:] or report["seconds"][method] for method in (DENSE, LITE3R))
    return statistics.median(dense) / statistics.median(lite3r)


def quality_over_speed(reports: Sequence[Mapping[str, Any]]) -> Figure:
    """Measures over the gain in speed: dense at 1, and each report with the 95 % interval of its paired difference from dense.

    Args:
        reports: What `Evaluation.to_dict` gives, or the JSON files hold (`read_evaluation`), of one model on the same data.

    Returns:
        A figure of one panel a measure, two at most, that belongs to no window.

    Raises:
        InputError: they are of different models, data or conditions, or have no measure in common.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = reports[0]
    for other in reports[1:]:
        if differing := [name for name in SAME if other.get(name) != first.get(name)]:
            told = ", ".join(f"{name} ({first.get(name)} and {other.get(name)})" for name in differing)
            raise InputError(f"results of different conditions have no common plot: {told}")
    rows = [row for row in SHOWN if all(_measured(report, row) for report in reports)][:2]
    if not rows:
        raise InputError(f"none of {', '.join(SHOWN)} was measured in all results, so there is nothing to draw")
    figure = Figure(figsize=(4.6 * len(rows), 4.0), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        dense = first["means"][DENSE][row]
        axes.axhline(dense, color="0.6", linewidth=1, linestyle="--")
        axes.plot([1], [dense], "o", color="black")
        axes.annotate("dense", (1, dense), (5, 5), textcoords="offset points", fontsize=8)
        for report in sorted(reports, key=speedup):
            at, value, difference = speedup(report), report["means"][LITE3R][row], report["differences"][row]
            low, high = difference["low"], difference["high"]
            if low is not None and high is not None:
                mean = difference["difference"]
                axes.errorbar([at], [value], yerr=[[mean - low], [high - mean]], color="#D55E00", capsize=3)
            axes.plot([at], [value], "s", color="#D55E00")
            axes.annotate(_label(report), (at, value), (5, -11), textcoords="offset points", fontsize=8)
        axes.set_xlabel("times faster than dense")
        axes.set_ylabel(f"{row} {'↑' if ROWS[row][2] else '↓'}")
        axes.margins(0.25)
        axes.grid(alpha=0.35)
    figure.suptitle(f"{first['model']}, {first['views']} views, {first['device']}, {first['dtype']}", fontsize=10, x=0.01, ha="left")
    return figure


def _measured(report: Mapping[str, Any], row: str) -> bool:
    return all(report["means"][method].get(row) is not None for method in (DENSE, LITE3R))


def _label(report: Mapping[str, Any]) -> str:
    ratio = report["config"]["keep_ratio"]
    label = f"keep_ratio {ratio:g}" if isinstance(ratio, (int, float)) else "keep_ratio by site"
    return label + (", checkpoint" if "checkpoint" in report else "")
