"""Every format is read back by the library that owns it, and the cameras are the same."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pycolmap
import pytest
import torch
import trimesh
from PIL import Image

from lite3r_plugin.errors import InputError
from lite3r_plugin.scene.data import DataWarning, open_scenes
from lite3r_plugin.scene.export import Facts, Reconstruction, check_out, load_npz, picture_path, save
from lite3r_plugin.scene.geometry import unproject
from lite3r_plugin.scene.prediction import Prediction

FACTS = Facts("a run", ("", "time"), (("dense", "1 s"), ("lite3r", "2 s")), ("a note",))
NAMES = ("a/IMG 1.HEIC", "b/IMG 1.jpg", "../x.png")


def turned(angle: float, axis: int) -> torch.Tensor:
    c, s = np.cos(angle), np.sin(angle)
    rotation = torch.eye(3, dtype=torch.float64)
    i, j = [k for k in range(3) if k != axis]
    rotation[i, i], rotation[i, j], rotation[j, i], rotation[j, j] = c, -s, s, c
    return rotation


def reconstruction(views: int = 3, height: int = 18, width: int = 24, **options: int) -> Reconstruction:
    """Views of all kinds of cameras, none of which is symmetric; rotations are off by rounding, as models predict them."""
    depth = 2 + torch.rand(views, height, width)
    rotations = torch.stack([turned(0.3 * i - 0.2, 0) @ turned(0.5 * i, 1) @ turned(0.1 * i, 2) for i in range(views)])
    cameras = torch.cat((rotations + 1e-4 * torch.rand(views, 3, 3), torch.randn(views, 3, 1)), -1).float()
    intrinsics = torch.zeros(views, 3, 3)
    intrinsics[:, 0, 0], intrinsics[:, 1, 1] = torch.linspace(20, 30, views), torch.linspace(21, 33, views)
    intrinsics[:, 0, 2], intrinsics[:, 1, 2], intrinsics[:, 2, 2] = 11.5, 9.25, 1
    points = unproject(depth, cameras, intrinsics)
    images = torch.randint(0, 256, (views, height, width, 3)) / 255
    return Reconstruction(Prediction(depth, torch.rand(depth.shape), points, cameras, intrinsics, images), NAMES[:views], **options)


@pytest.fixture
def scene() -> Reconstruction:
    return reconstruction()


def assert_cameras(scene: Reconstruction, poses: torch.Tensor, intrinsics: torch.Tensor) -> None:
    torch.testing.assert_close(poses.double(), scene.cameras()[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(intrinsics.double(), scene.cameras()[1], rtol=0, atol=1e-4)


def test_cameras_are_the_predicted_ones_and_rigid(scene: Reconstruction) -> None:
    pose, _ = scene.cameras()
    torch.testing.assert_close(pose, scene.prediction.world_to_camera.double(), rtol=0, atol=2e-4)
    torch.testing.assert_close(pose[:, :, :3] @ pose[:, :, :3].mT, torch.eye(3).double().expand(3, 3, 3))


def test_image_names_are_safe_and_different() -> None:
    assert reconstruction().image_names == ("IMG_1.png", "IMG_1_2.png", "x.png")


@pytest.mark.parametrize("binary", [True, False])
def test_colmap(scene: Reconstruction, tmp_path: Path, binary: bool) -> None:
    out = tmp_path / "scene.colmap"
    assert list(save(out, {"lite3r": scene}, FACTS)) == [out]
    for file in (out / "sparse" / "0").iterdir():
        if (file.suffix == ".bin") != binary:
            file.unlink()
    model = pycolmap.Reconstruction(str(out / "sparse" / "0"))
    images = [model.image(i + 1) for i in range(3)]
    assert [image.name for image in images] == list(scene.image_names)
    poses = torch.tensor(np.stack([image.cam_from_world().matrix() for image in images]))
    assert_cameras(scene, poses, torch.tensor(np.stack([model.camera(i + 1).calibration_matrix() for i in range(3)])))
    # Each point is where its only observation sees it, at the depth of its pixel.
    assert len(model.points3D) == len(scene.cloud.points)
    for point in list(model.points3D.values())[::50]:
        (seen,) = point.track.elements
        image = model.image(seen.image_id)
        xy = image.points2D[seen.point2D_idx].xy
        np.testing.assert_allclose(image.project_point(point.xyz), xy, atol=0.05)
        row, column = int(xy[1]), int(xy[0])
        np.testing.assert_array_equal(point.color, np.asarray(Image.open(out / "images" / image.name))[row, column])
    views = open_scenes(f"colmap:{out}")[0].sample(range(3))
    assert_cameras(scene, views.world_to_camera, views.intrinsics)


def test_nerfstudio(scene: Reconstruction, tmp_path: Path) -> None:
    out = tmp_path / "transforms.json"
    save(out, {"lite3r": scene}, FACTS)
    views = open_scenes(f"nerfstudio:{tmp_path}")[0].sample(range(3))
    assert_cameras(scene, views.world_to_camera, views.intrinsics)
    torch.testing.assert_close(views.images.permute(0, 2, 3, 1), scene.prediction.images)
    cloud = trimesh.load(tmp_path / json.loads(out.read_text())["ply_file_path"])
    np.testing.assert_allclose(cloud.vertices, scene.cloud.points, atol=1e-6)


def test_glb_is_y_up_and_shows_the_cameras(scene: Reconstruction, tmp_path: Path) -> None:
    save(tmp_path / "a.glb", {"lite3r": scene}, FACTS)
    read = trimesh.load(tmp_path / "a.glb")
    np.testing.assert_allclose(read.geometry["points"].vertices, scene.cloud.points * torch.tensor([1, -1, -1]), atol=1e-6)
    np.testing.assert_array_equal(read.geometry["points"].colors[:, :3], scene.cloud.colors)
    pose, _ = scene.cameras()
    centres = (-pose[:, :, :3].mT @ pose[:, :, 3:])[:, :, 0] * torch.tensor([1, -1, -1])
    lines = read.geometry["cameras"].vertices
    for centre in centres:
        assert np.abs(lines - centre.numpy()).sum(-1).min() < 1e-5


def test_npz_holds_everything_and_is_read_back(scene: Reconstruction, tmp_path: Path) -> None:
    save(tmp_path / "a.npz", {"lite3r": scene}, FACTS)
    with np.load(tmp_path / "a.npz") as archive:
        assert sorted(archive) == ["confidence", "depth", "images", "intrinsics", "names", "world_to_camera"]
    read = load_npz(tmp_path / "a.npz")
    assert read.names == scene.names
    for name in ("depth", "confidence", "world_to_camera", "intrinsics", "points", "images"):
        torch.testing.assert_close(getattr(read.prediction, name), getattr(scene.prediction, name))


def test_archives_of_other_kinds_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", depth=np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive")
    for name, message in (("other", "has no array 'confidence';"), ("text", "cannot be read"), ("none", "is missing")):
        with pytest.raises(InputError, match=message):
            load_npz(tmp_path / f"{name}.npz")


def test_a_folder_gets_all(scene: Reconstruction, tmp_path: Path) -> None:
    out = tmp_path / "scene"
    check_out(out, ("dense", "lite3r"))
    assert picture_path(out) == out / "scene.png"
    save(out, {"dense": reconstruction(), "lite3r": scene}, FACTS)
    main = {"scene.ply", "scene.glb", "scene.npz", "transforms.json", "images", "sparse", "lite3r.json"}
    assert {p.name for p in out.iterdir()} == main | {"scene.html", "dense_run"}
    assert {p.name for p in (out / "dense_run").iterdir()} == main
    assert json.loads((out / "lite3r.json").read_text())["rows"] == [["dense", "1 s"], ["lite3r", "2 s"]]
    for kind in ("colmap", "nerfstudio"):
        views = open_scenes(f"{kind}:{out}")[0].sample(range(3))
        assert_cameras(scene, views.world_to_camera, views.intrinsics)
    assert [p.name for p in tmp_path.iterdir()] == ["scene"]


def test_a_folder_is_filled_again_and_what_else_it_holds_stays(scene: Reconstruction, tmp_path: Path) -> None:
    out = tmp_path / "scene"
    save(out, {"lite3r": scene}, FACTS)
    (out / "outputs").mkdir()
    check_out(out)
    save(out, {"lite3r": reconstruction(2)}, FACTS)
    assert sorted(p.name for p in (out / "images").iterdir()) == ["IMG_1.png", "IMG_1_2.png"]
    assert (out / "outputs").is_dir()


def test_a_folder_without_pycolmap_says_what_is_left_out(scene: Reconstruction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "pycolmap" else find(name))
    with pytest.warns(DataWarning, match=r"COLMAP model is left out: .*pip install 'lite3r-plugin\[colmap\]'"):
        save(tmp_path / "scene", {"lite3r": scene}, FACTS)
    assert not (tmp_path / "scene" / "sparse").exists()
    with pytest.raises(InputError, match=r"pip install 'lite3r-plugin\[colmap\]'"):
        check_out(tmp_path / "a.colmap")


def test_of_two_runs_the_main_one_has_the_name(scene: Reconstruction, tmp_path: Path) -> None:
    dense = reconstruction(max_points=7)
    written = save(tmp_path / "a.ply", {"dense": dense, "lite3r": scene}, FACTS)
    assert [path.name for path in written] == ["a.dense.ply", "a.ply"]
    assert len(trimesh.load(tmp_path / "a.dense.ply").vertices) == 7


def test_outputs_are_checked_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "transforms_files").mkdir()
    (tmp_path / "transforms_files" / "mine.txt").write_text("")
    for name, message in (
        ("a.obj", r"must end in \.ply, .* or \.html, or be a folder"),
        ("mine", "holds other files; name a new one"),
        ("file", "there is a file of that name"),
        ("none/scene", "does not exist"),
        ("none/a.glb", "does not exist"),
        ("transforms.json", "transforms_files holds other files"),
        ("a" * 200, "too long"),
    ):
        with pytest.raises(InputError, match=message):
            check_out(tmp_path / name)
    for suffix in ("ply", "GLB", "npz", "html", "colmap"):
        check_out(tmp_path / f"a.{suffix}", ("dense", "lite3r"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="not writable"):
        check_out(tmp_path / "a.ply")


def test_a_failed_write_leaves_the_folder_as_it_was(scene: Reconstruction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "scene"
    save(out, {"lite3r": scene}, FACTS)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    monkeypatch.setattr("lite3r_plugin.scene.export.formats.save_page", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(InputError, match="No space left"):
        save(out, {"lite3r": reconstruction(2)}, FACTS)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["scene"]


@pytest.mark.parametrize("broken", ["nan", "focal", "rotation"])
def test_cameras_that_are_none_are_named(broken: str, tmp_path: Path) -> None:
    scene = reconstruction()
    if broken == "nan":
        scene.prediction.world_to_camera[1, 0, 3] = torch.nan
    elif broken == "focal":
        scene.prediction.intrinsics[1, 0, 0] = 0
    else:
        scene.prediction.world_to_camera[1, 0, :3] *= -1
    with pytest.raises(InputError, match=r"the camera that the model predicted for b/IMG 1\.jpg is"):
        save(tmp_path / "a.glb", {"lite3r": scene}, FACTS)
