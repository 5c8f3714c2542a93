"""`benchmarks/picture.py`: points are those that are stored at both, with their intervals, and what is missing is said."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MARKS = "before\n<!-- picture -->\nold\n<!-- end of picture -->\nafter\n"


@pytest.fixture
def picture(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("picture")


def store(folder: Path, name: str, content: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(content))


def speed(folder: Path, keep: float, ours: float, views: tuple[int, ...] = (16,), **options: Any) -> None:
    """Strong dense takes 200 ms, with our kernels 180."""
    times = {"strong": 200.0, "strong-exact": 180.0, "lite3r-fp8": ours}
    cells = [
        {"variant": name, "views": v, "best": "graph", "candidates": {"eager": {"median_ms": 1.0}, "graph": {"median_ms": ms}}}
        for v in views
        for name, ms in times.items()
    ]
    conditions = {"device": "a chip", "date": "2026-01-02T03:04", "commit": "0123456789", "lite3r_options": {"keep_ratio": keep} | options}
    store(folder, f"h200_vggt_518_keep{keep}.json", {"conditions": conditions, "cells": cells})


def distillation(folder: Path, keep: float, trained: str = "full") -> None:
    def change(auc30: float, abs_rel: float) -> dict[str, Any]:
        return {
            "16": {
                name: {"difference": x, "low": x - 0.5, "high": x + 0.25, "dense": 60.0}
                for name, x in (("auc30", auc30), ("abs_rel", abs_rel))
            }
        }

    def row(name: str, calibrated: bool, training: Any = None, precision: str = "full") -> dict[str, Any]:
        return {"name": name, "calibrated": calibrated, "training": training, "precision": precision}

    rows = {
        "applied": {"row": row("applied", False), "against_dense": change(-4.0, 3.0)},
        "calibrated": {"row": row("calibrated", True), "against_dense": change(-3.0, 2.0)},
        "lora": {"row": row("lora", True, {"minutes": 1.0}), "against_dense": change(-2.0, 1.0)},  # a part, trained for shorter
        "best": {"row": row("best", True, {"minutes": 8.0}, trained), "against_dense": change(-1.0, 0.5)},
    }
    conditions = {"dtype": "bfloat16", "size": 224, "scenes": 480, "weights_sha256": "new"}
    content = {"conditions": conditions, "rows": {f"{key} {keep}": value | {"keep_ratio": keep} for key, value in rows.items()}}
    store(folder, f"testbed_distillation_keep{keep}.json", content)


def chosen(folder: Path, scenes: int = 90, size: int = 224) -> None:
    def change(x: float, low: float | None = -0.2) -> dict[str, Any]:
        return {"difference": x, "low": None if low is None else x + low, "high": None if low is None else x - low, "scenes": scenes}

    def row(auc30: float, abs_rel: float) -> dict[str, Any]:
        return {"AUC@30": {"mean": 60 + auc30, "change": change(auc30)}, "AbsRel": {"mean": 0.1, "change": change(abs_rel, None)}}

    rows = {
        "dense": row(0, 0), "uniform 0.25": row(-5, 0.004), "auto 0.25": row(-2, 0.003), "uniform + calibrate 0.25": row(-4, 0.003),
        "auto + calibrate 0.25": row(-1.5, 0.002),
    }  # fmt: skip
    gains = {"auto + calibrate 0.25 - uniform + calibrate 0.25": {"AUC@30": change(2.5)}}
    conditions = {"dtype": "bfloat16 autocast", "size": size, "weights_sha256": "new"}
    store(folder, "quality_auto.json", {"conditions": conditions, "groups": {"16": {"rows": rows, "gains": gains}}})


def variants(folder: Path, weights: str) -> None:
    def scenes(auc30: float, abs_rel: float) -> dict[str, Any]:
        return {"scenes": [{"pose.auc30": auc30 + i, "depth.abs_rel": abs_rel} for i in range(6)]}

    rows = {"dense": scenes(60, 0.1), "sparse + means 0.5": scenes(59, 0.101), "sparse 0.5": scenes(10, 1)}
    group = {"sets": 6, "size": [224, 224], "rows": rows}
    conditions = {"weights_sha256": weights, "dtype": "bfloat16"}
    store(folder, "quality.json", {"conditions": conditions, "groups": {"procedural/16": group, "7scenes/16": group}})


def test_points_are_what_is_stored_at_one_keep_ratio_and_number_of_views(picture: ModuleType, tmp_path: Path) -> None:
    distillation(tmp_path, 0.25)
    distillation(tmp_path, 0.125, "fp8")
    chosen(tmp_path)
    speed(tmp_path, 0.25, 100.0, (16, 32))
    speed(tmp_path, 0.1, 50.0)
    stored = picture.Stored(tmp_path)
    assert [(quality.series, quality.key) for quality, _ in stored.points] == [(name, (0.25, 16)) for name in picture.SERIES]
    untrained, _, auto, distilled = (quality for quality, _ in stored.points)
    assert {(speed.over_strong, speed.over_exact) for _, speed in stored.points} == {(2.0, 1.8)}
    lost = untrained.lost[picture.AUC30]
    assert (lost.difference, lost.low, lost.high, lost.scenes) == (4.0, 3.75, 4.5, 480)  # what rises is lost less
    lost = untrained.lost[picture.ABS_REL]
    assert (lost.difference, lost.low, lost.high) == (3.0, 2.5, 3.25)
    assert auto.lost[picture.AUC30].difference == 1.5  # that with calibrate
    assert auto.lost[picture.ABS_REL].difference == pytest.approx(2.0)  # percent of dense
    assert distilled.more == "8 minutes"
    assert stored.missing == [
        "keep_ratio 0.25, 16 views: untrained of quality_auto.json (BF16, 90 scenes), because that of testbed_distillation_keep0.25.json "
        "(BF16, 480 scenes) is",
        "keep_ratio 0.25, 16 views: calibrated of quality_auto.json (BF16, 90 scenes), because that of testbed_distillation_keep0.25.json "
        "(BF16, 480 scenes) is",
        "keep_ratio 0.125, 16 views: quality is stored, speed is not; lite3r bench --model vggt --views 16 --keep-ratio 0.125 "
        "--fill-branch --variants strong,strong-exact,lite3r-fp8 --json FILE",
        "keep_ratio 0.25, 32 views: speed is stored, quality is not",
        "keep_ratio 0.1, 16 views: speed is stored, quality is not",
    ]


def test_of_two_rows_that_in_the_precision_of_the_times_is_drawn_then_that_of_more_scenes(picture: ModuleType, tmp_path: Path) -> None:
    distillation(tmp_path, 0.25)
    chosen(tmp_path, scenes=500)
    speed(tmp_path, 0.25, 100.0)
    found = {quality.series: quality for quality, _ in picture.Stored(tmp_path).points}
    assert [found[name].file for name in picture.SERIES] == ["quality_auto.json"] * 3 + ["testbed_distillation_keep0.25.json"]
    path = tmp_path / "testbed_distillation_keep0.25.json"
    content = json.loads(path.read_text())
    content["rows"]["applied 0.25"]["row"]["precision"] = "fp8"
    path.write_text(json.dumps(content))
    found = {quality.series: quality for quality, _ in picture.Stored(tmp_path).points}
    assert (found["untrained"].file, found["untrained"].precision) == (path.name, "FP8")


def test_what_is_of_other_conditions_is_left_out_and_said(picture: ModuleType, tmp_path: Path) -> None:
    variants(tmp_path, "old")
    chosen(tmp_path, size=112)
    speed(tmp_path, 0.5, 160.0)
    speed(tmp_path, 0.25, 100.0, pin="none")
    stored = picture.Stored(tmp_path, "new")
    assert stored.points == []
    assert stored.missing[:3] == [
        "h200_vggt_518_keep0.25.json: measured with more options than keep_ratio, so it is not that of the testbed's rows",
        "quality_auto.json: of images of 112 pixels, not 224, so it is left out",
        "quality.json: of the weights old, where others are of new, so it is left out",
    ]
    ((quality, _),) = picture.Stored(tmp_path, "old").points  # on rendered scenes
    assert (quality.series, quality.key, quality.lost[picture.AUC30].difference) == ("untrained", (0.5, 16), 1.0)
    assert quality.lost[picture.ABS_REL].difference == pytest.approx(1.0)


def test_a_time_that_is_not_there_is_said(picture: ModuleType, tmp_path: Path) -> None:
    distillation(tmp_path, 0.25)
    speed(tmp_path, 0.25, 100.0)
    path = tmp_path / "h200_vggt_518_keep0.25.json"
    content = json.loads(path.read_text())
    content["cells"][0] |= {"best": None, "candidates": {}}  # strong dense ran out of memory
    path.write_text(json.dumps(content))
    stored = picture.Stored(tmp_path)
    assert stored.points == []
    assert stored.missing[0] == "h200_vggt_518_keep0.25.json: no time of strong with 16 views"


def test_the_command_draws_and_writes(picture: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    distillation(tmp_path, 0.125, "fp8")
    page, drawn = tmp_path / "page.md", tmp_path / "p.png"
    page.write_text(MARKS)
    command = ["--results", str(tmp_path), "--picture", str(drawn), "--page", str(page)]
    picture.main(command)
    assert "p.png is not drawn" in capsys.readouterr().out
    assert not drawn.exists()
    assert page.read_text() == MARKS.replace("old\n", "")

    speed(tmp_path, 0.125, 100.0)
    picture.main(command)
    out = capsys.readouterr().out
    assert 'not drawn: keep_ratio 0.125, 16 views: no quality of keep_ratio="auto", calibrated' in out
    assert "3 points in" in out
    text = page.read_text()
    assert text.startswith("before\n<!-- picture -->\n## Quality over speed\n\n![Loss of AUC@30")
    assert text.endswith("<!-- end of picture -->\nafter\n")
    assert "| 16 | 0.125 | untrained | 4.00 [3.75, 4.50] | 3.00 [2.50, 3.25] | BF16 | 2.00 × | 1.80 × |" in text
    assert "| 16 | 0.125 | distilled, 8 minutes | 1.00 [0.75, 1.50] | 0.50 [0.00, 0.75] | FP8 |" in text
    words = " ".join(text.split())
    assert "So is the quality of filled points; that of hollow ones is of BF16. What FP8 alone costs is not stored." in words
    assert (
        "`keep_ratio=0.125`: 2.00 × for 3.0 points of AUC@30 and 2.0 % of AbsRel with 16 views. The default, 0.25, is not in it." in words
    )
    assert "times `h200_vggt_518_keep0.125.json` (a chip, 2026-01-02, commit 0123456)." in words
    assert "auto" not in words
    with Image.open(drawn) as image:
        assert isinstance(image, Image.Image)
        assert image.info["Description"] == picture.table(picture.Stored(tmp_path))
    first = drawn.read_bytes()
    picture.main(command)
    assert (drawn.read_bytes(), page.read_text()) == (first, text)


def test_ratios_that_were_chosen_are_compared_on_the_same_scenes(picture: ModuleType, tmp_path: Path) -> None:
    chosen(tmp_path)
    speed(tmp_path, 0.25, 100.0)
    alone = {name: {"percent": [x, x - 0.1, x + 0.1], "dense": 50.0} for name, x in (("auc30", -0.2), ("abs_rel", 0.3))}
    store(tmp_path, picture.FP8_FILE, {"groups": {"the default": alone}, "conditions": {"views": 8, "weights_sha256": "other"}})
    words = " ".join(picture.section(picture.Stored(tmp_path)).split())
    assert "its gain is that of the same ratio at all sites" in words
    assert "higher than with one ratio for all by 2.50 [2.30, 2.70] points (keep_ratio 0.25, 16 views)." in words
    assert '| `keep_ratio="auto"`, calibrated | 1.50 [1.30, 1.70] | 2.00 | BF16 |' in words
    costs = "AUC@30 -0.20 % [-0.30, -0.10], AbsRel +0.30 % [+0.20, +0.40] of dense with 8 views in the testbed's weights other"
    assert f"FP8 alone, without sparsity, changed {costs}" in words
    assert "`keep_ratio=0.25`, the default: 2.00 × for 4.0 points" in words
    distillation(tmp_path, 0.25)  # of other scenes, and drawn in their place
    assert "than with one ratio for all" not in " ".join(picture.section(picture.Stored(tmp_path)).split())


def test_picture_and_page_are_those_of_the_results(picture: ModuleType) -> None:
    stored, text = picture.Stored(picture.RESULTS), picture.PAGE.read_text()
    assert text.count("<!-- picture -->") == len(picture.MARKED.findall(text)) == 1
    assert picture.update(text, stored) == text, "run: python benchmarks/picture.py"
    assert picture.PICTURE.exists() == bool(stored.points), "run: python benchmarks/picture.py"
    if stored.points:
        assert picture.PICTURE.stat().st_size < 120_000
        with Image.open(picture.PICTURE) as image:
            assert image.info["Description"] == picture.table(stored), "run: python benchmarks/picture.py"
