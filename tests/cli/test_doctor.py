"""`lite3r doctor`: a report for people, and one for programs."""

from __future__ import annotations

import json
from pathlib import Path

from commands import fails, lite3r

FILE = """
import torch
from lite3r_plugin.testbed import Testbed, TestbedConfig

def model():
    return Testbed(TestbedConfig(dim=64, depth=1)), (torch.rand(1, 2, 3, 64, 96),)
"""


def test_report_and_numbers(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    out = lite3r("doctor", "tiny", "--views", 2, "--resolution", 32, "--device", "cpu", "--memory", "1GB", "--json", path).stdout
    for expected in ("Testbed on cpu", "views fit into 0.9 GiB", "What would pay here (estimates)"):
        assert expected in out
    stored = json.loads(path.read_text())
    assert stored["images"] == [[1, 2, 3, 32, 32]]
    assert stored["views"]["memory"] == 10**9


def test_a_model_of_ones_own_runs_on_its_own_inputs(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FILE)
    assert "given [1, 2, 3, 64, 96]" in lite3r("doctor", f"{tmp_path}/mine.py:model", "--device", "cpu").stdout


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    assert "memory is a number of bytes" in fails("doctor", "tiny", "--device", "cpu", "--memory", "much")
    assert "no installed adapter can build 'huge'" in fails("doctor", "huge")
    assert "must end in .json" in fails("doctor", "tiny", "--json", tmp_path / "r.txt")
    assert "does not run on what it was given" in fails("doctor", "tiny", "--device", "cpu", "--resolution", 17)


def test_by_default_images_are_of_a_size_that_the_model_takes() -> None:
    assert "given [1, 1, 3, 224, 224]" in lite3r("doctor", "tiny", "--views", 1, "--device", "cpu").stdout


def test_a_model_without_inputs_and_options_that_its_factory_answers_are_refused(tmp_path: Path) -> None:
    (tmp_path / "alone.py").write_text("from torch import nn\n\n\ndef make():\n    return nn.Linear(2, 2)\n")
    alone = f"{tmp_path / 'alone.py'}:make"
    assert f"{alone} returned a model alone: let it return a pair of that and its inputs" in fails("doctor", alone)
    for option in ("--views", "--resolution", "--seed"):
        assert f"{alone} gives its own images: leave out --views, --resolution and --seed" in fails("doctor", alone, option, 3)
