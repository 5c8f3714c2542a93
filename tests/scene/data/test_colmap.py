"""COLMAP's own rules for its files, checked against pycolmap where it is installed, and the places that its models lie in."""

from __future__ import annotations

import itertools
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from written_scenes import Sample, render, write_layout

from lite3r_plugin.errors import InputError
from lite3r_plugin.scene.data import DataWarning, Scene, open_scenes
from lite3r_plugin.scene.data.colmap_model import read_model


@pytest.fixture(scope="module")
def sample() -> Sample:
    return render(4, 16, 24)


def opened(path: Path) -> Scene:
    (scene,) = open_scenes(f"colmap:{path}")
    return scene


# --- images.txt

HEADER = "# Image list with two lines of data per image:\n"
POINTS = ("", "1.5 2.5 -1", "1.5 2.5 -1 3 4.25 7")


def image_line(i: int, name: str | None = None) -> str:
    return f"{i} 1 0 0 0 {0.25 * i} 0 0 1 {name or f'{i}.png'}"


def write_model(path: Path, images: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "cameras.txt").write_text("1 PINHOLE 24 16 30 30 12 8\n")
    (path / "images.txt").write_text(images)
    (path / "points3D.txt").write_text("")
    return path


def names_and_places(path: Path) -> dict[str, float]:
    return {image.name: image.pose[0, 3].item() for image in read_model(path)[1]}


WANTED = {f"{i}.png": 0.25 * i for i in range(1, 5)}


