"""`benchmarks/quality.py`: its variants really differ, its tables say what was measured, and a stopped run goes on."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from lite3r_plugin import hookimpl
from lite3r_plugin.adapter.plugins import find_model, get_manager
from lite3r_plugin.scene.images import to_tensor
from lite3r_plugin.testbed import Testbed, weights_hash

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIZE = 96  # of images, in pixels


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of `benchmarks/`, whose files are scripts."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def module(name: str) -> ModuleType:
        return importlib.import_module(name)

    return module


@pytest.fixture
def small(load, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`quality.py` on small images, which the model ``small``, the trained testbed, takes as they are."""
    quality = load("quality")
    monkeypatch.setattr(quality.Bench, "rendering", f"device=cpu,size={SIZE}")
    entry = dataclasses.replace(find_model("testbed"), name="small", preprocess=to_tensor)
    get_manager().register(SimpleNamespace(lite3r_models=hookimpl(lambda: {"small": entry})), name="small")
    yield quality
    get_manager().unregister(name="small")


def scene(abs_rel: float | None, auc: float, near: float | None = None) -> dict[str, float | None]:
    measures: dict[str, float | None] = {"pose.auc30": auc, "pose.auc3": None}
    if abs_rel is not None:
        measures["depth.abs_rel"] = abs_rel
    return measures | ({} if near is None else {"teacher.depth_abs_rel": near})


def test_table(load) -> None:
    """Means over the scenes that have a measure; differences are paired and in the direction other - dense."""
    report = load("quality_report")
    rows = {
        "constant": {"density": None, "scenes": [scene(0.5, 0.0)] * 6},
        "dense": {"density": 1.0, "scenes": [scene(0.1, 40.0, 0.0), scene(0.3, 60.0, 0.0)] * 3},
        "sparse 0.25": {"density": 0.4, "scenes": [scene(0.2, 30.0, 0.05), scene(0.4, 50.0, 0.07)] * 3},
    }
    text = report.table("procedural/8", {"sets": 6, "size": [224, 224], "rows": rows})
    heads, _, constant, dense, sparse = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")
    )
    sparse, dense, constant = (dict(zip(heads, row, strict=True)) for row in (sparse, dense, constant))
    assert (dense["AbsRel ↓"], sparse["AbsRel ↓"], constant["AbsRel ↓"]) == ("0.2000", "0.3000", "0.5000")
    assert sparse["AbsRel − dense"] == "+0.1000 [+0.1000, +0.1000] *"
    assert sparse["AUC@30 − dense"] == "-10.0 [-10.0, -10.0] *"
    assert (sparse["depth against dense ↓"], dense["depth against dense ↓"]) == ("0.0600", "")
    assert (sparse["density"], dense["AUC@30 − dense"], constant["AUC@30 − dense"]) == ("0.400", "", "")
    assert "AUC@3 ↑" not in heads  # no scene has it


def test_table_without_depth_or_scenes(load) -> None:
    """Data with cameras alone has no depth columns; data with too few views says so."""
    report = load("quality_report")
    rows = {"dense": {"density": 1.0, "scenes": [scene(None, 40.0)]}}
    assert "AbsRel" not in report.table("strecha/8", {"sets": 1, "size": [8, 8], "rows": rows})
    assert "no scene has so many views" in report.table("strecha/32", {"sets": 0, "rows": {}})


