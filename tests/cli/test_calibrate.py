"""`lite3r calibrate`: a checkpoint that loads, and errors before any work."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import fails, lite3r

from lite3r_plugin import KeepRatioProfile, describe, load_lite3r
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.testbed import Testbed, TestbedConfig

OPTIONS = ("--model", "tiny", "--weights", "random", "--config", "dense_below=0", "--config", "block_q=32", "--config", "block_k=16")


def test_calibrate(photos: Path, tmp_path: Path) -> None:
    for i in range(4):
        shutil.copy(photos / f"{i % 3}.jpg", photos / f"{i + 3}.jpg")
    out = tmp_path / "new" / "fitted"
    result = lite3r("calibrate", photos, "--out", out, "--views", 2, "--keep-ratio", 0.2, *OPTIONS)
    assert "of 1 site on 3 inputs" in result.stdout
    assert "1 of 7 photographs not used" in result.stdout
    assert "means nothing" in result.stderr
    loaded = load_lite3r(Testbed(TestbedConfig(dim=64, depth=1)), out)
    assert describe(loaded).config.keep_ratio == 0.2
    (site,) = (site for site in lite3r_modules(loaded).values() if site.sparse)
    assert ("left as it came" in result.stdout) == (not site.proj_lin.weight.any())


def test_errors_before_any_work(photos: Path, tmp_path: Path) -> None:
    assert "twice 2; add some" in fails("calibrate", photos, "--out", tmp_path / "x", "--views", 2, *OPTIONS)
    assert "no installed adapter" in fails("calibrate", photos, "--out", tmp_path / "x", "--model", "nothing")
    assert not (tmp_path / "x").exists()
    assert "cannot be made" in fails("calibrate", photos, "--out", photos / "0.jpg", "--views", 1, *OPTIONS)
    assert "nothing written to it" in fails("calibrate", photos, "--out", "/proc", "--views", 1, *OPTIONS)


def test_ratios_of_an_earlier_run_stay_with_its_checkpoint(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a run cannot write its own."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lite3r_plugin.apply.checkpoint.save_lite3r", full)
    (tmp_path / "keep_ratios.json").write_text("those")
    assert "No space left" in fails("calibrate", photos, "--out", tmp_path, "--views", 1, "--keep-ratio", 0.2, *OPTIONS)
    assert (tmp_path / "keep_ratios.json").read_text() == "those"


@pytest.mark.slow
def test_ratios_are_chosen_first(photos: Path, tmp_path: Path) -> None:
    """They are in the checkpoint, and in a file that other commands take."""
    for i in range(4):
        shutil.copy(photos / f"{i % 3}.jpg", photos / f"{i + 3}.jpg")
    out = tmp_path / "fitted"
    result = lite3r("calibrate", photos, "--out", out, "--views", 2, "--keep-ratio", "auto", "--mean-keep-ratio", 0.3, *OPTIONS)
    assert "keep ratios chosen for 1 site" in result.stdout
    profile = KeepRatioProfile.load(out / "keep_ratios.json")
    assert profile.making.value == 0.3
    loaded = load_lite3r(Testbed(TestbedConfig(dim=64, depth=1)), out)
    assert describe(loaded).config.keep_ratio == profile
    again = lite3r("calibrate", photos, "--out", tmp_path / "again", "--views", 2, "--keep-ratio", out / "keep_ratios.json", *OPTIONS)
    assert "keep ratios chosen" not in again.stdout
    assert describe(load_lite3r(Testbed(TestbedConfig(dim=64, depth=1)), tmp_path / "again")).config.keep_ratio == profile
    assert KeepRatioProfile.load(tmp_path / "again" / "keep_ratios.json") == profile
    lite3r("calibrate", photos, "--out", out, "--views", 2, "--keep-ratio", 0.3, *OPTIONS)
    assert not (out / "keep_ratios.json").exists(), "that of another checkpoint"


def test_budgets_are_checked_before_any_work(photos: Path, tmp_path: Path) -> None:
    command = ("calibrate", photos, "--out", tmp_path / "x", "--views", 1, *OPTIONS)
    assert "--max-rel-error says how ratios are chosen: add --keep-ratio auto" in fails(*command, "--max-rel-error", 0.1)
    assert "one budget is kept" in fails(*command, "--keep-ratio", "auto", "--max-rel-error", 0.1, "--max-pose-loss", 1)
    assert "mean_keep_ratio must be in" in fails(*command, "--keep-ratio", "auto", "--mean-keep-ratio", 2)
    assert not (tmp_path / "x").exists()
