"""Plots of stored reports: what is drawn is what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lite3r_plugin.bench.plots import Tradeoff, memory_over_views, quality_over_gain, save_figure, time_over_views
from lite3r_plugin.bench.records import BenchReport, Candidate, Cell, read_report
from lite3r_plugin.errors import InputError
from lite3r_plugin.scene.metrics import Interval

GIB = 2**30


def report(peaks: bool = True) -> BenchReport:
    made = BenchReport({"model": "small", "resolution": 56, "device": "a chip"})
    for variant, factor in (("stock", 4), ("lite3r", 1)):
        for views in (8, 2):
            won = Candidate(views * factor, views * factor / 2, views * factor * 2, 5)
            if peaks:
                won.peak_bytes, won.reserved_bytes = views * factor * GIB, 2 * views * factor * GIB
            made.cells.append(Cell(variant, views, 56, best="eager", candidates={"eager": won}))
    made.cells[0] = Cell("stock", 8, 56, status="oom", error="out of memory")
    return made


def lines(figure: Any) -> list[tuple[list[float], list[float]]]:
    """The drawn lines, without the caps of bars."""
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines if line.get_linestyle() != "None"]


def test_times_of_each_variant_lie_over_views_on_logarithmic_axes() -> None:
    figure = time_over_views(report().to_dict())
    assert lines(figure) == [([2], [8]), ([2, 8], [2, 8])]
    axes = figure.axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    bars = [segment.tolist() for segment in axes.containers[1].lines[2][0].get_segments()]
    assert bars == [[[2, 1], [2, 4]], [[8, 4], [8, 16]]]


def test_memory_has_a_line_allocated_and_one_reserved() -> None:
    assert lines(memory_over_views(report().to_dict())) == [([2], [8]), ([2], [16]), ([2, 8], [2, 8]), ([2, 8], [4, 16])]


def test_the_legend_says_what_did_not_run() -> None:
    legend = time_over_views(report().to_dict()).axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["stock (out of memory at 8)", "lite3r"]


def test_a_report_of_a_cpu_has_no_memory_to_draw() -> None:
    with pytest.raises(InputError, match="no memory of any cell"):
        memory_over_views(report(peaks=False).to_dict())


def test_a_stored_report_is_drawn_and_written(tmp_path: Path) -> None:
    report().save(tmp_path / "r.json")
    save_figure(time_over_views(read_report(tmp_path / "r.json")), tmp_path / "time.svg")
    assert "</svg>" in (tmp_path / "time.svg").read_text()
    with pytest.raises(InputError, match="no kind of picture"):
        save_figure(time_over_views(report().to_dict()), tmp_path / "time.doc")


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    with pytest.raises(InputError, match="cannot be read"):
        read_report(path)
    for text, words in (("{", "is no JSON"), ("[]", "is no report"), (json.dumps({"version": 9}), "is no report")):
        path.write_text(text)
        with pytest.raises(InputError, match=words):
            read_report(path)


def point(series: str, views: int, gain: float, lost: float, bound: float = 0.5, precision: str = "FP8") -> Tradeoff:
    interval = Interval(lost, lost - bound, lost + bound, 8)
    return Tradeoff(series, views, 1 / gain, gain, {"AUC": interval, "depth": Interval(2 * lost, *[float("nan")] * 2, 5)}, precision)


def test_losses_lie_below_dense_at_their_gain_with_their_intervals() -> None:
    points = [point("b", 16, 4, 3), point("b", 16, 2, 1, precision="BF16"), point("a", 32, 3, 2)]
    figure = quality_over_gain(points, ("a", "b", "c"), "dense", "FP8", "A title")
    above, other, below, _ = figure.axes
    assert [above.get_title(), other.get_title()] == ["16 views", "32 views"]
    assert [above.get_ylabel(), below.get_ylabel()] == ["AUC", "depth"]
    bottom, top = above.get_ylim()
    assert bottom > 3.5 > 0 > top  # dense, which loses nothing, stands on top
    joined = [line for line in above.lines if len(line.get_xdata()) == 2 and line.get_color() == "#0072B2"]
    assert [line.get_xydata().tolist() for line in joined] == [[[2, 1], [4, 3]]]
    bars = [container.lines[2][0].get_segments()[0].tolist() for container in above.containers]
    assert bars == [[[2, 0.5], [2, 1.5]], [[4, 2.5], [4, 3.5]]]
    assert [container.lines[0].get_markerfacecolor() for container in above.containers] == ["white", "#0072B2"]
    assert [container.has_yerr for container in below.containers] == [False, False]  # of so few scenes there is no interval
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "quality in BF16", "quality in FP8"]
    assert {"0.5", "0.25", "dense"} <= {text.get_text() for text in above.texts}


def test_a_plot_without_points_or_of_unknown_series_is_refused() -> None:
    with pytest.raises(InputError, match="no point to draw"):
        quality_over_gain([], ("a",), "dense", "FP8", "")
    with pytest.raises(InputError, match="b is none of the series a"):
        quality_over_gain([point("b", 16, 2, 1)], ("a",), "dense", "FP8", "")


def test_a_picture_can_say_what_it_shows(tmp_path: Path) -> None:
    save_figure(quality_over_gain([point("a", 16, 2, 1)], ("a",), "dense", "FP8", ""), tmp_path / "p.png", description="2 × for 1")
    with Image.open(tmp_path / "p.png") as image:
        assert image.info["Description"] == "2 × for 1"
