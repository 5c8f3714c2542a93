"""`benchmarks/quality_auto.py`: chosen ratios beside one for all compute as much, on the same scenes, and everything is stored."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest

from lite3r_plugin import KeepRatioProfile

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OPTIONS = "--device cpu --views 3 --keep-ratios 0.3 --scenes 2 --size 48 --block-q 16 --block-k 16 --calibration 2 --judged 2 --batch 2"


@pytest.mark.slow
def test_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("quality_auto")
    monkeypatch.setattr(sys, "argv", ["quality_auto.py", *OPTIONS.split(), "--json", str(tmp_path / "auto.json")])
    script.main()
    group = json.loads((tmp_path / "auto.json").read_text())["groups"]["3"]
    assert list(group["rows"]) == ["dense", "uniform 0.3", "auto 0.3", "uniform + calibrate 0.3", "auto + calibrate 0.3"]
    density = {name: row["density"] for name, row in group["rows"].items()}
    assert density["auto 0.3"] <= density["uniform 0.3"] + 1e-9 < 1 == density["dense"]
    assert density["auto + calibrate 0.3"] == density["auto 0.3"]
    assert {len(values) for of in group["values"].values() for values in of.values()} == {group["scenes"]}
    assert len(KeepRatioProfile.from_dict(group["profiles"]["0.3"])) == 6
    assert set(group["gains"]) == {"auto 0.3 - uniform 0.3", "auto + calibrate 0.3 - uniform + calibrate 0.3"}
    assert "auto + calibrate 0.3 - uniform + calibrate 0.3: AUC@30" in capsys.readouterr().out


@pytest.mark.slow
def test_choices_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """They compute as much, and differ; nothing is chosen or calibrated."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("quality_auto")
    options = f"{OPTIONS} --uniform-only --calibration 0 --block-choices mean error --json {tmp_path / 'choices.json'}"
    monkeypatch.setattr(sys, "argv", ["quality_auto.py", *options.split()])
    script.main()
    group = json.loads((tmp_path / "choices.json").read_text())["groups"]["3"]
    assert list(group["rows"]) == ["dense", "uniform by mean 0.3", "uniform by error 0.3"]
    by_mean, by_error = (group["rows"][name] for name in ("uniform by mean 0.3", "uniform by error 0.3"))
    assert by_mean["density"] == by_error["density"] < 1
    assert by_mean["AbsRel"]["mean"] != by_error["AbsRel"]["mean"]
    gain = group["gains"]["uniform by error 0.3 - uniform by mean 0.3"]
    assert gain["AbsRel"]["difference"] == pytest.approx(by_error["AbsRel"]["mean"] - by_mean["AbsRel"]["mean"])
    assert "uniform by error 0.3 - uniform by mean 0.3: AUC@30" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["quality_auto.py", *OPTIONS.split(), "--calibration", "0"])
    with pytest.raises(SystemExit):
        script.main()


@pytest.mark.slow
def test_another_pin_at_equal_density(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer queries pinned, all others get a greater ratio and compute as much."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("quality_auto")
    options = f"{OPTIONS} --pin reference_keys --plain --json {tmp_path / 'plain.json'}".replace("--size 48", "--size 112")
    monkeypatch.setattr(sys, "argv", ["quality_auto.py", *options.split()])
    script.main()
    group = json.loads((tmp_path / "plain.json").read_text())["groups"]["3"]
    density = {name: row["density"] for name, row in group["rows"].items()}
    assert list(density)[:3] == ["dense", "plain + calibrate 0.3", "uniform 0.3"]
    assert density["uniform 0.3"] == pytest.approx(density["plain + calibrate 0.3"], abs=0.02)
    assert {"auto + calibrate 0.3 - plain + calibrate 0.3", "uniform + calibrate 0.3 - plain + calibrate 0.3"} <= set(group["gains"])


def test_the_ratio_that_computes_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth pinned, and a quarter of the rest: 0.325. For 0.55 half of the rest is needed."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("quality_auto")
    assert script.as_much(0.25, 0.325, 0.55) == pytest.approx(0.5)
    assert script.as_much(0.25, 0.325, 0.325) == pytest.approx(0.25)
    assert script.as_much(1.0, 1.0, 1.0) == 1


def test_arms_that_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every choice of blocks has its auto beside its uniform, and beside the first choice."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("quality_auto")
    args = argparse.Namespace(keep_ratios=[0.5], block_choices=["mean", "error"], uniform_only=False, calibration=2, plain=False)
    found = script.pairs(args)
    plain = {
        ("uniform by mean 0.5", "auto by mean 0.5"),
        ("uniform by error 0.5", "auto by error 0.5"),
        ("uniform by mean 0.5", "uniform by error 0.5"),
        ("auto by mean 0.5", "auto by error 0.5"),
    }
    assert len(found) == 8
    assert {pair for pair in found if "calibrate" not in pair[0]} == plain
    assert ("uniform + calibrate by mean 0.5", "uniform + calibrate by error 0.5") in found
