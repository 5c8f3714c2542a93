"""Numbers that are no camera, pose, depth or mask are refused, whichever layout they come in."""

from __future__ import annotations

import json
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
from lite3r_plugin.scene.data import DataWarning, open_scenes
from lite3r_plugin.scene.data.cameras import camera_matrix, check_camera, rigid, world_to_camera
from lite3r_plugin.scene.data.maps import checked_depth, read_depth_png, read_mask, read_pfm, write_pfm


@pytest.fixture(scope="module")
def sample() -> Sample:
    return render(3, 16, 24)


Matrices = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def change_mvsnet(root: Path, change: Matrices) -> None:
    for file in root.rglob("*_cam.txt"):
        words = file.read_text().split()
        pose, K = np.array(words[1:17], float).reshape(4, 4), np.array(words[18:27], float).reshape(3, 3)
        K, pose = change(K, pose)
        file.write_text("\n".join(["extrinsic", *map(repr, pose.ravel().tolist()), "intrinsic", *map(repr, K.ravel().tolist())]))


def change_seven_scenes(root: Path, change: Matrices) -> None:
    (file,) = root.rglob("camera-intrinsics.txt")
    K = np.loadtxt(file)
    for pose_file in root.rglob("*.pose.txt"):
        changed, pose = change(K, np.linalg.inv(np.loadtxt(pose_file)))
        np.savetxt(pose_file, np.linalg.inv(pose) if np.isfinite(pose).all() and abs(np.linalg.det(pose)) > 1e-9 else pose)
        np.savetxt(file, changed)


def change_idr(root: Path, change: Matrices) -> None:
    (file,) = root.rglob("cameras_sphere.npz")
    with np.load(file) as content:
        matrices = {key: content[key] for key in content.files}
    sample = render(3, 16, 24)
    for i in range(3):
        K, pose = sample["K"][i].double().numpy(), np.vstack([sample["w2c"][i].double().numpy(), [0, 0, 0, 1]])
        K, pose = change(K - np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]), pose)
        with np.errstate(all="ignore"):
            matrices[f"world_mat_{i}"] = np.vstack([K @ pose[:3], pose[3]])
    np.savez(file, **matrices)


def change_strecha(root: Path, change: Matrices) -> None:
    for file in root.rglob("*.camera"):
        numbers = np.array(file.read_text().split(), float)
        R = numbers[12:21].reshape(3, 3).T
        K, pose = change(numbers[:9].reshape(3, 3), np.vstack([np.column_stack([R, -R @ numbers[21:24]]), [0, 0, 0, 1]]))
        with np.errstate(all="ignore"):
            numbers = np.concatenate([K.ravel(), numbers[9:12], pose[:3, :3].T.ravel(), -pose[:3, :3].T @ pose[:3, 3], numbers[24:]])
        file.write_text(" ".join(map(repr, numbers.tolist())))


def change_nerfstudio(root: Path, change: Matrices) -> None:
    file = root / "transforms.json"
    content = json.loads(file.read_text())
    for frame in content["frames"]:
        pose = np.linalg.inv(np.array(frame["transform_matrix"]) @ np.diag([1.0, -1, -1, 1]))
        K = np.array([[frame["fl_x"], 0, frame["cx"]], [0, frame["fl_y"], frame["cy"]], [0, 0, 1]])
        K, pose = change(K, pose)
        inverse = np.linalg.inv(pose) @ np.diag([1.0, -1, -1, 1]) if np.isfinite(pose).all() and abs(np.linalg.det(pose)) > 1e-9 else pose
        frame |= {"transform_matrix": inverse.tolist(), "fl_x": K[0, 0], "fl_y": K[1, 1], "cx": K[0, 2], "cy": K[1, 2]}
    file.write_text(json.dumps(content))


CHANGES: dict[str, Callable[[Path, Matrices], None]] = {
    "blendedmvs": change_mvsnet,
    "dtu": change_mvsnet,
    "dtu-training": change_mvsnet,
    "7scenes": change_seven_scenes,
    "dtu-idr": change_idr,
    "strecha": change_strecha,
    "nerfstudio": change_nerfstudio,
}


