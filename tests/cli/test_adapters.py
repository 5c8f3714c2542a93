"""`lite3r adapters`: what is installed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from commands import fails, lite3r

from lite3r_adapters.testbed.model import ENTRIES
from lite3r_plugin.adapter import plugins


def test_adapters_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lite3r_plugin.cli.show.console.width", 200)
    out = lite3r("adapters").stdout
    for expected in ("vggt", "timm", "lite3r-plugin", "da3-small", "pi3", "tiny", "a tiny model"):
        assert expected in out


def test_texts_of_adapters_are_shown_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lite3r_plugin.cli.show.console.width", 200)
    odd = dataclasses.replace(ENTRIES["testbed"], summary="takes [B, S] and [/red]", library="no_such_package.inside", install="pip [all]")
    monkeypatch.setattr(plugins, "model_entries", lambda: {"odd[x]": odd})
    out = lite3r("adapters").stdout
    for expected in ("odd[x]", "takes [B, S] and [/red]", "missing: pip [all]"):
        assert expected in out


def test_eighty_columns_hold_names_ids_and_words_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lite3r_plugin.cli.show.console.width", 80)
    lines = lite3r("adapters").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for expected in ("da3nested-giant-large  ", "weights: depth-anything/DA3NESTED-GIANT-LARGE", "weights: come with the package"):
        assert expected in text


FILE = """
import torch
from lite3r_plugin.testbed import Testbed, TestbedConfig

def model():
    return Testbed(TestbedConfig(dim=64, depth=1)), (torch.rand(1, 2, 3, 64, 96),)

def nothing():
    return 3

def exits():
    raise SystemExit(0)

def broken():
    raise KeyError("no weights")
"""


def test_inspect_writes_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FILE)
    out = lite3r("adapters", "inspect", f"{tmp_path}/mine.py:model").stdout
    for expected in ("Testbed on [1, 2, 3, 64, 96]", "@hookimpl", "check_adapter: adapter 'sites=' is fine"):
        assert expected in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/mine.py"], "names no factory: write MODEL.py:factory"),
        (["{}/yours.py:model"], "there is no file"),
        (["{}/mine.py:other"], "has no function 'other'"),
        (["{}/mine.py:nothing"], "returned int: let it return a torch.nn.Module"),
        (["{}/mine.py:broken"], "failed: KeyError: 'no weights'"),
        (["{}/mine.py:exits"], "failed: SystemExit: 0"),
        (["no_such_package.here:model"], "failed: ModuleNotFoundError"),
        (["{}/mine.py:model", "--shape", "1,two"], "--shape is integers such as 1,2,3,224,224, got '1,two'"),
    ],
)
def test_what_cannot_be_inspected_is_said(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FILE)
    said = fails("adapters", "inspect", *(argument.format(tmp_path) for argument in arguments))
    assert message in said
