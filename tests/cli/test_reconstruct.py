"""`lite3r reconstruct`: files that can be read back, errors in one line before any work."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pycolmap
import pytest
import trimesh
from commands import fails, lite3r
from PIL import Image
from videos import write_video

from lite3r_adapters.testbed import model as testbed
from lite3r_plugin.adapter.models import ModelEntry
from lite3r_plugin.testbed import Testbed, TestbedConfig


def test_reconstruct(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "scene.ply"
    result = lite3r("reconstruct", photos, "--model", "tiny", "--weights", "random", "--out", out, "--config", "dense_below=0", "--drop", 0)
    assert "geometry and its differences are meaningless" in result.stderr
    assert "global site sparse-linear" in result.stdout
    cloud = trimesh.load(out)
    assert len(cloud.vertices) == 3 * 152 * 224
    colors = testbed.preprocess([Image.open(p) for p in sorted(photos.iterdir())]).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(cloud.colors[:, :3], (colors * 255).round().byte().reshape(-1, 3))
    with Image.open(tmp_path / "scene.png") as picture:
        assert picture.width > 500
    assert not (tmp_path / "scene.dense.ply").exists()


def test_compare_at_keep_ratio_one_is_exact(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "scene"
    result = lite3r("reconstruct", photos, "--model", "tiny", "--weights", "random", "--out", out, "--compare", "--keep-ratio", 1)
    assert "0.00% / 0.00% / 0.0%" in result.stdout
    assert "transforms.json, images, sparse/0, dense_run" in result.stdout
    one, other = trimesh.load(out / "scene.ply"), trimesh.load(out / "dense_run" / "scene.ply")
    np.testing.assert_allclose(one.vertices, other.vertices, rtol=1e-4, atol=1e-4)


def test_larger_photographs_have_an_option(photos: Path, tmp_path: Path) -> None:
    common = ("reconstruct", photos, "--model", "tiny", "--weights", "random", "--out", tmp_path / "a.ply", "--dense", "--max-pixels")
    assert (
        "0.jpg has 24,576 pixels, more than the 24,575 that are read; make it smaller, or raise the limit with --max-pixels or "
        in fails(*common, 24_575)
    )
    lite3r(*common, "24.576k")


def test_short_sequences_run_dense_and_say_so(photos: Path, tmp_path: Path) -> None:
    result = lite3r(
        "reconstruct", photos, "--model", "tiny", "--weights", "random", "--out", tmp_path / "a.ply", "--config", f"dense_below={10**9}"
    )
    assert f"Nothing was sparse: with so few tokens nothing is left out at dense_below={10**9}" in result.stderr
    assert "nothing sparse" in result.stdout
    assert "points, lite3r" not in result.stdout


def test_on_a_cpu_nothing_is_sparse_unless_asked_for(photos: Path, tmp_path: Path) -> None:
    common = ("reconstruct", photos, "--model", "tiny", "--weights", "random", "--device", "cpu", "--out", tmp_path / "a.ply")
    result = lite3r(*common)
    assert "Nothing was sparse: without a CUDA GPU sparse attention does not pay (dense_below=0 runs it anyway)" in result.stderr
    assert "points, nothing sparse" in result.stdout
    result = lite3r(*common, "--config", "dense_below=0")
    assert "Nothing was sparse" not in result.stderr
    assert "points, lite3r" in result.stdout


def test_dense_options(photos: Path, tmp_path: Path) -> None:
    common = ("reconstruct", photos, "--model", "tiny", "--weights", "random", "--out", tmp_path / "a.ply")
    result = lite3r(*common, "--dense", "--max-views", 1, "--max-points", 100, "--dtype", "bfloat16", "--repeats", 2)
    title = " ".join(result.stdout.split())  # the table, and so the line breaks of its title, is as wide as the times are long
    assert "1 view of" in title
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
    assert "must end in .ply, .glb" in fails(*common, "--out", tmp_path / "a.obj")
    assert "does not exist" in fails(*common, "--out", tmp_path / "none" / "a.ply")
    assert "exclude each other" in fails(*common, "--dense", "--compare")
    for option in (("--keep-ratio", 0.5), ("--config", "block_q=64")):
        assert "--dense runs the model without Lite3R, which --keep-ratio and --config are for" in fails(*common, "--dense", *option)
    assert "keep_ratio must be in (0, 1]" in fails(*common, "--keep-ratio", 0)
    assert "choose one of" in fails("reconstruct", photos, "--model", "no-such-model")
    assert "it is empty" in fails("reconstruct", tmp_path / "empty", "--model", "tiny", "--out", tmp_path / "a.ply")
    assert "at least 2 images are needed" in fails("reconstruct", photos, "--model", "pairs", "--max-views", 1, "--out", tmp_path / "a.ply")
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


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("depth_anything_3") is None, reason="needs depth-anything-3")
def test_reconstruct_with_depth_anything_3(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "scene"
    result = lite3r(
        "reconstruct", photos, "--model", "da3-small", "--weights", "random", "--max-views", 2, "--out", out, "--config", "dense_below=0"
    )  # fmt: skip
    assert "da3-small: 2 views of 504 x 336 pixels" in result.stdout
    cloud = trimesh.load(out / "scene.ply")
    assert len(cloud.vertices) > 100_000
    assert np.isfinite(cloud.vertices).all()
    assert cloud.colors[:, :3].std() > 10
    # What other programs read are the same cameras, which see as cameras do although the weights are random.
    with np.load(out / "scene.npz") as archive:
        poses, intrinsics = archive["world_to_camera"], archive["intrinsics"]
    np.testing.assert_allclose(2 * np.arctan(504 / 2 / intrinsics[:, 0, 0]), 1, rtol=1e-5)
    model = pycolmap.Reconstruction(str(out / "sparse" / "0"))
    frames = json.loads((out / "transforms.json").read_text())["frames"]
    for i, frame in enumerate(frames):
        image, camera = model.image(i + 1), model.camera(i + 1).calibration_matrix()
        pose = np.linalg.inv(np.array(frame["transform_matrix"]) @ np.diag([1, -1, -1, 1]))[:3]
        for found in (image.cam_from_world().matrix(), pose):
            np.testing.assert_allclose(found, poses[i], atol=1e-4)
        np.testing.assert_allclose(camera, intrinsics[i], rtol=1e-6)
        np.testing.assert_allclose([frame[key] for key in ("fl_x", "fl_y", "cx", "cy")], intrinsics[i][[0, 1, 0, 1], [0, 1, 2, 2]])


def test_reconstruct_a_video_and_a_photograph(photos: Path, tmp_path: Path) -> None:
    frames = [np.asarray(Image.open(photos / f"{i % 3}.jpg")) for i in range(12)]
    video = write_video(tmp_path / "clip.mp4", frames)
    out = tmp_path / "a.npz"
    lite3r(
        "reconstruct", video, photos / "0.jpg", "--model", "tiny", "--weights", "random", "--dense", "--out", out, "--every", 0.6
    )  # fmt: skip
    with np.load(out) as archive:
        assert len(archive["names"]) == 3
        assert archive["names"][-1] == "0.jpg"


@pytest.mark.slow
def test_memory_is_planned_and_what_cannot_fit_is_refused(photos: Path, tmp_path: Path) -> None:
    common = ("reconstruct", photos, "--model", "tiny", "--weights", "random", "--device", "cpu", "--out", tmp_path / "a.ply", "--config")
    assert "memory for [1, 3, 3, 152, 224]: predicted peak" in lite3r(*common, "max_memory=1GB").stdout
    assert "No smaller chunks are left: give fewer views" in fails(*common, "max_memory=1MB")