def scaled(row: int, column: int, by: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(matrix: np.ndarray) -> np.ndarray:
        matrix = matrix.copy()
        matrix[row, column] *= by
        return matrix

    return change


NONSENSE: dict[str, Matrices] = {
    "focal length too large for FP32": lambda K, pose: (scaled(0, 0, 1e38)(K), pose),
    "focal length that FP32 rounds to 0": lambda K, pose: (scaled(1, 1, 1e-300)(K), pose),
    "focal length as a share of the image": lambda K, pose: (scaled(1, 1, 1 / 24)(scaled(0, 0, 1 / 24)(K)), pose),
    "negative focal length": lambda K, pose: (scaled(0, 0, -1.0)(K), pose),
    "principal point far to the right": lambda K, pose: (scaled(0, 2, 1e6)(K), pose),
    "principal point above the image": lambda K, pose: (scaled(1, 2, -5.0)(K), pose),
    "translation of no unit": lambda K, pose: (K, scaled(2, 3, 1e30)(pose)),
    "translation that is not finite": lambda K, pose: (K, scaled(0, 3, np.inf)(pose)),
    "mirrored rotation": lambda K, pose: (K, np.diag([1.0, 1, -1, 1]) @ pose),
    "rotation and scale": lambda K, pose: (K, np.diag([3.0, 3, 3, 1]) @ pose),
    "last row of another matrix": lambda K, pose: (K, pose + np.array([[0.0] * 4] * 3 + [[0.5, 0, 0, 0]])),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_the_helpers_of_these_tests_change_nothing_by_themselves(sample: Sample, kind: str, tmp_path: Path) -> None:
    CHANGES[kind](write_layout(sample, kind, tmp_path), lambda K, pose: (K, pose))
    views = open_scenes(f"{kind.removesuffix('-training')}:{tmp_path}")[0].sample(range(3))
    assert views.world_to_camera is not None
    torch.testing.assert_close(views.world_to_camera, sample["w2c"], atol=1e-4, rtol=1e-4)


# The formats have no such thing: three rows only, focal lengths whose sign and scale a decomposition takes out, or K times the pose.
IMPOSSIBLE = {
    ("strecha", "last row of another matrix"),
    ("dtu-idr", "negative focal length"),
    ("dtu-idr", "mirrored rotation"),
    ("dtu-idr", "rotation and scale"),
}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("nonsense", NONSENSE)
def test_cameras_that_are_none_are_refused(sample: Sample, kind: str, nonsense: str, tmp_path: Path) -> None:
    if (kind, nonsense) in IMPOSSIBLE:
        pytest.skip("the format cannot say it")
    CHANGES[kind](write_layout(sample, kind, tmp_path), NONSENSE[nonsense])
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        open_scenes(f"{kind.removesuffix('-training')}:{tmp_path}")[0].sample(range(3))


@pytest.mark.parametrize("kind", ["blendedmvs", "dtu", "7scenes", "nerfstudio"])
def test_transposed_matrices_are_refused(sample: Sample, kind: str, tmp_path: Path) -> None:
    write_layout(sample, kind, tmp_path)
    if kind == "7scenes":
        for file in tmp_path.rglob("*.pose.txt"):
            np.savetxt(file, np.loadtxt(file).T)
    elif kind == "nerfstudio":
        file = tmp_path / "transforms.json"
        content = json.loads(file.read_text())
        for frame in content["frames"]:
            frame["transform_matrix"] = np.transpose(frame["transform_matrix"]).tolist()
        file.write_text(json.dumps(content))
    else:
        change_mvsnet(tmp_path, lambda K, pose: (K, pose.T))
    with pytest.raises(InputError, match=r"last row .* not 0 0 0 1; is it transposed"):
        open_scenes(f"{kind}:{tmp_path}")[0]


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("images.txt", "12 view", "12.5 view"),
        ("images.txt", "12 view", "nan view"),
        ("images.txt", "12 view", "１２ view"),
        ("images.txt", "12 view", "12_ view"),
        ("images.txt", "3 ", "3.25 "),
        ("cameras.txt", "24 16", "24.5 16"),
        ("cameras.txt", "24 16", "inf 16"),
        ("cameras.txt", "12 PINHOLE", "² PINHOLE"),
        ("cameras.txt", "24 16", f"{'9' * 5000} 16"),
    ],
)
def test_numbers_of_things_are_whole(sample: Sample, file: str, old: str, new: str, tmp_path: Path) -> None:
    path = write_layout(sample, "colmap-text", tmp_path) / "sparse/0" / file
    text = path.read_text()
    assert f"\n{old}" in text or f" {old}" in text
    path.write_text(text.replace(f" {old}", f" {new}", 1) if f" {old}" in text else text.replace(f"\n{old}", f"\n{new}", 1))
    with pytest.raises(InputError, match=rf"{file} should have a whole number where it has") as caught:
        open_scenes(f"colmap:{tmp_path}")[0]
    assert len(str(caught.value)) < 500


