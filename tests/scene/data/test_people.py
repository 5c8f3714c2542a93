"""Files as people have them: encodings, upper and lower case, other programs' habits. Where the meaning is plain they are read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from written_scenes import Sample, render, write_layout

from lite3r_plugin.errors import InputError
from lite3r_plugin.scene.data import DataWarning, open_scenes
from lite3r_plugin.scene.data.text import read_lines, read_text

TEXTS = ["blendedmvs", "dtu", "dtu-training", "7scenes", "strecha", "colmap-text", "nerfstudio"]


@pytest.fixture(scope="module")
def sample() -> Sample:
    return render(3, 16, 24)


def poses(kind: str, path: Path) -> torch.Tensor:
    views = open_scenes(f"{kind.removesuffix('-training').removesuffix('-text')}:{path}")[0].sample(range(3))
    assert views.world_to_camera is not None
    return views.world_to_camera


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le-mark", "utf-16-be-mark"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("kind", TEXTS)
def test_text_of_other_editors(sample: Sample, kind: str, encoding: str, newline: str, tmp_path: Path) -> None:
    write_layout(sample, kind, tmp_path)
    for file in [p for p in tmp_path.rglob("*") if p.suffix in (".txt", ".json", ".camera")]:
        text = file.read_text().replace("\n", newline)
        file.write_bytes(("\ufeff" + text).encode(encoding[:9]) if encoding.endswith("-mark") else text.encode(encoding))
    torch.testing.assert_close(poses(kind, tmp_path), sample["w2c"], atol=1e-4, rtol=1e-4)


def test_latin_1_is_what_is_no_utf_8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Fußgänger\r\n1.5".encode("latin-1"))
    assert list(read_lines(tmp_path / "a.txt")) == ["Fußgänger", "1.5"]
    (tmp_path / "a.txt").write_bytes("Fußgänger".encode())
    assert read_text(tmp_path / "a.txt") == "Fußgänger"
    (tmp_path / "a.txt").write_bytes(b"\xff\xfea\0\0\xdc")
    with pytest.raises(InputError, match=r"a\.txt cannot be read as text: .* at byte"):
        read_text(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes("1 2".encode("utf-16-le"))
    with pytest.raises(InputError, match=r"a\.txt cannot be read as text: it holds zero bytes"):
        read_text(tmp_path / "a.txt")


def upper(path: Path) -> None:
    for p in sorted(path.rglob("*"), key=lambda p: -len(p.parts)):
        p.rename(p.with_name(p.name.upper()))


@pytest.mark.parametrize(
    ("kind", "which"),
    [
        ("blendedmvs", "scene/*/*.jpg"),
        ("blendedmvs", "scene/*"),
        ("blendedmvs", "scene/cams/*"),
        ("blendedmvs", "scene/rendered_depth_maps/*"),
        ("dtu", "scan1/*/*.png"),
        ("dtu-training", "Depths/*/*"),
        ("dtu-training", "Rectified/*/*"),
        ("7scenes", "kitchen/seq-01/*.png"),
        ("7scenes", "kitchen/seq-01/*.txt"),
        ("strecha", "fountain/*/*"),
        ("strecha", "fountain/*"),
        ("dtu-idr", "scan24/*/*"),
        ("dtu-idr", "scan24/*k"),
        ("colmap", "images"),
        ("colmap", "images/*"),
        ("nerfstudio", "images/*"),
        ("nerfstudio", "depth/*"),
        ("images", "*"),
    ],
)
def test_upper_and_lower_case_are_the_same(sample: Sample, kind: str, which: str, tmp_path: Path) -> None:
    write_layout(sample, kind, tmp_path)
    found = list(tmp_path.glob(which))
    assert found
    for path in found:
        path.rename(path.with_name(path.name.upper()))
    scene = open_scenes(f"{kind.removesuffix('-training')}:{tmp_path}")[0]
    views = scene.sample(range(3))
    assert (views.images - sample["rgb"]).abs().mean() < 0.02
    if views.world_to_camera is not None:
        torch.testing.assert_close(views.world_to_camera, sample["w2c"], atol=1e-4, rtol=1e-4)


def test_scans_of_the_training_layout_without_its_suffix(sample: Sample, tmp_path: Path) -> None:
    write_layout(sample, "dtu-training", tmp_path)
    (tmp_path / "Rectified/scan2_train").rename(tmp_path / "Rectified/scan2")
    torch.testing.assert_close(poses("dtu-training", tmp_path), sample["w2c"], atol=1e-4, rtol=1e-4)
    (tmp_path / "Depths/scan2_train").rename(tmp_path / "Depths/scan3_train")
    with pytest.raises(InputError, match=r"Depths/scan2_train is missing"):
        poses("dtu-training", tmp_path)


def test_names_with_fewer_digits(sample: Sample, tmp_path: Path) -> None:
    scan = write_layout(sample, "dtu", tmp_path) / "scan1"
    for file in list(scan.rglob("0000*")):
        file.rename(file.with_name(file.name.replace("0000000", "000")))
    torch.testing.assert_close(poses("dtu", tmp_path), sample["w2c"], atol=1e-4, rtol=1e-4)


def test_intrinsics_of_4x4(sample: Sample, tmp_path: Path) -> None:
    file = write_layout(sample, "7scenes", tmp_path) / "kitchen/seq-01/camera-intrinsics.txt"
    K = np.eye(4)
    K[:3, :3] = np.loadtxt(file)
    np.savetxt(file, K)
    views = open_scenes(f"7scenes:{tmp_path}")[0].sample(range(3))
    assert views.intrinsics is not None
    torch.testing.assert_close(views.intrinsics, sample["K"], atol=1e-3, rtol=1e-4)
    K[0, 2], K[0, 3] = 0, K[0, 2]
    np.savetxt(file, K)
    with pytest.raises(InputError, match=r"camera-intrinsics\.txt: the last column"):
        open_scenes(f"7scenes:{tmp_path}")[0]


# --- nerfstudio and NeRF


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = path / "transforms.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def shared_camera(content: dict[str, Any]) -> None:
    """One camera for all frames, and nothing else that can be left out."""
    first = content["frames"][0]
    content |= {key: first[key] for key in ("fl_x", "cx", "cy")}
    for key in ("w", "h", "camera_model", "k1", "p1"):
        del content[key]
    for frame in content["frames"]:
        for key in ("fl_x", "fl_y", "cx", "cy", "depth_file_path"):
            del frame[key]


def test_a_camera_for_all_frames(sample: Sample, tmp_path: Path) -> None:
    change_json(write_layout(sample, "nerfstudio", tmp_path), shared_camera)
    views = open_scenes(f"nerfstudio:{tmp_path}")[0].sample(range(3))
    assert views.intrinsics is not None
    torch.testing.assert_close(views.intrinsics, sample["K"][:1].expand(3, 3, 3), atol=1e-3, rtol=1e-2)


def test_blenders_scenes(sample: Sample, tmp_path: Path) -> None:
    """An angle of view, names without suffix, and parts that are put together."""
    write_layout(sample, "nerfstudio", tmp_path)
    angle = 2 * math.atan(24 / 2 / sample["K"][0, 0, 0].item())

    def change(content: dict[str, Any]) -> None:
        shared_camera(content)
        for key in ("fl_x", "cx", "cy"):
            del content[key]
        content["camera_angle_x"] = angle
        for frame in content["frames"]:
            frame["file_path"] = f"./{frame['file_path'].removesuffix('.png')}"

    change_json(tmp_path, change)
    content = json.loads((tmp_path / "transforms.json").read_text())
    for name, frames in (("train", content["frames"][:2]), ("test", content["frames"][2:])):
        (tmp_path / f"transforms_{name}.json").write_text(json.dumps({**content, "frames": frames}))
    (tmp_path / "transforms.json").unlink()
    views = open_scenes(f"nerfstudio:{tmp_path}")[0].sample(range(3))
    assert views.intrinsics is not None
    assert views.world_to_camera is not None
    torch.testing.assert_close(views.intrinsics[:, 0, 0], sample["K"][:1, 0, 0].expand(3), atol=1e-3, rtol=1e-4)
    assert (views.intrinsics[:, :2, 2] == torch.tensor([12.0, 8])).all()
    torch.testing.assert_close(views.world_to_camera, sample["w2c"], atol=1e-4, rtol=1e-4)


def test_masks_of_nerfstudio(sample: Sample, tmp_path: Path) -> None:
    write_layout(sample, "nerfstudio", tmp_path)
    (tmp_path / "masks").mkdir()
    for i in range(3):
        Image.fromarray(np.uint8(sample["depth"][i].numpy() > 3) * 255).save(tmp_path / f"masks/{i}.png")
    change_json(tmp_path, lambda content: [frame.update(mask_path=f"masks/{i}.png") for i, frame in enumerate(content["frames"])])
    views = open_scenes(f"nerfstudio:{tmp_path}")[0].sample(range(3))
    assert torch.equal(views.mask, sample["depth"] > 3)


def in_frame(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["frames"][1].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(k1=0.1), "frame 0 has a camera 'OPENCV' with k1, which is distorted"),
        (lambda content: content.update(camera_model="OPENCV_FISHEYE"), "a camera 'OPENCV_FISHEYE', which is distorted"),
        (lambda content: content.update(w=0), "which are no numbers of pixels"),
        (lambda content: content.update(w=24.5), "which are no numbers of pixels"),
        (lambda content: content.update(frames=[]), "no list of frames"),
        (lambda content: content.update(frames={}), "no list of frames"),
        (lambda content: content["frames"].append(3), "frame 3 is no object"),
        (in_frame(fl_x="30"), "frame 1 has fl_x '30', which is no finite number"),
        (in_frame(fl_x=True), "frame 1 has fl_x 'True', which is no finite number"),
        (in_frame(cx=float("inf")), "frame 1 has cx 'inf', which is no finite number"),
        (in_frame(fl_x=None, fl_y=None), "frame 1 has no focal length"),
        (in_frame(fl_x=None, camera_angle_x=40.0), "angles of view are in radians"),
        (in_frame(transform_matrix=[[1, 2], [3, 4]]), "frame 1 has no transform_matrix of 4x4 numbers"),
        (in_frame(transform_matrix=None), "frame 1 has no transform_matrix of 4x4 numbers"),
        (in_frame(transform_matrix=[[None] * 4] * 4), "frame 1, transform_matrix, has a number 'None', which is no finite number"),
        (in_frame(file_path=None), "frame 1 has no file_path"),
        (in_frame(file_path=["a"]), "frame 1 has file_path a list, which is no name"),
        (in_frame(file_path="a" * 5000), "is missing, which .*frame 1 names"),
        (in_frame(depth_file_path="depth/frame_1.npy"), r"frame_1\.npy is missing"),
        (in_frame(depth_unit_scale_factor=0), "which is no unit"),
    ],
)
def test_what_transforms_json_may_not_hold(
    sample: Sample, change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    change_json(write_layout(sample, "nerfstudio", tmp_path), change)
    with pytest.raises(InputError, match=message) as caught:
        open_scenes(f"nerfstudio:{tmp_path}")[0].sample(range(3))
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"frames": ' + "9" * 5000 + "}", "[1]", '"a"'])
def test_what_is_no_json(text: str, sample: Sample, tmp_path: Path) -> None:
    (write_layout(sample, "nerfstudio", tmp_path) / "transforms.json").write_text(text)
    with pytest.raises(InputError, match=r"transforms\.json (cannot be read as JSON|has no list of frames)"):
        open_scenes(f"nerfstudio:{tmp_path}")[0]


def test_a_folder_of_folders_of_photographs(sample: Sample, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_layout(sample, "images", tmp_path / name)
    (tmp_path / "c").mkdir()
    with pytest.warns(DataWarning, match=r"1 of 3 folders are left out, .*: c"):
        assert open_scenes(f"images:{tmp_path}").names == ("a", "b")
