"""`lite3r view`: what was reconstructed, as a page."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import socket
from pathlib import Path

import pytest
from commands import fails, lite3r
from reconstructions import wall

from lite3r_plugin.scene.export import RECORD, Facts, load, save

FACTS = Facts("a run", ("", "time"), (("dense", "1 s"), ("lite3r", "2 s")), ("a note",))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "scene", {"dense": wall((0, 0, 1)), "lite3r": wall((0, 1, 0))}, FACTS)
    return tmp_path / "scene"


def test_a_folder_becomes_a_page_with_both_runs(folder: Path) -> None:
    runs, facts = load(folder)
    assert list(runs) == ["dense", "lite3r"]
    assert facts == FACTS
    out = folder.parent / "again.html"
    assert f"wrote {out}" in lite3r("view", folder, "--out", out).stdout
    assert out.read_text() == (folder / "scene.html").read_text()


def test_an_archive_becomes_a_page(folder: Path) -> None:
    out = folder.parent / "a.html"
    lite3r("view", folder / "scene.npz", "--out", out)
    assert '"name":"scene"' in out.read_text()


def test_the_live_page_ends_with_ctrl_c(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("viser")

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lite3r_plugin.cli.view.wait", interrupt)
    assert "look around at http://localhost:" in lite3r("view", folder, "--port", 18200).stdout
    with contextlib.suppress(OSError):  # of a machine without IPv6
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        assert "look around at http://[::1]:" in lite3r("view", folder, "--port", 18200, "--host", "::1").stdout


def test_what_cannot_be_shown_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = folder.parent / "a.html"
    assert "is opened by a browser" in fails("view", folder / "scene.html")
    assert "is for other viewers" in fails("view", folder / "scene.ply")
    assert "is missing" in fails("view", folder / "none.npz", "--out", out)
    assert "must end in .html" in fails("view", folder, "--out", folder.parent / "a.png")
    assert "wrote: it has no lite3r.json" in fails("view", folder.parent, "--out", out)
    assert "nothing can be served at the host '192.0.2.1'" in fails("view", folder, "--host", "192.0.2.1")
    for damage in ("{", "[]", '{"title": 1}', json.dumps({"run": "a", "title": "a", "columns": [1], "rows": [], "notes": []})):
        (folder / RECORD).write_text(damage)
        assert "is damaged" in fails("view", folder, "--out", out)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "viser" else find(name))
    assert "pip install 'lite3r-plugin[viewer]'" in fails("view", folder)


def test_reconstruct_serves_at_the_end(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = []
    monkeypatch.setattr("lite3r_plugin.cli.reconstruct.serve", lambda *what: served.append(what))
    common = ("reconstruct", photos, "--model", "tiny", "--weights", "random", "--max-views", 2, "--out", tmp_path / "a.ply", "--view")
    lite3r(*common, "--dense", "--port", 9000)
    ((runs, facts, host, port),) = served
    assert list(runs) == ["dense"]
    assert facts.title.startswith("tiny: 2 views")
    assert (host, port) == ("127.0.0.1", 9000)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "viser" else find(name))
    assert "pip install 'lite3r-plugin[viewer]'" in fails(*common)
