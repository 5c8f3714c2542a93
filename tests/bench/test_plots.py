"""Plots of stored reports: what is drawn is what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lite3r_plugin.bench.plots import memory_over_views, save_figure, time_over_views
from lite3r_plugin.bench.records import BenchReport, Candidate, Cell, read_report
from lite3r_plugin.errors import InputError

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
