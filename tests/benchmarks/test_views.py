"""`benchmarks/parallel/views.py`: what it is given, what it finds too far, and its table. Processes run it in `tests/parallel`."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def views(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks" / "parallel"))
    return importlib.import_module("views")


def record(difference: float, floor: float) -> dict[str, Any]:
    return {
        "views": 100, "seconds": {"one": 2.0, "several": 1.0}, "gain": 2.0, "peak_bytes": {"one": 3 * 10**9, "several": None},
        "travelled_bytes": 5 * 10**9, "planned_bytes": 4 * 10**9, "planned": {"2": {"gain": 1.75}},
        "differences": {"depth_rel_l2": 1e-4, "pose_rel_l2": difference, "pose_max_abs": 7.0},
        "floor": {"depth_rel_l2": 0.0, "pose_rel_l2": floor, "pose_max_abs": 0.0},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("difference", "floor", "far"),
    [
        (0.019, 0.0, False),
        (0.021, 0.0, True),
        (0.05, 0.03, False),
        (0.07, 0.03, True),
        (float("nan"), 1.0, True),
        (0.021, float("nan"), True),
    ],
)
def test_what_is_too_far_is_judged_by_the_tolerance_and_the_floor(views: ModuleType, difference: float, floor: float, far: bool) -> None:
    assert views.too_far(record(difference, floor), 0.02) == ["pose_rel_l2"] * far


def test_the_table_has_a_row_for_each_number_of_views(views: ModuleType) -> None:
    head, *rows = views.table([record(0.05, 0.03), record(0.5, 0.03)], 2, 0.02).splitlines()
    assert head.split()[:3] == ["views", "one", "s"]
    assert rows[0].split() == ["100", "2.0000", "1.0000", "2.000", "1.750", "5.000", "4.000", "3.00", "-", "5.0e-02", "3.0e-02"]
    assert "5.0e-01 (too far)" in rows[1]
    assert len({len(row) for row in (head, *rows)}) == 1


def test_a_size_is_one_number_or_two(views: ModuleType) -> None:
    assert (views.resolution("518"), views.resolution("392x518")) == (518, (392, 518))
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--resolution", type=views.resolution)
    for wrong in ("0", "3x", "3x4x5", "wide"):
        with pytest.raises(argparse.ArgumentError, match="resolution"):
            parser.parse_args(["--resolution", wrong])