def test_whole_numbers_may_be_written_as_floats(sample: Sample, tmp_path: Path) -> None:
    path = write_layout(sample, "colmap-text", tmp_path) / "sparse/0/images.txt"
    path.write_text(path.read_text().replace(" 12 view", " 1.2e1 view"))
    assert len(open_scenes(f"colmap:{tmp_path}")[0]) == 3


@pytest.mark.parametrize("quaternion", [(0.0, 0, 0, 0), (2.0, 0, 0, 0), (0.5, 0.5, 0.5, 0.45), (1e200, 0, 0, 0), (float("nan"), 0, 0, 1)])
def test_quaternions_have_length_one(sample: Sample, quaternion: tuple[float, ...], tmp_path: Path) -> None:
    file = write_layout(sample, "colmap", tmp_path) / "sparse/0/images.bin"
    data = bytearray(file.read_bytes())
    data[12:44] = struct.pack("<4d", *quaternion)
    file.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"images\.bin, view 2\.png: the quaternion"):
        open_scenes(f"colmap:{tmp_path}")[0]


def test_plausible_cameras_are_accepted() -> None:
    for size, K in (
        ((480, 640), [[585.0, 0, 320], [0, 585, 240], [0, 0, 1]]),
        ((480, 640), [[60.0, 0, 320], [0, 60, 240], [0, 0, 1]]),  # 159 degrees
        ((480, 640), [[20_000.0, 0, 320], [0, 20_000, 240], [0, 0, 1]]),  # a telescope
        ((480, 640), [[585.0, 0, -300], [0, 585, 900], [0, 0, 1]]),  # cut out of a larger photograph
        ((2, 2), [[2.0, 0, 1], [0, 2, 1], [0, 0, 1]]),
    ):
        check_camera(camera_matrix(np.array(K), "a"), size, "a")
    with pytest.raises(InputError, match=r"a: the principal point .* is a share of the image"):
        check_camera(camera_matrix(np.array([[585.0, 0, 0.5], [0, 585, 0.5], [0, 0, 1]]), "a"), (480, 640), "a")
    with pytest.raises(InputError, match="no pinhole"):
        camera_matrix(np.array([[585.0, 300, 320], [0, 585, 240], [0, 0, 1]]), "a")


