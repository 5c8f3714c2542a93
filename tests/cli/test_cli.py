"""The command line as users meet it: help, tables, errors in one line, files that can be read back."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image
from typer.testing import CliRunner, Result

import lite3r_plugin
from lite3r_adapters.testbed import model as testbed
from lite3r_plugin import hookimpl
from lite3r_plugin.adapter import plugins
from lite3r_plugin.adapter.models import ModelEntry
from lite3r_plugin.adapter.plugins import AdapterWarning
from lite3r_plugin.cli.app import app
from lite3r_plugin.testbed import Testbed, TestbedConfig
from lite3r_plugin.testbed.model import SHIPPED, WEIGHTS_NAME


class TinyPlugin:
    """A third party's plugin with one tiny model, which the VGGT adapter recognises by its structure."""

    @hookimpl
    def lite3r_models(self) -> dict[str, ModelEntry]:
        """The model ``tiny``."""
        entry = testbed.ENTRIES["testbed"]
        tiny = dataclasses.replace(
            entry, name="tiny", summary="a tiny model", create=lambda: Testbed(TestbedConfig(dim=64, depth=1)), default_weights=None
        )
        return {"tiny": tiny, "pairs": dataclasses.replace(tiny, name="pairs", min_views=2)}


@pytest.fixture(autouse=True)
def _tiny() -> Iterator[None]:
    plugin = TinyPlugin()
    plugins.get_manager().register(plugin, name="tiny")
    yield
    plugins.get_manager().unregister(plugin)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of three JPEGs with smooth colours."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        coarse = np.random.default_rng(i).integers(0, 255, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((192, 128), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")
    return folder


