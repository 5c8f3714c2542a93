"""Quality over speed: what is drawn is what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lite3r_plugin.errors import InputError
from lite3r_plugin.evaluation.plots import quality_over_speed, read_evaluation, speedup


def result(ratio: float, faster: float, low: float | None = -0.01, **other: Any) -> dict[str, Any]:
    difference = {"difference": 0.02, "low": low, "high": None if low is None else 0.05, "scenes": 8}
    return {
        "model": "small", "views": 8, "device": "a chip", "dtype": "bfloat16", "config": {"keep_ratio": ratio},
        "seconds": {"dense": [9.0, 2.0, 2.0], "lite3r": [99.0, 2.0 / faster, 2.0 / faster]},
        "means": {"dense": {"AbsRel": 0.1, "AUC@30, %": None}, "lite3r": {"AbsRel": 0.12, "AUC@30, %": None}},
        "differences": {"AbsRel": difference, "AUC@30, %": difference},
    } | other  # fmt: skip


def test_points_lie_at_the_gain_and_the_mean_with_the_interval_of_the_difference() -> None:
    figure = quality_over_speed([result(0.25, 2), result(0.1, 4, low=None)])
    (axes,) = figure.axes  # of AUC@30 nothing was defined
    assert axes.get_ylabel() == "AbsRel ↓"
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() in ("o", "s")]
    assert points == [(1, 0.1), (2, 0.12), (4, 0.12)]
    (bar,) = axes.containers  # the other has no interval
    assert bar.lines[2][0].get_segments()[0].ravel().tolist() == pytest.approx([2, 0.09, 2, 0.15])
    assert [text.get_text() for text in axes.texts] == ["dense", "keep_ratio 0.25", "keep_ratio 0.1"]


def test_the_first_set_of_views_counts_where_it_is_alone() -> None:
    assert speedup(result(0.25, 2)) == 2
    assert speedup({"seconds": {"dense": [3.0], "lite3r": [1.5]}}) == 2


def test_what_has_no_common_plot_is_refused() -> None:
    with pytest.raises(InputError, match=r"different conditions have no common plot: device \(a chip and another\)"):
        quality_over_speed([result(0.25, 2), result(0.1, 4, device="another")])
    with pytest.raises(InputError, match=r"none of AbsRel, .* was measured in all"):
        quality_over_speed([result(0.25, 2, means={"dense": {}, "lite3r": {}})])


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    path.write_text(json.dumps(result(0.25, 2)))
    assert read_evaluation(path) == result(0.25, 2)
    for text, message in (("{", "is no JSON"), ('{"cells": []}', "no result of lite3r eval"), ("[]", "no result of lite3r eval")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_evaluation(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_evaluation(tmp_path / "none.json")
