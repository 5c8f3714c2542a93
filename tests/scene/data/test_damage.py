"""Damaged and missing files: an error that names the file."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from written_scenes import Sample, render, write_layout

from lite3r_plugin.errors import InputError
from lite3r_plugin.scene.data import open_scenes
from lite3r_plugin.scene.data.maps import read_pfm, write_pfm
from lite3r_plugin.scene.data.mvsnet import read_pairs

SCENE = "scene/"
FRAME = "kitchen/seq-01/frame-000001."


@pytest.fixture(scope="module")
def sample() -> Sample:
    return render(3, 16, 24)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def nan_pfm(path: Path) -> None:
    values = torch.ones(16, 24)
    values[3, 4] = torch.nan
    write_pfm(path, values)


def other_size(path: Path) -> None:
    Image.new("RGB", (24, 20)).save(path)


def turned_by_exif(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    with Image.open(path) as image:
        image.load()
    image.save(path, exif=exif)


def scaled_rotation(path: Path) -> None:
    words = path.read_text().split()
    words[1] = str(float(words[1]) + 0.5)
    path.write_text(" ".join(words))


def no_camera_mat(path: Path) -> None:
    with np.load(path) as content:
        kept = {key: content[key] for key in content.files if key != "world_mat_1"}
    np.savez(path, **kept)


def replaced(old: str, new: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return change


DAMAGE = [
    ("blendedmvs", SCENE + "blended_images/00000001.jpg", lambda p: p.write_bytes(b"no image"), "cannot be read as an image"),
    ("blendedmvs", SCENE + "blended_images/00000001.jpg", Path.unlink, "has no image 00000001"),
    ("blendedmvs", SCENE + "blended_images/00000001.jpg", other_size, "24x20 pixels"),
    ("blendedmvs", SCENE + "blended_images/00000001.jpg", turned_by_exif, "EXIF"),
    ("blendedmvs", SCENE + "cams/00000001_cam.txt", Path.unlink, "00000001_cam.txt is missing"),
    ("blendedmvs", SCENE + "cams/00000001_cam.txt", replaced("extrinsic", "matrix"), "00000001_cam.txt is no camera file"),
    ("blendedmvs", SCENE + "cams/00000001_cam.txt", scaled_rotation, "00000001_cam.txt: the pose has no rotation"),
    ("blendedmvs", SCENE + "cams/00000001_cam.txt", replaced("0.0 0.0 1.0\n\n0.5", "0.0 nan 1.0\n\n0.5"), "no pinhole"),
    ("blendedmvs", SCENE + "cams/pair.txt", lambda p: p.write_text("3\n0\n2 1 0.5"), "pair.txt ends early"),
    ("blendedmvs", SCENE + "rendered_depth_maps/00000001.pfm", cut, "00000001.pfm should hold 24x16 values"),
    ("blendedmvs", SCENE + "rendered_depth_maps/00000001.pfm", nan_pfm, "00000001.pfm holds 1 NaN"),
    ("blendedmvs", SCENE + "rendered_depth_maps/00000001.pfm", Path.unlink, "00000001.pfm is missing"),
    ("7scenes", FRAME + "pose.txt", Path.unlink, "frame-000001.pose.txt is missing"),
    ("7scenes", FRAME + "pose.txt", lambda p: p.write_text("1 0 0"), "frame-000001.pose.txt ends early"),
    ("7scenes", FRAME + "pose.txt", lambda p: p.write_text("nan " * 16), "frame-000001.pose.txt: the pose holds"),
    ("7scenes", FRAME + "depth.png", lambda p: Image.new("L", (24, 16)).save(p), "8-bit"),
    ("7scenes", FRAME + "depth.png", cut, "frame-000001.depth.png cannot be read"),
    ("strecha", "fountain/gt_dense_cameras/0001.png.camera", Path.unlink, "0001.png.camera is missing"),
    ("strecha", "fountain/gt_dense_cameras/0001.png.camera", lambda p: p.write_text("a b"), "0001.png.camera should hold numbers"),
    ("strecha", "fountain/images/0001.png", other_size, "0001.png has 24x20 pixels, its camera is for 24x16"),
    ("dtu-idr", "scan24/cameras_sphere.npz", cut, "cameras_sphere.npz cannot be read"),
    ("dtu-idr", "scan24/cameras_sphere.npz", no_camera_mat, "has no world_mat_1"),
    ("dtu-idr", "scan24/mask/001.png", Path.unlink, "holds 2 masks for 3 images"),
    ("colmap", "sparse/0/images.bin", cut, "images.bin ends early"),
    ("colmap", "sparse/0/images.bin", Path.unlink, "images.bin is missing"),
    ("colmap", "sparse/0/cameras.bin", lambda p: p.write_bytes(p.read_bytes()[:30]), "cameras.bin ends early"),
    ("colmap", "images/view 1.png", Path.unlink, "view 1.png is missing"),
    ("colmap", "stereo/depth_maps/view 1.png.geometric.bin", cut, "geometric.bin should hold 24x16 values"),
    ("colmap-text", "sparse/0/cameras.txt", replaced("11 PINHOLE", "11 OPENCV_FISHEYE"), "OPENCV_FISHEYE camera with distortion"),
    ("colmap-text", "sparse/0/cameras.txt", replaced("11 PINHOLE", "99 PINHOLE"), "view 1.png is of camera 11"),
    ("colmap-text", "sparse/0/images.txt", replaced("view 1.png", ""), "10 words"),
]


@pytest.mark.parametrize(("layout", "file", "damage", "message"), DAMAGE, ids=[f"{d[1]}-{d[3]}" for d in DAMAGE])
def test_damage_is_named(sample: Sample, layout: str, file: str, damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    write_layout(sample, layout, tmp_path)
    damage(tmp_path / file)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        open_scenes(f"{layout.removesuffix('-text')}:{tmp_path}")[0].sample(range(3))
    assert str(tmp_path) in str(caught.value)


def test_one_view_is_no_scene(sample: Sample, tmp_path: Path) -> None:
    path = write_layout({name: value[:1] for name, value in sample.items()}, "blendedmvs", tmp_path)
    with pytest.raises(InputError, match=r"scene holds one view only, 00000000"):
        open_scenes(f"blendedmvs:{path}")[0]


def test_unknown_frames_and_mixed_sizes_are_refused(sample: Sample, tmp_path: Path) -> None:
    scene = open_scenes(f"images:{write_layout(sample, 'images', tmp_path)}")[0]
    with pytest.raises(InputError, match="frames 0 to 2"):
        scene.sample([0, 3])
    other_size(tmp_path / "1.png")
    with pytest.raises(InputError, match=r"differ in size .*1\.png 24x20"):
        scene.sample([0, 1])
    assert scene.sample([0, 1], (8, 8)).images.shape == (2, 3, 8, 8)


def test_distortion_of_zero_is_none(sample: Sample, tmp_path: Path) -> None:
    path = write_layout(sample, "colmap-text", tmp_path)
    file = path / "sparse/0/cameras.txt"
    lines = [line.replace("PINHOLE", "OPENCV") + " 0 0 0 0" if line[0] != "#" else line for line in file.read_text().splitlines()]
    file.write_text("\n".join(lines))
    views = open_scenes(f"colmap:{path}")[0].sample([0])
    assert views.intrinsics is not None
    torch.testing.assert_close(views.intrinsics[0], sample["K"][0])
    file.write_text("\n".join([lines[0], lines[1][:-1] + "0.01", *lines[2:]]))
    with pytest.raises(InputError, match="undistort the photographs"):
        open_scenes(f"colmap:{path}")[0]


def test_an_unknown_binary_camera_is_refused(sample: Sample, tmp_path: Path) -> None:
    path = write_layout(sample, "colmap", tmp_path)
    file = path / "sparse/0/cameras.bin"
    data = bytearray(file.read_bytes())
    data[12:16] = struct.pack("<i", 77)
    file.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"cameras\.bin has a camera of an unknown model, 77"):
        open_scenes(f"colmap:{path}")[0]


def test_pfm_round_trip_and_byte_orders(tmp_path: Path) -> None:
    values = torch.rand(3, 5)
    write_pfm(tmp_path / "a.pfm", values)
    assert torch.equal(read_pfm(tmp_path / "a.pfm"), values)
    (tmp_path / "b.pfm").write_bytes(b"Pf\n5 3\n1.0\n" + values.flip(0).numpy().astype(">f4").tobytes())
    assert torch.equal(read_pfm(tmp_path / "b.pfm"), values)
    (tmp_path / "c.pfm").write_bytes(b"PF\n5 3\n-1.0\n" + bytes(180))
    with pytest.raises(InputError, match=r"c\.pfm is no grey PFM"):
        read_pfm(tmp_path / "c.pfm")


def test_pairs_of_a_view_without_partners(tmp_path: Path) -> None:
    file = tmp_path / "pair.txt"
    file.write_text("2\n0\n1 5 3.5\n5\n0\n")
    assert read_pairs(file) == {0: (5,), 5: ()}
