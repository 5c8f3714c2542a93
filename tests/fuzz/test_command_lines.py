"""Command lines of hostile options: each ends with an exit code and words, never in a traceback.

``--fuzz-seconds`` makes it go on for longer, from another seed each time.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from lite3r_adapters.testbed.model import ENTRIES
from lite3r_plugin import hookimpl
from lite3r_plugin.adapter.models import ModelEntry
from lite3r_plugin.adapter.plugins import get_manager
from lite3r_plugin.cli.app import app
from lite3r_plugin.testbed import Testbed, TestbedConfig

TRIES = 6
DIGITS = "9" * 5000
WORDS = [
    "",
    " ",
    "-",
    "--",
    "=",
    "x",
    "0",
    "-1",
    "1",
    "2.5",
    "nan",
    "inf",
    "1e9",
    DIGITS,
    "a" * 300,
    "[/red]",
    "é∞",
    "../..",
    "null",
    "[" * 2000,
]
CONFIGS = [
    "keep_ratio=0.5", "dense_below=0", "dense_below=null", f"dense_below={DIGITS}", "keep_ratio=NaN", 'keep_ratio={"a": 1}',
    "keep_ratio={}",
    'scopes=["global", "global"]', "scopes=global", "pin=[1]", "block_q=0", "preset=fast", "precision=fp8", "keep_ratio", "=1", "a=b=c",
    f"block_k={'[' * 50_000}", "fp8_filter=[]", "block_means=1", "linear_branch=none",
]  # fmt: skip
OPTIONS = {
    "--model": ["tiny", "tiny", "tiny", "nosuch", "[/red]"],
    "--weights": ["random", "random", "nosuch.safetensors", "a/b/c", "a" * 300],
    "--keep-ratio": ["0.5", "0", "nan", "-inf", "1e-300"],
    "--config": CONFIGS,
    "--device": ["cpu", "cpu", "meta", "cuda:99", "cpu:-1", DIGITS, "mps"],
    "--dtype": ["float32", "bfloat16", "int8", ""],
    "--repeats": ["1", "0", "-1", "x"],
    "--views": ["1", "2", "1,2", "0", ",", "2,x", DIGITS],
    "--json": ["out.json", "out.txt", "none/out.json", "a" * 300 + ".json", "", "."],
    "--every": ["1", "0", "nan", "-1", "1e-300"],
    "--out": [
        "out.ply",
        "out.glb",
        "out.npz",
        "transforms.json",
        "a.colmap",
        "a.html",
        "photos",
        "a.obj",
        "none/a.ply",
        "a" * 300 + ".ply",
        "",
        "file",
    ],
    "--seed": ["0", "-1", DIGITS, "18446744073709551616"],
    "--data": [
        "procedural:scenes=1,views=2,size=64",
        "procedural:scenes=0",
        "procedural:scenes=x",
        "nosuch:x",
        "images:photos",
        "images:",
        "",
    ],
    "--scenes": ["1", "0"],
    "--draws": ["1", "0"],
    "--max-points": ["100", "0", DIGITS],
    "--max-views": ["1", "0"],
    "--drop": ["0", "100", "nan"],
    "--max-pixels": ["10M", "10", "0", "1e9", DIGITS],
    "--max-bytes": ["999999TB", "1GiB", "10", "GB", DIGITS],
    "--variants": ["stock", "lite3r", "strong", "nosuch", "", ","],
    "--resolution": ["16", "17", "0", DIGITS],
    "--time-budget": ["0", "nan", "-1"],
}
COMMANDS = {
    "adapters": [],
    "bench": ["--model", "tiny", "--views", "1", "--resolution", "16", "--repeats", "1", "--variants", "stock,lite3r", "--device", "cpu"],
    "eval": ["--model", "tiny", "--weights", "random", "--data", "procedural:scenes=1,views=2,size=64", "--views", "2", "--device", "cpu"],
    "reconstruct": ["photos", "--model", "tiny", "--weights", "random", "--device", "cpu", "--max-views", "1"],
    "demo": ["--weights", "nosuch.safetensors"],
    "nosuch": [],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder in which commands run, with photographs, and a tiny model that they know."""

    class Tiny:
        @hookimpl
        def lite3r_models(self) -> dict[str, ModelEntry]:
            small = TestbedConfig(dim=64, depth=1)
            return {"tiny": dataclasses.replace(ENTRIES["testbed"], name="tiny", create=lambda: Testbed(small), default_weights=None)}

    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 48), "gray").save(tmp_path / "photos" / "1.png")
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    get_manager().register(Tiny(), name="tiny")
    yield tmp_path
    get_manager().unregister(name="tiny")


def options_of(command: str) -> set[str]:
    """The options that a command has."""
    commands: Any = typer.main.get_command(app)
    return {name for parameter in commands.commands[command].params for name in parameter.opts} if command in commands.commands else set()


def command_line(r: random.Random) -> list[str]:
    command = r.choice(list(COMMANDS))
    line = [command, *COMMANDS[command]]
    fitting = [option for option in OPTIONS if option in options_of(command)] or list(OPTIONS)
    for option in r.sample(fitting if r.random() < 0.9 else list(OPTIONS), min(len(fitting), r.randrange(1, 4))):
        value = r.choice(WORDS) if r.random() < 0.2 and option != "--repeats" else r.choice(OPTIONS[option])
        line += [option, value]
    return line if r.random() < 0.9 else [*line, r.choice(WORDS)]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_command_lines(seed: int, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = pytestconfig.getoption("--fuzz-seconds")
    r, end = random.Random(seed if seconds is None else None), time.monotonic() + (seconds or 0)
    found: Counter[int] = Counter()
    while found.total() < TRIES or time.monotonic() < end:
        line = command_line(r)
        result = CliRunner().invoke(app, line)
        shown = [word[:40] for word in line]
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise AssertionError(f"{shown} raised") from result.exception
        assert result.exit_code in (0, 2), shown
        assert "Traceback" not in result.output, shown
        assert result.exit_code == 0 or result.output.strip(), shown
        found[result.exit_code] += 1
    with capsys.disabled():
        print(f"\ncommand lines by exit code: {dict(found)}")  # noqa: T201
    assert found[2] > 0