def test_rounded_poses_are_accepted() -> None:
    R = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    R *= np.sign(np.linalg.det(R))
    pose = np.vstack([np.column_stack([R.round(3), [1, 2, 3]]), [0, 0, 0, 1 + 1e-7]])
    read = world_to_camera(*rigid(pose, "a"), "a")
    torch.testing.assert_close(read[:, :3] @ read[:, :3].T, torch.eye(3).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(read[:, :3], torch.tensor(R), atol=1e-3, rtol=0)


def test_poses_far_from_the_origin_keep_their_distances(sample: Sample, tmp_path: Path) -> None:
    """Map coordinates: rounded to FP32 they would put all cameras onto a grid of half a metre."""
    write_layout(sample, "blendedmvs", tmp_path)
    far = np.array([4_300_000.0, 550_000.0, 4_700_000.0])

    def moved(K: np.ndarray, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        U, _, Vh = np.linalg.svd(pose[:3, :3])  # of FP64, as whoever measures such coordinates has it
        return K, np.vstack([np.column_stack([U @ Vh, pose[:3, 3] + U @ Vh @ far]), [0, 0, 0, 1]])

    change_mvsnet(tmp_path, moved)
    with pytest.warns(DataWarning, match="their middle becomes the origin"):
        scene = open_scenes(f"blendedmvs:{tmp_path}")[0]
    near = scene.sample(range(3)).relative().world_to_camera
    write_layout(sample, "blendedmvs", tmp_path / "near")
    true = open_scenes(f"blendedmvs:{tmp_path / 'near'}")[0].sample(range(3)).relative().world_to_camera
    assert near is not None
    assert true is not None
    torch.testing.assert_close(near, true, atol=1e-5, rtol=1e-5)


# --- depth and masks


def depth_of(values: object) -> torch.Tensor:
    return checked_depth(np.array(values), Path("a.pfm"))


def test_depth_has_content_and_a_range() -> None:
    assert depth_of([[0, -1, np.inf, 2.5]]).tolist() == [[0, -1, float("inf"), 2.5]]
    with pytest.raises(InputError, match=r"a\.pfm holds no depth: nothing of 3x1 is known"):
        depth_of([[0.0, -1, np.inf]])
    with pytest.warns(DataWarning, match=r"a\.pfm knows no depth of 3x1"):
        assert checked_depth(np.zeros((1, 3)), Path("a.pfm"), estimated=True).tolist() == [[0, 0, 0]]
    for wrong in (1e-40, 3e38):
        with pytest.raises(InputError, match=r"a\.pfm holds depths from .*byte order"):
            depth_of([[1.0, wrong]])


def test_the_wrong_byte_order_is_noticed(tmp_path: Path) -> None:
    write_pfm(tmp_path / "a.pfm", 1 + torch.rand(20, 20))
    data = (tmp_path / "a.pfm").read_bytes()
    (tmp_path / "a.pfm").write_bytes(data.replace(b"-1.0", b"1.0", 1))
    with pytest.raises(InputError, match=r"a\.pfm holds .*(byte order|NaN)"):
        read_pfm(tmp_path / "a.pfm")
    (tmp_path / "a.pfm").write_bytes(data.replace(b"-1.0", b"-0.004", 1))
    with pytest.raises(InputError, match=r"a\.pfm scales its values by 0\.004"):
        read_pfm(tmp_path / "a.pfm")


def test_depth_images_have_16_bits(tmp_path: Path) -> None:
    file = tmp_path / "a.tif"
    Image.fromarray(np.array([[0, 1500, 65535]], dtype=np.uint16)).save(file)
    torch.testing.assert_close(read_depth_png(file), torch.tensor([[0, 1.5, 0]]))
    Image.fromarray(np.array([[0, 70_000]], dtype=np.int32)).save(file)
    with pytest.raises(InputError, match=r"a\.tif has values from 0 to 70000"):
        read_depth_png(file)
    Image.fromarray(np.array([[0, 65535]], dtype=np.uint16)).save(file)
    with pytest.raises(InputError, match=r"a\.tif holds no depth"):
        read_depth_png(file)
    Image.fromarray(np.array([[0.5, 2.0]], dtype=np.float32)).save(file)
    with pytest.raises(InputError, match=r"a\.tif has pixels of kind F"):
        read_depth_png(file)


@pytest.mark.parametrize(
    ("values", "mask"),
    [
        (np.uint8([[0, 255, 200, 100]]), [False, True, True, False]),
        (np.uint8([[0, 1, 1, 0]]), [False, True, True, False]),
        (np.uint16([[0, 65535, 40_000, 300]]), [False, True, True, False]),
        (np.uint16([[0, 255, 200, 100]]), [False, True, True, False]),
        (np.uint16([[0, 1, 1, 0]]), [False, True, True, False]),
        (np.uint8([[255, 255, 255, 255]]), [True] * 4),
    ],
)
def test_masks_of_every_range_that_is_plain(values: np.ndarray, mask: list[bool], tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "a.png")
    assert read_mask(tmp_path / "a.png").tolist() == [mask]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("L", (3, 2)), "an empty mask"),
        (Image.fromarray(np.uint8([[0, 3, 7]])), "values from 0 to 7; a mask is black and white"),
        (Image.fromarray(np.uint16([[0, 900]])), "values from 0 to 900"),
        (Image.new("RGBA", (3, 2), (255, 255, 255, 9)), "alpha channel"),
    ],
)
def test_masks_that_say_nothing_are_refused(image: Image.Image, message: str, tmp_path: Path) -> None:
    image.save(tmp_path / "a.png")
    with pytest.raises(InputError, match=rf"a\.png .*{message}"):
        read_mask(tmp_path / "a.png")
