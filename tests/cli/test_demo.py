"""`lite3r demo`: the whole path on a rendered scene."""

from __future__ import annotations

from pathlib import Path

import pytest
import trimesh
from commands import fails, lite3r

from lite3r_plugin.testbed.model import SHIPPED, WEIGHTS_NAME


def test_demo_on_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lite3r_plugin.cli.show.console.width", 160)
    result = lite3r("demo", "--out", tmp_path / "demo", "--views", 1, "--repeats", 1, "--weights", "random")
    for expected in ("depth against truth", "depth against dense", "Times on a CPU say nothing about a GPU", "sparse-linear"):
        assert expected in result.stdout
    assert sorted(p.name for p in (tmp_path / "demo").iterdir()) == ["demo.png", "dense.ply", "lite3r.ply"]
    assert len(trimesh.load(tmp_path / "demo" / "lite3r.ply").vertices) > 25_000


@pytest.mark.skipif(not (SHIPPED / WEIGHTS_NAME).is_file(), reason="needs the testbed's trained weights")
def test_demo(tmp_path: Path) -> None:
    assert "meaningless" not in lite3r("demo", "--out", tmp_path, "--views", 1, "--repeats", 1).stderr


def test_demo_that_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be made" in fails("demo", "--out", tmp_path / "file" / "demo", "--weights", "random")
