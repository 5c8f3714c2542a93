"""`lite3r distill`, and the module of the same name."""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path

import pytest
import torch
from commands import fails, lite3r

import lite3r_plugin
from lite3r_plugin import describe, load_lite3r
from lite3r_plugin.testbed import Testbed, TestbedConfig
from lite3r_plugin.training.checkpoint import saved_step

RECIPE = """
[model]
name = "tiny"
weights = "random"
config = {{keep_ratio = 0.15, block_q = 16, block_k = 16, precision = "{precision}"}}

[data]
source = "procedural:scenes=2,views=3,size=48"
views = 3
size = 48
draws = 1

{validation}
[distill]
steps = 2
trainable = "{trainable}"
task = 0.1

[output]
dir = "{folder}"
convert = {convert}
"""


VALIDATION = """
[validation]
source = "procedural:scenes=1,views=3,size=48,seed=5"
views = 3
size = [48, 48]
draws = 1
"""


def recipe(
    tmp_path: Path, trainable: str = "proj", precision: str = "full", convert: str = "false", validation: str = "", **replaced: str
) -> Path:
    text = RECIPE.format(folder=tmp_path / "out", trainable=trainable, precision=precision, convert=convert, validation=validation)
    for old, new in replaced.items():
        text = text.replace(old, new)
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def loaded(tmp_path: Path) -> Testbed:
    """What was written, in a model as `random` makes it."""
    torch.manual_seed(0)
    return load_lite3r(Testbed(TestbedConfig(dim=64, depth=1)).eval(), tmp_path / "out" / "model")


def test_trains_and_writes_what_can_be_loaded(tmp_path: Path) -> None:
    file = recipe(tmp_path)
    assert "2 steps, 2 samples" in lite3r("distill", file).output
    model = loaded(tmp_path)
    assert all(value.any() for name, value in model.state_dict().items() if "proj_lin" in name)
    assert "is not empty" in fails("distill", file)
    lite3r("distill", file, "--resume", "--set", "steps=3")
    assert saved_step(tmp_path / "out") == 3


@pytest.mark.slow
def test_lora_is_folded_in_and_converted(tmp_path: Path) -> None:
    file = recipe(tmp_path, "proj+lora", "fp8_qat", "true", VALIDATION)
    assert "best validation" in lite3r("distill", file).output
    assert describe(loaded(tmp_path)).phase == "fp8"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[data]", "[dates]", r"unknown ['dates']; the tables are"),
        ("draws = 1", "drawn = 1", "[data] has unknown ['drawn']; it takes source"),
        ("views = 3\n", "views = 0\n", "[data] views cannot be 0"),
        ("size = 48\n", 'size = "big"\n', "[data] size cannot be 'big'"),
        ('name = "tiny"', "", "the table [model] with name is missing"),
        ("keep_ratio = 0.15", "keep = 0.15", "unknown configuration field(s) ['keep']"),
        ("steps = 2", "steps = 0", "steps is an integer >= 1"),
        ('name = "tiny"', 'name = "tyni"', "tyni"),
        ("scenes=2", "scenes=0", "scenes >= 1"),
        ("views = 3\n", "views = 4\n", "has 3 views, asked for 4"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(old: str, new: str, says: str, tmp_path: Path) -> None:
    assert says in fails("distill", recipe(tmp_path, **{old: new}))


def test_settings_of_the_command_line() -> None:
    assert "no.toml cannot be read" in fails("distill", "no.toml")
    assert "--set takes name=value" in fails("distill", "no.toml", "--set", "steps")


def test_the_module_is_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["distill", str(tmp_path / "none.toml")])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("lite3r_plugin.distill", run_name="__main__")
    assert end.value.code == 2
    assert "none.toml cannot be read" in capsys.readouterr().err


def test_the_module_does_not_hide_the_function() -> None:
    with pytest.raises(ImportError, match=r"lite3r_plugin\.distill is a function, from lite3r_plugin import distill"):
        importlib.import_module("lite3r_plugin.distill")
    assert callable(lite3r_plugin.distill)
