"""`lite3r eval`: on rendered scenes, on cameras alone, and on data that cannot be measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner
from written_scenes import render, write_layout

from lite3r_plugin.cli.app import app

SCENES = "procedural:scenes=4,views=3,size=224"


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["eval", "--device", "cpu", "--max-points", "2000", *arguments])
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.slow
def test_the_testbed_is_as_good_as_stated(tmp_path: Path) -> None:
    """The shipped weights on the held-out scene of this spec, dense and at keep_ratio 0.25."""
    path = tmp_path / "report.json"
    code, output = run(
        "--model", "testbed", "--data", SCENES, "--split", "test", "--views", "3", "--config", "dense_below=0", "--json", str(path)
    )
    assert code == 0, output
    report = json.loads(path.read_text())
    means = report["means"]
    assert 0.2 < means["dense"]["AbsRel"] < 0.24
    assert means["dense"]["AbsRel"] < 0.5 * means["constant"]["AbsRel"]
    assert means["dense"]["AUC@30, %"] > 70 > means["constant"]["AUC@30, %"]
    assert abs(means["lite3r"]["AbsRel"] - means["dense"]["AbsRel"]) < 0.025
    assert 0 < max(f["depth_abs_rel"] for f in report["fidelity"]) < 0.06
    assert 0.3 < report["density"] < 0.8
    assert len(report["scenes"]["dense"]) == 1
    assert report["config"]["keep_ratio"] == 0.25
    assert "sparse-linear" in output


def test_a_short_sequence_says_that_it_ran_dense() -> None:
    code, output = run("--model", "testbed", "--data", "procedural:scenes=1,views=2,size=64", "--views", "2")
    assert code == 0, output
    assert "Nothing was sparse: without a CUDA GPU" in output


def test_one_scene_has_no_interval_and_json_without_nan(tmp_path: Path) -> None:
    """Two views without a common point: poses are compared over one pair, and ATE is not defined."""
    data, path = "procedural:scenes=1,views=2,size=64", tmp_path / "report.json"
    files = ("--json", str(path), "--html", f"{path}.html")
    code, output = run("--model", "tiny", "--weights", "random", "--data", data, "--views", "2", *files)
    assert code == 0, output
    assert "nan" not in output
    page = Path(f"{path}.html").read_text()
    for expected in ('alt="quality over speed"', f"lite3r eval --device cpu --max-points 2000 --model tiny --weights random --data {data}"):
        assert expected in page
    assert "Nothing was sparse" in page
    assert "*" not in output.replace("* the 95 %", "")
    assert "there is none where fewer than 6 scenes" in output
    report = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert report["means"]["dense"]["ATE"] is None


@pytest.mark.parametrize(
    ("protocol", "title", "rows"),
    [
        ("da3bench", "Poses as the Depth Anything 3 benchmark judges them: all views of a scene, at most 100", ["AUC@3, %", "AUC@30, %"]),
        ("lite3r", "The protocol of the Lite3R paper: one random pair of views a scene", ["AbsRel", "RMSE"]),
    ],
)
def test_protocols(tmp_path: Path, protocol: str, title: str, rows: list[str]) -> None:
    data, path = "procedural:scenes=2,views=3,size=64", tmp_path / "report.json"
    arguments = ["eval", "--device", "cpu", "--model", "tiny", "--weights", "random", "--data", data, "--scenes", "1", "--json", str(path)]
    result = CliRunner().invoke(app, [*arguments, "--protocol", protocol])
    assert result.exit_code == 0, result.output
    assert title in " ".join(result.output.split())
    report = json.loads(path.read_text())
    assert report["protocol"] == protocol
    assert list(report["means"]["dense"])[:2] == rows
    assert report["views_of_sets"] == [3 if protocol == "da3bench" else 2]
    assert report["same_dense_kernel"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--views", "4"), "the protocol da3bench takes no views"),
        (("--rule", "spread", "--draws", "1"), "takes no rule, no draws"),
        (("--seed", "0"), "takes no seed"),
    ],
)
def test_options_that_contradict_a_protocol_are_refused_before_any_work(arguments: tuple[str, ...], message: str) -> None:
    data = ("--data", "blendedmvs:/no/such/folder")
    result = CliRunner().invoke(app, ["eval", "--model", "tiny", *data, "--protocol", "da3bench", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "testbed", "--beside", "e.json"), "--beside is drawn in --html and --plots"),
        (("--model", "nosuch"), "no installed adapter can build 'nosuch'"),
        (("--model", "testbed", "--data", "nosuch:here"), "data is named LAYOUT:PATH"),
        (("--model", "testbed", "--data", "blendedmvs:/no/such/folder"), "is no folder"),
        (("--model", "testbed", "--config", "keep_ratio"), "--config takes name=value"),
        (("--model", "testbed", "--config", "keep_ratio=2"), "keep_ratio must be in"),
        (("--model", "testbed", "--config", "nosuch=2"), "unknown configuration field"),
        (("--model", "testbed", "--data", "procedural:scenes=1,views=2,size=32", "--views", "4"), "has 2 views, asked for 4"),
        (("--model", "testbed", "--data", SCENES, "--rule", "nearest"), "nearest"),
    ],
)
def test_what_cannot_be_measured(arguments: tuple[str, ...], message: str) -> None:
    code, output = run(*arguments)
    assert code == 2
    assert message in output


def test_larger_files_have_options(tmp_path: Path) -> None:
    data = write_layout(render(views=3, height=24, width=32), "blendedmvs", tmp_path / "data")
    common = ("--model", "tiny", "--weights", "random", "--data", f"blendedmvs:{data}", "--views", "2")
    code, output = run(*common, "--max-pixels", "767")
    assert code == 2
    assert "has 768 pixels, more than the 767 that are read; make it smaller, or raise the limit with --max-pixels or" in output
    code, output = run(*common, "--max-bytes", "3KB")
    assert code == 2
    assert "bytes, more than the 3,000 that are read; raise the limit with --max-bytes or" in output
    code, output = run(*common, "--max-pixels", "768", "--max-bytes", "999999TB")
    assert code == 0, output


def test_photographs_have_no_reference(tmp_path: Path) -> None:
    from PIL import Image

    for i in range(2):
        Image.fromarray(torch.randint(0, 255, (48, 64, 3), dtype=torch.uint8).numpy()).save(tmp_path / f"{i}.png")
    code, output = run("--model", "testbed", "--data", f"images:{tmp_path}", "--views", "2")
    assert code == 2
    assert "has no cameras" in output