@pytest.mark.parametrize("points", list(itertools.product(POINTS, repeat=2)))
@pytest.mark.parametrize("blank", ["", "\n", "\n\n", "# a comment\n"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_blank_lines_and_comments_before_images_say_nothing(points: tuple[str, str], blank: str, newline: str, tmp_path: Path) -> None:
    text = HEADER + "".join(f"{blank}{image_line(i)}\n{points[i % 2]}\n" for i in range(1, 5)) + blank
    write_model(tmp_path, "")
    (tmp_path / "images.txt").write_bytes(text.replace("\n", newline).encode())
    assert names_and_places(tmp_path) == WANTED


def test_the_last_line_of_points_may_be_cut_off(tmp_path: Path) -> None:
    text = HEADER + "\n\n".join(image_line(i) for i in range(1, 5))
    assert names_and_places(write_model(tmp_path, text)) == WANTED


@pytest.mark.parametrize("missing", [1, 2, 3])
@pytest.mark.parametrize("name", ["{}.png", "{}", "cam 1/{}.png", "view {} 7"])
def test_a_missing_line_of_points_swallows_no_image(missing: int, name: str, tmp_path: Path) -> None:
    lines = [image_line(i, name.format(i)) + ("\n" if i == missing else "\n\n") for i in range(1, 5)]
    with pytest.raises(InputError, match=r"images\.txt should have the points of .*, not "):
        read_model(write_model(tmp_path, HEADER + "".join(lines)))


def test_a_number_of_images_that_does_not_hold_is_said(tmp_path: Path) -> None:
    header = "# Number of images: 5, mean observations per image: 2.5\n"
    write_model(tmp_path, header + "".join(f"{image_line(i)}\n\n" for i in range(1, 5)))
    with pytest.warns(DataWarning, match="announces 5 images and holds 4"):
        assert names_and_places(tmp_path) == WANTED


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (f"{image_line(1)}\n\n{image_line(1, '2.png')}\n\n", r"image 1 twice: 1\.png and 2\.png"),
        ("", "holds no images"),
        ("1 1 0 0 0 0 0 0 1\n\n", "10 words"),
        ("1 1 0 0 0 0 0 0 4 a.png\n\n", r"a\.png is of camera 4, which is not in the model"),
    ],
)
def test_models_that_contradict_themselves(images: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_model(write_model(tmp_path, HEADER + images))


def test_one_name_of_two_images_is_refused(sample: Sample, tmp_path: Path) -> None:
    file = write_layout(sample, "colmap-text", tmp_path) / "sparse/0/images.txt"
    file.write_text(file.read_text().replace("view 2.png", "view 1.png"))
    with pytest.raises(InputError, match=r"several images of one name: view 1\.png"), pytest.warns(DataWarning, match=r"view 2\.png"):
        opened(tmp_path)


def test_a_camera_that_is_there_twice_is_refused(sample: Sample, tmp_path: Path) -> None:
    file = write_layout(sample, "colmap-text", tmp_path) / "sparse/0/cameras.txt"
    file.write_text(file.read_text().replace("11 PINHOLE", "12 PINHOLE"))
    with pytest.raises(InputError, match=r"cameras\.txt has camera 12 twice"):
        opened(tmp_path)


# --- binary files


def test_bytes_that_nothing_announces_are_damage(sample: Sample, tmp_path: Path) -> None:
    model = write_layout(sample, "colmap", tmp_path) / "sparse/0"
    for name in ("cameras.bin", "images.bin"):
        data = (model / name).read_bytes()
        count = struct.unpack_from("<Q", data)[0]
        for damaged, message in (
            (data + b"\0", rf"{name} goes on for 1 bytes"),
            (struct.pack("<Q", count - 1) + data[8:], rf"{name} goes on for \d+ bytes"),
            (struct.pack("<Q", 2**63) + data[8:], rf"{name} ends early"),
            (data[:4], rf"{name} ends early"),
        ):
            (model / name).write_bytes(damaged)
            with pytest.raises(InputError, match=message):
                read_model(model)
        (model / name).write_bytes(data)
    data = (model / "images.bin").read_bytes()
    (model / "images.bin").write_bytes(data.replace(b"view 2.png\0", b"view \xe9.png\0"))
    with pytest.raises(InputError, match=r"images\.bin has an image whose name is no UTF-8"):
        read_model(model)


# --- pycolmap


@pytest.mark.parametrize("points", [True, False])
@pytest.mark.parametrize("kind", ["write_text", "write_binary"])
def test_what_pycolmap_writes_is_read(sample: Sample, kind: str, points: bool, tmp_path: Path) -> None:
    pycolmap = pytest.importorskip("pycolmap")
    model = pycolmap.Reconstruction()
    write_layout(sample, "colmap-text", tmp_path)
    written = with_points3d(tmp_path / "sparse/0")
    if not points:
        (written / "images.txt").write_text((written / "images.txt").read_text().replace("1.5 2.5 -1", ""))
    model.read_text(str(written))
    names = {image.image_id: image.name for image in model.images.values()}
    assert len(names) == 4
    (tmp_path / "out").mkdir()
    getattr(model, kind)(str(tmp_path / "out"))
    images = {image.id: image for image in read_model(tmp_path / "out")[1]}
    assert {number: image.name for number, image in images.items()} == names
    for number, image in images.items():
        pose = model.images[number].cam_from_world()
        torch.testing.assert_close(image.pose, torch.tensor(np.array(pose.matrix())), atol=1e-9, rtol=0)


@pytest.mark.parametrize("blank", ["", "\n", "\n\n", "# c\n"])
def test_text_is_read_as_pycolmap_reads_it(blank: str, tmp_path: Path) -> None:
    pycolmap = pytest.importorskip("pycolmap")
    text = HEADER + "".join(f"{blank}{image_line(i)}\n{POINTS[0 if i % 2 else 1]}\n" for i in range(1, 5))
    path = write_model(tmp_path, text)
    model = pycolmap.Reconstruction()
    model.read_text(str(path))
    theirs = {image.name: image.cam_from_world().matrix()[0, 3] for image in model.images.values()}
    assert names_and_places(path) == theirs == WANTED


def with_points3d(model: Path) -> Path:
    """pycolmap wants the file of points to be there, and names without spaces."""
    (model / "points3D.txt").write_text("")
    (model / "images.txt").write_text((model / "images.txt").read_text().replace("view ", "view_"))
    return model


# --- workspaces


def moved(sample: Sample, path: Path, model: str, images: str) -> Path:
    """A workspace with its files in other places."""
    write_layout(sample, "colmap", path / "made")
    for old, new in (("made/sparse/0", model), ("made/images", images)):
        (path / new).parent.mkdir(parents=True, exist_ok=True)
        if (path / new).is_dir():
            for file in (path / old).iterdir():
                file.rename(path / new / file.name)
        else:
            (path / old).rename(path / new)
    shutil.rmtree(path / "made")
    return path


@pytest.mark.parametrize(
    ("model", "images"),
    [
        ("sparse/0", "images"),
        ("sparse", "images"),
        ("sparse/3", "Images"),
        ("Sparse/0", "IMAGES"),
        ("colmap/sparse/0", "images"),
        ("colmap/sparse/0", "colmap/images"),
        ("dense/sparse", "dense/images"),
        ("dense/0/sparse", "dense/0/images"),
        ("dslr_calibration_undistorted", "images"),
        (".", "images"),
        (".", "."),
    ],
)
def test_models_are_found_where_programs_put_them(sample: Sample, model: str, images: str, tmp_path: Path) -> None:
    views = opened(moved(sample, tmp_path / "scene", model, images)).sample(range(4))
    assert views.world_to_camera is not None
    torch.testing.assert_close(views.world_to_camera, sample["w2c"], atol=1e-4, rtol=1e-4)


def renamed(path: Path, change: Callable[[str], str]) -> Path:
    """The names of the images in a text model changed; the files stay."""
    file = path / "sparse/0/images.txt"
    for i in range(4):
        file.write_text(file.read_text("utf-8").replace(f" view {i}.png", f" {change(f'view {i}.png')}"), "utf-8")
    return path


@pytest.mark.parametrize("change", [str.upper, str.title, "images/{}".format, "./{}".format, ".\\{}".format], ids=range(5))
def test_names_are_found_as_people_write_them(sample: Sample, change: Callable[[str], str], tmp_path: Path) -> None:
    scene = opened(renamed(write_layout(sample, "colmap-text", tmp_path), change))
    assert [Path(str(frame.image)).name for frame in scene.frames] == [f"view {i}.png" for i in range(4)]


def test_accents_that_macos_writes_apart(sample: Sample, tmp_path: Path) -> None:
    renamed(write_layout(sample, "colmap-text", tmp_path), lambda name: name.replace("view", "h\u00e4user"))
    for i in range(4):
        (tmp_path / f"images/view {i}.png").rename(tmp_path / f"images/ha\u0308user {i}.png")
    assert [frame.name for frame in opened(tmp_path).frames] == [f"h\u00e4user {i}.png" for i in range(4)]


def test_images_in_subfolders(sample: Sample, tmp_path: Path) -> None:
    renamed(write_layout(sample, "colmap-text", tmp_path), lambda name: f"cam{int(name[5]) % 2}/{name}")
    for i in range(4):
        (tmp_path / f"images/cam{i % 2}").mkdir(exist_ok=True)
        (tmp_path / f"images/view {i}.png").rename(tmp_path / f"images/cam{i % 2}/view {i}.png")
    assert [frame.name for frame in opened(tmp_path).frames] == [f"cam{i % 2}/view {i}.png" for i in (0, 2, 1, 3)]
    (tmp_path / "images/cam0/view 0.png").rename(tmp_path / "images/cam1/view 0.png")  # cam1/view 0.png is another image
    with pytest.raises(InputError, match=r"cam0/view 0\.png is missing"):
        opened(tmp_path)


def test_names_in_natural_order(sample: Sample, tmp_path: Path) -> None:
    renamed(write_layout(sample, "colmap-text", tmp_path), lambda name: f"{10 ** int(name[5])}.png")
    for i in range(4):
        (tmp_path / f"images/view {i}.png").rename(tmp_path / f"images/{10**i}.png")
    assert [frame.name for frame in opened(tmp_path).frames] == ["1.png", "10.png", "100.png", "1000.png"]


def test_two_names_that_differ_in_case_alone_are_two_files(sample: Sample, tmp_path: Path) -> None:
    write_layout(sample, "colmap-text", tmp_path)
    (tmp_path / "images/VIEW 1.png").write_bytes((tmp_path / "images/view 1.png").read_bytes())
    with pytest.warns(DataWarning, match=r"left out: VIEW 1\.png"):
        assert len(opened(tmp_path)) == 4
    renamed(tmp_path, str.title)
    with pytest.raises(InputError, match=r"2 files for View 1\.Png: VIEW 1\.png, view 1\.png; keep one"):
        opened(tmp_path)


def part_of(model: Path, count: int, to: Path) -> None:
    """The first images of a text model as another one."""
    to.mkdir()
    shutil.copy(model / "cameras.txt", to)
    lines = (model / "images.txt").read_text().splitlines()
    (to / "images.txt").write_text("\n".join(lines[: 1 + 2 * count]) + "\n")


@pytest.mark.parametrize("largest", [0, 1, 2])
def test_of_several_models_the_largest_is_read(sample: Sample, largest: int, tmp_path: Path) -> None:
    made = write_layout(sample, "colmap-text", tmp_path) / "made"
    (tmp_path / "sparse/0").rename(made)
    for i in range(3):
        part_of(made, 4 if i == largest else 2, tmp_path / f"sparse/{i}")
    shutil.rmtree(made)
    with pytest.warns(DataWarning, match=rf"holds 3 COLMAP models: .*sparse/{largest} of 4 images.*; sparse/{largest} is read"):
        assert len(opened(tmp_path)) == 4


def test_an_image_of_which_stereo_tells_nothing_is_said(sample: Sample, tmp_path: Path) -> None:
    file = write_layout(sample, "colmap", tmp_path) / "stereo/depth_maps/view 2.png.geometric.bin"
    file.write_bytes(b"24&16&1&" + bytes(4 * 24 * 16))
    scene = opened(tmp_path)
    with pytest.warns(DataWarning, match=r"view 2\.png\.geometric\.bin knows no depth"):
        views = scene.sample(range(4))
    assert views.valid.flatten(1).any(1).tolist() == [True, True, False, True]


def test_a_model_with_distortion_yields_to_the_undistorted_one(sample: Sample, tmp_path: Path) -> None:
    write_layout(sample, "colmap-text", tmp_path)
    shutil.copytree(tmp_path / "sparse/0", tmp_path / "dense/sparse")
    file = tmp_path / "sparse/0/cameras.txt"
    file.write_text(file.read_text().replace("PINHOLE", "OPENCV_FISHEYE"))
    with pytest.warns(DataWarning, match=r"sparse/0, which cannot be used .*undistort.*; dense/sparse is read"):
        assert len(opened(tmp_path)) == 4
    shutil.rmtree(tmp_path / "dense")
    with pytest.raises(InputError, match="undistort the photographs"):
        opened(tmp_path)
