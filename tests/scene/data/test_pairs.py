"""What belongs together is paired by name or number, counts that disagree are errors, and what is left out is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from written_scenes import Sample, render, write_layout

from lite3r_plugin.errors import InputError
from lite3r_plugin.scene.data import DataWarning, Scene, open_scenes


@pytest.fixture(scope="module")
def sample() -> Sample:
    return render(4, 16, 24)


def layout_of(kind: str) -> str:
    return kind.removesuffix("-training").removesuffix("-text")


def read(kind: str, path: Path) -> Scene:
    return open_scenes(f"{layout_of(kind)}:{path}")[0]


def poses(scene: Scene) -> torch.Tensor:
    views = scene.sample(range(len(scene)))
    assert views.world_to_camera is not None
    return views.world_to_camera


# --- cameras and images


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_an_image_that_is_gone_moves_no_camera(sample: Sample, gone: int, tmp_path: Path) -> None:
    scan = write_layout(sample, "dtu-idr", tmp_path) / "scan24"
    (scan / f"image/{gone:06d}.png").unlink()
    with pytest.raises(InputError, match=rf"holds 4 world_mats for 3 images .* has no image_{gone}"):
        read("dtu-idr", tmp_path)
    with np.load(scan / "cameras_sphere.npz") as content:
        np.savez(scan / "cameras_sphere.npz", **{key: content[key] for key in content.files if not key.endswith(f"_{gone}")})
    with pytest.raises(InputError, match=rf"holds 4 masks for 3 images .* has no image_{gone}"):
        read("dtu-idr", tmp_path)
    (scan / f"mask/{gone:03d}.png").unlink()
    kept = [i for i in range(4) if i != gone]
    scene = read("dtu-idr", tmp_path)
    assert [frame.name for frame in scene.frames] == [f"{i:06d}" for i in kept]
    torch.testing.assert_close(poses(scene), sample["w2c"][kept], atol=1e-4, rtol=1e-4)
    assert torch.equal(scene.sample(range(3)).mask, sample["depth"][kept] > 0)


def test_numbers_in_names_pair_whatever_their_order(sample: Sample, tmp_path: Path) -> None:
    scan = write_layout(sample, "dtu-idr", tmp_path) / "scan24"
    for i, letter in enumerate("dcba"):  # the order of names is the reverse of that of numbers
        (scan / f"image/{i:06d}.png").rename(scan / f"image/{letter}_view2_{i}.png")
    scene = read("dtu-idr", tmp_path)
    torch.testing.assert_close(poses(scene), sample["w2c"], atol=1e-4, rtol=1e-4)
    assert torch.equal(scene.sample(range(4)).mask, sample["depth"] > 0)


def test_images_that_no_number_pairs_are_refused(sample: Sample, tmp_path: Path) -> None:
    images = write_layout(sample, "dtu-idr", tmp_path) / "scan24/image"
    (images / "000003.png").rename(images / "last.png")
    with pytest.raises(InputError, match=r"1 images without a number.*last\.png"):
        read("dtu-idr", tmp_path)
    (images / "last.png").rename(images / "b_000002.png")
    with pytest.raises(InputError, match=r"2 files for image 2: 000002\.png, b_000002\.png"):
        read("dtu-idr", tmp_path)


@pytest.mark.parametrize(
    ("kind", "file", "message"),
    [
        ("blendedmvs", "scene/blended_images/00000002.jpg", "has no image 00000002, of which 00000002_cam.txt is the camera"),
        ("dtu", "scan1/cams/00000002_cam.txt", r"00000002_cam\.txt is missing: the camera of 00000002\.png"),
        ("dtu-training", "Cameras/train/00000002_cam.txt", r"00000002_cam\.txt is missing"),
        ("7scenes", "kitchen/seq-01/frame-000002.color.png", "no colour image of 1 frames that have depth or a pose: 2"),
        ("7scenes", "kitchen/seq-01/frame-000002.depth.png", r"no image frame-000002\.depth"),
        ("7scenes", "kitchen/seq-01/frame-000002.pose.txt", r"frame-000002\.pose\.txt is missing"),
        ("strecha", "fountain/images/0002.png", r"no image 0002\.png of its own for the camera 0002\.png\.camera"),
        ("strecha", "fountain/gt_dense_cameras/0002.png.camera", r"0002\.png\.camera is missing"),
        ("colmap", "images/view 2.png", r"view 2\.png is missing: 1 of the 4 images"),
        ("colmap-text", "images/view 2.png", r"view 2\.png is missing: 1 of the 4 images"),
        ("nerfstudio", "images/frame_2.png", r"frame_2\.png is missing, which .*frame 2 names"),
        ("nerfstudio", "depth/frame_2.png", r"depth/frame_2\.png is missing"),
    ],
)
def test_half_a_pair_is_refused(sample: Sample, kind: str, file: str, message: str, tmp_path: Path) -> None:
    (write_layout(sample, kind, tmp_path) / file).unlink()
    with pytest.raises(InputError, match=message):
        read(kind, tmp_path)


@pytest.mark.parametrize(
    ("kind", "file", "copy"),
    [
        ("blendedmvs", "scene/blended_images/00000002.jpg", "00000002.JPEG"),
        ("dtu", "scan1/images/00000002.png", "2.png"),
        ("dtu", "scan1/cams/00000002_cam.txt", "2_cam.txt"),
        ("dtu-idr", "scan24/image/000002.png", "2.jpg"),
        ("dtu-training", "Depths/scan2_train/depth_map_0002.pfm", "depth_map_2.pfm"),
        ("7scenes", "kitchen/seq-01/frame-000002.color.png", "frame-000002.color.jpg"),
        ("strecha", "fountain/gt_dense_cameras/0002.png.camera", "0002.jpg.camera"),
    ],
)
def test_two_files_for_one_view_are_refused(sample: Sample, kind: str, file: str, copy: str, tmp_path: Path) -> None:
    path = write_layout(sample, kind, tmp_path) / file
    shutil.copy(path, path.with_name(copy))
    with pytest.raises(InputError, match=r"keep one|of its own"):
        read(kind, tmp_path)


def test_one_image_of_several_frames_is_refused(sample: Sample, tmp_path: Path) -> None:
    file = write_layout(sample, "nerfstudio", tmp_path) / "transforms.json"
    content = json.loads(file.read_text())
    content["frames"][1]["file_path"] = "./images/frame_0.png"
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="several frames are of one image"):
        read("nerfstudio", tmp_path)


# --- what is left out


def extra(path: Path) -> Callable[[Path], None]:
    """Another image in the folder."""
    return lambda root: Image.new("RGB", (24, 16)).save(root / path)


LEFT_OUT = [
    ("blendedmvs", extra(Path("scene/blended_images/extra.png")), r"1 file is left out.*extra\.png"),
    ("dtu", lambda root: (root / "scan1/cams/notes.txt").write_text(""), r"1 file is left out.*notes\.txt"),
    ("dtu-training", extra(Path("Rectified/scan2_train/rect_009_5_r5000.png")), "1 view is left out, without an image of light 3: 9"),
    ("colmap", extra(Path("images/unplaced.png")), r"1 of 5 images not in the COLMAP model, left out: unplaced\.png"),
    ("nerfstudio", extra(Path("images/frame_9.png")), r"1 image is not in transforms\.json and left out: frame_9\.png"),
    ("blendedmvs", lambda root: (root / "empty").mkdir(), "1 of 2 folders are left out.*: empty"),
    ("dtu-idr", lambda root: (root / "scan25").mkdir(), "1 of 2 folders are left out.*: scan25"),
    ("7scenes", lambda root: (root / "kitchen/seq-02").mkdir(), "1 of 2 folders are left out.*: seq-02"),
    ("7scenes", lambda root: (root / "kitchen/TestSplit.txt").write_text("sequence1\nsequence4\n"), "1 of 2 test sequences are not there"),
    ("colmap", lambda root: (root / "stereo/depth_maps/view 2.png.geometric.bin").unlink(), r"1 of 4 views have no depth: view 2\.png"),
    ("dtu-training", lambda root: (root / "Depths/scan2_train/depth_visual_0002.png").unlink(), "1 of 4 views have no mask: 00000002"),
    ("images", lambda root: (root / "4.cr2").write_bytes(b""), r"1 picture of another kind is left out: 4\.cr2"),
    ("blendedmvs", lambda root: (root / "scene/cams/pair.txt").write_text("1\n0\n1 1 9.5\n"), "not 3 of 4 of the scene: 1, 2, 3"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "change", "message"), LEFT_OUT, ids=[f"{kind}-{message[:25]}" for kind, _, message in LEFT_OUT])
def test_what_is_left_out_is_said(sample: Sample, kind: str, change: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    change(write_layout(sample, kind, tmp_path))
    with pytest.warns(DataWarning, match=message) as said:
        scene = read(kind, tmp_path)
    assert len(scene) == 4
    assert len(said) == 1
    assert str(tmp_path) in str(said[0].message)


def test_subfolders_with_photographs_are_named(sample: Sample, tmp_path: Path) -> None:
    write_layout(sample, "images", tmp_path)
    write_layout(sample, "images", tmp_path / "more")
    (tmp_path / "notes").mkdir()
    with pytest.warns(DataWarning, match="1 subfolder with images is left out: more"):
        assert len(read("images", tmp_path)) == 4


def test_many_names_are_counted(sample: Sample, tmp_path: Path) -> None:
    write_layout(sample, "colmap", tmp_path)
    for i in range(12):
        extra(Path(f"images/z{i:02d}.png"))(tmp_path)
    with pytest.warns(DataWarning, match=r"12 of 16 images .* z00\.png, z01\.png, z02\.png, z03\.png, z04\.png and 7 more"):
        read("colmap", tmp_path)