@pytest.mark.slow
def test_run(small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command on one scene; started again, it measures nothing twice."""
    quality = small
    few = ("dense", "sparse", "sparse + means + linear, marginal", "sparse, raster order")
    every = quality.variants
    monkeypatch.setattr(quality, "variants", lambda *given: [v for v in every(*given) if v.name in few])
    data = ["--scenes", "1", "--calibration", "2", "--views", "3", "--json"]
    monkeypatch.setattr(
        sys, "argv", ["quality.py", "--small", "--model", "small", *data, str(tmp_path / "q.json"), "--markdown", str(tmp_path / "q.md")]
    )
    quality.main()
    rows = json.loads((tmp_path / "q.json").read_text())["groups"]["procedural/3"]["rows"]
    assert list(rows) == ["constant", "dense", *(f"{name} 0.25" for name in few[1:])]
    near = {name: sum(scene["teacher.depth_abs_rel"] for scene in row["scenes"]) for name, row in rows.items() if name != "constant"}
    assert near["dense"] == 0
    assert 0 < near["sparse + means + linear, marginal 0.25"] < 0.9 * near["sparse 0.25"]
    assert near["sparse, raster order 0.25"] != near["sparse 0.25"]
    assert rows["sparse 0.25"]["density"] < 1 == rows["dense"]["density"]
    assert "sparse, raster order 0.25" in (tmp_path / "q.md").read_text()

    monkeypatch.setattr(quality.Bench, "run", lambda *_: pytest.fail("measured again"))
    quality.main()
    assert "wrote" in capsys.readouterr().err


@pytest.mark.slow
def test_results_of_other_conditions_are_not_gone_on_with(
    small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """More scenes or other weights start anew."""
    quality = small
    every = quality.variants
    monkeypatch.setattr(quality, "variants", lambda *given: every(*given)[:1])
    path = tmp_path / "q.json"

    def run(scenes: str) -> dict:
        options = [
            "--small",
            "--model",
            "small",
            "--views",
            "2",
            "--json",
            str(path),
            "--markdown",
            str(tmp_path / "q.md"),
            "--scenes",
            scenes,
        ]
        monkeypatch.setattr(sys, "argv", ["quality.py", *options])
        quality.main()
        return json.loads(path.read_text())

    assert run("1")["groups"]["procedural/2"]["sets"] == 1
    stored = run("2")
    assert stored["groups"]["procedural/2"]["sets"] == 2
    assert "other scenes: starting anew" in capsys.readouterr().err
    model = Testbed.from_pretrained()
    assert stored["conditions"]["weights_sha256"] == weights_hash(model)
    with torch.no_grad():
        model.depth_head.project.bias[0] += 1
    stored["conditions"]["weights_sha256"] = weights_hash(model)
    stored["groups"]["procedural/2"]["rows"]["dense"] = "of other weights"
    path.write_text(json.dumps(stored))
    assert isinstance(run("2")["groups"]["procedural/2"]["rows"]["dense"], dict)
    assert "other weights_sha256: starting anew" in capsys.readouterr().err


@pytest.fixture(scope="module")
def stored() -> dict:
    return json.loads((BENCHMARKS / "results" / "quality.json").read_text())


def test_stored_page_is_the_one_of_the_stored_measures(load, stored: dict) -> None:
    """`quality.md` is what `quality_report.py` makes of `results/quality.json`."""
    page = (BENCHMARKS / "quality.md").read_text()
    assert load("quality_report").markdown(stored) == page, "run: python benchmarks/quality_report.py"
    assert len(page.split()) < 2000


def test_what_is_measured_on_the_testbed_says_with_which_weights(load) -> None:
    """The package holds the last generation; tables of one before it say so."""
    known = load("weights")
    assert weights_hash(Testbed.from_pretrained()) == known.PACKAGED
    assert known.generation({"weights_sha256": known.PACKAGED}) == f"{known.GENERATIONS[known.PACKAGED]} generation"
    assert known.generation({"weights_sha256": "0"}) == "weights 0"
    measured = [p for p in (BENCHMARKS / "results").glob("*.json") if re.match(r"quality|testbed_distillation|h200_testbed", p.name)]
    assert len(measured) > 5
    for path in measured:
        report = json.loads(path.read_text())
        found = report.get("conditions", report)["weights_sha256"]
        assert found in known.GENERATIONS, path.name
        if found != known.PACKAGED:
            assert "before that in the package" in known.generation({"weights_sha256": found})


def test_findings_follow_from_the_measures(load, stored: dict) -> None:
    """What the page says in words, which no number in it would correct."""
    report = load("quality_report")
    assert "## Findings" in report.markdown(stored)
    near = "teacher.depth_abs_rel"
    by_views = report.groups(stored, report.RENDERED)
    assert set(by_views) == {8, 16, 32}
    for views, group in by_views.items():

        def mean(row: str, measure: str, keep: float = 0.25, group: dict = group) -> float:
            return report.mean(group, f"{row} {keep}", measure)

        for keep in (0.5, 0.25, 0.125):  # block means pay, and blocks by error on top, for depth and for cameras
            ways = ("sparse", report.MEAN_ROW, report.APPLIED)
            depths, cameras = ([mean(way, measure, keep) for way in ways] for measure in (near, report.AUC30))
            assert depths == sorted(depths, reverse=True)
            assert cameras == sorted(cameras)
        for keep in (0.25, 0.125):
            assert mean(report.CALIBRATED, report.AUC30, keep) > mean(report.APPLIED, report.AUC30, keep)  # as the branch does for cameras
        assert mean(report.APPLIED, near) < mean("sparse + means, raster order", near)
        assert mean(report.APPLIED, report.AUC30) > mean("sparse + means, raster order", report.AUC30)
        loose = f"{report.APPLIED}, reference view not pinned"
        assert mean("sparse, reference view not pinned", report.AUC30) > mean("sparse, nothing pinned", report.AUC30)
        if views > 8:
            rows = group["rows"]
            assert rows[f"{report.APPLIED} 0.125"]["density"] < rows[f"{loose} 0.25"]["density"]
            assert mean(report.APPLIED, report.ABS_REL, 0.125) < mean(loose, report.ABS_REL)
            assert mean(report.APPLIED, report.AUC30, 0.125) < mean(loose, report.AUC30)
            assert mean(report.APPLIED, report.ABS_REL) < mean(report.AS_KEYS, report.ABS_REL) < mean(loose, report.ABS_REL)
            assert mean(report.AS_KEYS, report.AUC30) > max(mean(row, report.AUC30) for row in (report.APPLIED, loose))
        assert mean(report.CALIBRATED, report.ABS_REL, 0.125) > 0.995 * mean(report.APPLIED, report.ABS_REL, 0.125)  # "no better"
        branches = [f"sparse + means + linear, {kind} 0.25" for kind in ("marginal", "all")]
        assert report.mean(group, branches[0], report.AUC30) > report.mean(group, branches[1], report.AUC30)
    strecha = report.groups(stored, "strecha")[8]  # "the opposite"
    tiles, by_mean, raster = (
        report.mean(strecha, f"{row} 0.25", report.AUC30) for row in (report.APPLIED, report.MEAN_ROW, "sparse + means, raster order")
    )
    assert tiles < by_mean < raster


def test_numbers_of_views_that_are_not_measured_whole_are_left_out(load, stored: dict) -> None:
    report = load("quality_report")
    whole = stored["groups"]["procedural/16"]
    part = whole | {"views": 64, "rows": dict(list(whole["rows"].items())[:-1])}
    more = stored | {"groups": stored["groups"] | {"procedural/64": part}}
    assert report.markdown(more) == report.markdown(stored)
    more["groups"]["procedural/64"] = whole | {"views": 64}
    assert "64 views" in report.markdown(more)


def test_without_all_rows_there_are_no_findings(load, stored: dict) -> None:
    report = load("quality_report")
    few = {"conditions": stored["conditions"], "groups": {"procedural/8": stored["groups"]["procedural/8"]}}
    page = report.markdown(few)
    assert "## Findings" not in page
    assert "## Photographs" not in page
    assert "| sparse + means 0.25 | 0.44 | +0.0038 * | -1.3 * |" in page


def test_full_tables(load, stored: dict, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["quality_report.py", "--full", str(BENCHMARKS / "results" / "quality.json")])
    load("quality_report").main()
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("## ")] == [
        "## {}, {} views".format(*name.split("/")) for name in stored["groups"]
    ]
    assert "-1.3 [-2.2, -0.4] *" in printed
