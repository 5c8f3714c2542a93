"""`lite3r adapters`: what is installed."""

from __future__ import annotations

import dataclasses

import pytest
from commands import lite3r

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