def lite3r(*args: object, code: int = 0) -> Result:
    """Run ``lite3r`` and check the exit code; an error must be one line."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output + repr(result.exception)
    if code == 2:
        assert "Traceback" not in result.output
    return result


def fails(*args: object) -> str:
    """The message of a run that must fail with an error of the package."""
    stderr = lite3r(*args, code=2).stderr.strip()
    line = stderr.splitlines()[-1]
    assert line.startswith("error: "), stderr
    return line


def test_help_and_version() -> None:
    for command in ("demo", "bench", "reconstruct", "adapters"):
        assert command in lite3r("--help").stdout
        assert "Usage" in lite3r(command, "--help").stdout
    assert lite3r("--version").stdout.strip() == f"lite3r-plugin {lite3r_plugin.__version__}"


def test_module_and_error_in_a_real_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lite3r_plugin", "reconstruct", "none", "--model", "testbed"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: none does not exist; name a folder with photographs of one scene"]


def test_adapters_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lite3r_plugin.cli.show.console.width", 200)
    out = lite3r("adapters").stdout
    for expected in ("vggt", "timm", "lite3r-plugin", "da3-small", "pi3", "tiny", "a tiny model"):
        assert expected in out


def test_adapter_warnings_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def list_adapters() -> list[object]:
        warnings.warn("the model adapter 'x' was skipped", AdapterWarning, stacklevel=2)
        warnings.warn("a library's own affair", FutureWarning, stacklevel=2)
        return []

    monkeypatch.setattr(plugins, "list_adapters", list_adapters)
    assert lite3r("adapters").stderr.splitlines() == ["warning: the model adapter 'x' was skipped"]


def test_reconstruct(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "scene.ply"
    result = lite3r("reconstruct", photos, "--model", "tiny", "--weights", "random", "--out", out, "--dense-below", 0, "--drop", 0)
    assert "geometry and its differences are meaningless" in result.stderr
    assert "global sites sparse-linear" in result.stdout
    cloud = trimesh.load(out)
    assert len(cloud.vertices) == 3 * 152 * 224
    colors = testbed.preprocess([Image.open(p) for p in sorted(photos.iterdir())]).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(cloud.colors[:, :3], (colors * 255).round().byte().reshape(-1, 3))
    with Image.open(tmp_path / "scene.png") as picture:
        assert picture.width > 500
    assert not (tmp_path / "scene.dense.ply").exists()


def test_compare_at_keep_ratio_one_is_exact(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "scene.ply"
    result = lite3r("reconstruct", photos, "--model", "tiny", "--weights", "random", "--out", out, "--compare", "--keep-ratio", 1)
    assert "0.00% / 0.00% / 0.0%" in result.stdout
    one, other = trimesh.load(out), trimesh.load(tmp_path / "scene.dense.ply")
    np.testing.assert_allclose(one.vertices, other.vertices, rtol=1e-4, atol=1e-4)


def test_short_sequences_run_dense_and_say_so(photos: Path, tmp_path: Path) -> None:
    result = lite3r("reconstruct", photos, "--model", "tiny", "--weights", "random", "--out", tmp_path / "a.ply", "--dense-below", 10**9)
    assert "Every site ran dense" in result.stdout


def test_dense_options(photos: Path, tmp_path: Path) -> None:
    common = ("reconstruct", photos, "--model", "tiny", "--weights", "random", "--out", tmp_path / "a.ply")
    result = lite3r(*common, "--dense", "--max-views", 1, "--max-points", 100, "--dtype", "bfloat16", "--repeats", 2)
    title = " ".join(result.stdout.split())  # the table, and so the line breaks of its title, is as wide as the times are long
    assert "1 views of" in title
    assert "bfloat16, median of 2" in title
    assert "Lite3R on" not in result.stdout
    assert len(trimesh.load(tmp_path / "a.ply").vertices) == 100


def test_images_of_different_sizes_are_announced(photos: Path, tmp_path: Path) -> None:
    Image.new("RGB", (90, 160), "red").save(photos / "tall.png")
    result = lite3r("reconstruct", photos, "--model", "tiny", "--weights", "random", "--out", tmp_path / "a.ply", "--dense")
    assert "2 different sizes; for tiny they are stretched to the first one's shape" in result.stderr


def test_wrong_inputs_are_refused_before_any_work(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelEntry, "build", lambda *_: pytest.fail("the model was built"))
    (tmp_path / "empty").mkdir()
    common = ("reconstruct", photos, "--model", "tiny", "--weights", "random")
    assert "must end in .ply" in fails(*common, "--out", tmp_path / "a.obj")
    assert "does not exist" in fails(*common, "--out", tmp_path / "none" / "a.ply")
    assert "exclude each other" in fails(*common, "--dense", "--compare")
    assert "keep_ratio must be in (0, 1]" in fails(*common, "--keep-ratio", 0)
    assert "choose one of" in fails("reconstruct", photos, "--model", "no-such-model")
    assert "it is empty" in fails("reconstruct", tmp_path / "empty", "--model", "tiny", "--out", tmp_path / "a.ply")
    assert "needs at least 2 images" in fails("reconstruct", photos, "--model", "pairs", "--max-views", 1, "--out", tmp_path / "a.ply")
    assert "is not available" in fails(*common, "--device", "no-such-device", "--out", tmp_path / "a.ply")
    assert "unknown dtype" in fails(*common, "--dtype", "int8", "--out", tmp_path / "a.ply")
    (photos / "3.jpg").write_bytes(b"not an image")
    assert "3.jpg cannot be read as an image" in fails(*common, "--out", tmp_path / "a.ply")
    assert "--max-views" in lite3r(*common, "--max-views", 0, code=2).stderr
    assert list(tmp_path.glob("*.ply")) == []


def test_weights_that_do_not_fit(photos: Path, tmp_path: Path) -> None:
    common = ("reconstruct", photos, "--model", "tiny", "--out", tmp_path / "a.ply", "--weights")
    assert "no weights file" in fails(*common, tmp_path / "none.safetensors")
    assert "no default weights" in fails(*common[:-1])
    Testbed(TestbedConfig(dim=64, depth=2)).save_pretrained(tmp_path / "other")
    assert "holds the weights of another model than Testbed" in fails(*common, tmp_path / "other")


@pytest.mark.skipif(importlib.util.find_spec("depth_anything_3") is None, reason="needs depth-anything-3")
def test_reconstruct_with_depth_anything_3(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "scene.ply"
    result = lite3r(
        "reconstruct", photos, "--model", "da3-small", "--weights", "random", "--max-views", 2, "--out", out, "--dense-below", 0
    )  # fmt: skip
    assert "da3-small: 2 views of 504 x 336 pixels" in result.stdout
    cloud = trimesh.load(out)
    assert len(cloud.vertices) > 100_000
    assert np.isfinite(cloud.vertices).all()
    assert cloud.colors[:, :3].std() > 10


def test_demo_on_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lite3r_plugin.cli.show.console.width", 160)
    result = lite3r("demo", "--out", tmp_path / "demo", "--views", 2, "--repeats", 1, "--weights", "random")
    for expected in ("depth against truth", "depth against dense", "Times on a CPU say nothing about a GPU", "sparse-linear"):
        assert expected in result.stdout
    assert sorted(p.name for p in (tmp_path / "demo").iterdir()) == ["demo.png", "dense.ply", "lite3r.ply"]
    assert len(trimesh.load(tmp_path / "demo" / "lite3r.ply").vertices) > 50_000


@pytest.mark.skipif(not (SHIPPED / WEIGHTS_NAME).is_file(), reason="needs the testbed's trained weights")
def test_demo(tmp_path: Path) -> None:
    assert "meaningless" not in lite3r("demo", "--out", tmp_path, "--views", 2, "--repeats", 1).stderr


def test_demo_that_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be made" in fails("demo", "--out", tmp_path / "file" / "demo", "--weights", "random")
