"""The live page: served by viser, with both runs."""

from __future__ import annotations

import importlib.util
import urllib.request

import pytest
from reconstructions import EVIL, wall

from lite3r_plugin.errors import InputError
from lite3r_plugin.scene.export import Facts, live_page


def test_live_page() -> None:
    pytest.importorskip("viser")
    facts = Facts(f"a run {EVIL}", ("", "time"), (("dense", "1 s"), ("lite3r", "2\ns")), ("a note",))
    server = live_page({"dense": wall((0, 0, 1)), "lite3r": wall((0, 1, 0))}, facts, port=18080)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.get_port()}") as answer:
            assert b"<html" in answer.read()
    finally:
        server.stop()


@pytest.mark.parametrize("host", ["nobody.invalid", "192.0.2.1", "", "a" * 300])
def test_a_host_that_is_none_of_this_machine_is_refused(host: str) -> None:
    pytest.importorskip("viser")
    with pytest.raises(InputError, match=r"nothing can be served at the host .*; 127.0.0.1 is for this machine alone"):
        live_page({"dense": wall((0, 0, 1))}, Facts("a"), host=host)


def test_without_viser_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "viser" else find(name))
    with pytest.raises(InputError, match=r"pip install 'lite3r-plugin\[viewer\]'"):
        live_page({"dense": wall((0, 0, 1))}, Facts("a"))
