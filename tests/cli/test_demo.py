"""`lite3r demo`: the whole path on a rendered room, and what people see of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trimesh
from commands import fails, lite3r
from PIL import Image

from lite3r_plugin import Lite3RConfig
from lite3r_plugin.cli.demo import _with_more_views
from lite3r_plugin.testbed.model import SHIPPED, WEIGHTS_NAME

FILES = ["demo.html", "demo.png", "dense.ply", "lite3r.ply", "truth.ply"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lite3r_plugin.cli.demo.SIZE", 112)


def demo(out: Path, *options: object) -> str:
    return lite3r("demo", "--out", out, "--views", 2, "--device", "cpu", *options).stdout


def test_demo_on_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lite3r_plugin.cli.show.console.width", 160)
    out = tmp_path / "demo"
    said = demo(out, "--weights", "random")
    for expected in (
        "depth against truth",
        "of the attention scores",
        "forced here (dense_below=0)",
        "sparse-linear",
        f"{out.as_uri()}/demo.html",
    ):
        assert expected in said
    assert sorted(p.name for p in out.iterdir()) == FILES
    assert len(trimesh.load(out / "lite3r.ply").vertices) > 15_000


@pytest.mark.skipif(not (SHIPPED / WEIGHTS_NAME).is_file(), reason="needs the testbed's trained weights")
def test_demo(tmp_path: Path) -> None:
    demo(tmp_path)
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.width > 1000
        assert np.asarray(picture.convert("RGB")).std() > 30
    # Clouds are in the frame and the unit of the truth.
    clouds = {name: trimesh.load(tmp_path / f"{name}.ply").vertices for name in ("truth", "dense", "lite3r")}
    for name in ("dense", "lite3r"):
        np.testing.assert_allclose(np.median(clouds[name], 0), np.median(clouds["truth"], 0), atol=0.4)
    page = (tmp_path / "demo.html").read_text()
    for name in clouds:
        assert f'"name":"{name}"' in page


def test_demo_that_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be made" in fails("demo", "--out", tmp_path / "file" / "demo", "--weights", "random")


def test_what_it_says_of_more_views_is_true_of_the_configuration() -> None:
    """With 100 views of equal size, of which one is pinned, in blocks of 64."""
    every = Lite3RConfig(keep_ratio=0.1)
    kept = 0.1 + 1 / 64
    assert f"to {1 - 0.99**2 * (1 - kept):.0%} with 100" in _with_more_views(every.replace(pin="reference"))
    assert f"to {1 - 0.99 * (1 - kept):.0%} with 100" in _with_more_views(every.replace(pin="reference_keys"))
    assert f"to {1 - 0.99**2 * 0.9:.0%} with 100" in _with_more_views(every.replace(block_means=False))
    assert _with_more_views(every.replace(pin="special")) == _with_more_views(every.replace(pin="none")) == ""
    assert _with_more_views(every.replace(keep_ratio={"*": 0.5})).endswith("with more views.")
