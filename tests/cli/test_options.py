"""One vocabulary: the same options, read and refused in the same way, in all commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from commands import fails, lite3r

from lite3r_plugin import Lite3RConfig
from lite3r_plugin.adapter.models import ModelEntry
from lite3r_plugin.cli.options import amount, config_fields, lite3r_config, numbers
from lite3r_plugin.errors import ConfigError, InputError
from lite3r_plugin.scene.reading import Limits

COMMON = {
    "demo": (),
    "bench": ("--model", "tiny"),
    "eval": ("--model", "tiny", "--weights", "random"),
    "reconstruct": ("PHOTOS", "--model", "tiny", "--weights", "random"),
}
OPTIONS = {
    "--model": {"bench", "eval", "reconstruct"},
    "--keep-ratio": set(COMMON),
    "--config": set(COMMON),
    "--device": set(COMMON),
    "--repeats": {"demo", "bench", "reconstruct"},
    "--weights": {"demo", "eval", "reconstruct"},
    "--dtype": {"eval", "reconstruct"},
    "--json": {"eval", "bench"},
    "--max-pixels": {"eval", "reconstruct"},
    "--max-bytes": {"eval", "reconstruct"},
}


@pytest.fixture
def refused(photos: Path, monkeypatch: pytest.MonkeyPatch):
    """The message of a command that must fail before it builds a model."""
    monkeypatch.setattr(ModelEntry, "build", lambda *_: pytest.fail("the model was built"))
    return lambda command, *options: fails(command, *(photos if part == "PHOTOS" else part for part in COMMON[command]), *options)


def test_config_fields() -> None:
    assert config_fields(None) == {}
    assert config_fields(["block_means=false", "linear_branch=none", 'keep_ratio={"a.*": 0.5}'], None) == {
        "block_means": False,
        "linear_branch": "none",
        "keep_ratio": {"a.*": 0.5},
    }
    assert config_fields(["dense_below=0"], "0.5") == {"keep_ratio": 0.5, "dense_below": 0}
    assert lite3r_config(["dense_below=5"], None, dense_below=0, block_means=False).dense_below == 5
    with pytest.raises(InputError, match="takes name=value"):
        config_fields(["keep_ratio"])
    with pytest.raises(InputError, match="given twice"):
        config_fields(["keep_ratio=0.2"], "0.1")
    with pytest.raises(ConfigError, match="unknown configuration field"):
        config_fields(["keep_rate=0.2"])
    with pytest.raises(ConfigError, match="keep_ratio must be in"):
        config_fields(None, "2.0")


def test_numbers() -> None:
    assert numbers("2,4, 8", "--views") == [2, 4, 8]
    with pytest.raises(InputError, match="--views takes numbers"):
        numbers("two", "--views")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("50000000", 50_000_000),
        ("200M", 200_000_000),
        ("4GB", 4 * 10**9),
        ("4 gib", 4 * 2**30),
        ("1.5k", 1500),
        ("0.5TiB", 2**39),
        ("7b", 7),
    ],
)
def test_amounts(text: str, number: int) -> None:
    assert amount(text, "--max-bytes") == number


@pytest.mark.parametrize("text", ["", "0", "0.9", "-1", "1e9", "GB", "4 G B", "4X", "4i", "inf", "٣", "9" * 5000])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(InputError, match="--max-bytes takes a number above 0, such as 50000000, 200M or 4GB, got "):
        amount(text, "--max-bytes")


@pytest.mark.parametrize("command", ["eval", "reconstruct"])
def test_amounts_are_checked_before_any_work(command: str, refused) -> None:
    assert "--max-pixels takes a number above 0" in refused(command, "--max-pixels", "many")
    assert "--max-bytes takes a number above 0" in refused(command, "--max-bytes", "many")


@pytest.mark.parametrize("command", ["eval", "reconstruct"])
def test_the_help_tells_the_limits_that_hold(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    defaults = re.findall(r"--max-(?:pixels|bytes).*by default (\w+)\.", lite3r(command, "--help").stdout)
    pixels, size = (amount(default, "default") for default in defaults)
    assert Limits(pixels, size) == Limits()


@pytest.mark.parametrize("command", COMMON)
def test_the_help_tells_the_default_keep_ratio(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert re.search(rf"--keep-ratio .*by default {Lite3RConfig.keep_ratio}\.", lite3r(command, "--help").stdout)


@pytest.mark.parametrize("command", COMMON)
def test_every_command_has_the_options_of_the_vocabulary(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = lite3r(command, "--help").stdout
    assert {option for option in OPTIONS if f"{option} " in text} == {option for option, having in OPTIONS.items() if command in having}


@pytest.mark.parametrize("command", COMMON)
def test_wrong_fields_are_refused_before_any_work(command: str, refused) -> None:
    assert "unknown configuration field(s) ['keep_rate']" in refused(command, "--config", "keep_rate=0.2")
    assert "keep_ratio must be in (0, 1]" in refused(command, "--keep-ratio", 0)
    assert "keep_ratio is given twice" in refused(command, "--keep-ratio", 0.5, "--config", "keep_ratio=0.5")
    assert "--keep-ratio takes a number in (0, 1], a *.json file" in refused(command, "--keep-ratio", "few")
    assert "none.json cannot be read" in refused(command, "--keep-ratio", "none.json")


@pytest.mark.parametrize("command", COMMON)
def test_ratios_are_chosen_by_another_command(command: str, refused) -> None:
    for option in (("--keep-ratio", "auto"), ("--config", "keep_ratio=auto")):
        assert "chosen from photographs by `lite3r calibrate --keep-ratio auto`" in refused(command, *option)


@pytest.mark.parametrize("command", COMMON)
def test_devices_that_are_not_there_are_named(command: str, refused) -> None:
    assert "the device 'no-such-device' is not available" in refused(command, "--device", "no-such-device")
    if not torch.cuda.is_available():
        assert "the device 'cuda' is not available" in refused(command, "--device", "cuda")


@pytest.mark.parametrize("command", ["bench", "eval"])
def test_models_that_are_not_there_are_named(command: str) -> None:
    assert "no installed adapter can build 'no-such-model'; choose one of" in fails(command, "--model", "no-such-model")
