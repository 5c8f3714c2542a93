"""`lite3r adapters`: what is installed."""

from __future__ import annotations

import pytest
from commands import lite3r


def test_adapters_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lite3r_plugin.cli.show.console.width", 200)
    out = lite3r("adapters").stdout
    for expected in ("vggt", "timm", "lite3r-plugin", "da3-small", "pi3", "tiny", "a tiny model"):
        assert expected in out
