"""COLMAP models, text and binary: undistorted photographs with cameras, and COLMAP's own depth maps where there are any.

The model lies in ``sparse/0``, ``sparse`` or the folder itself, the photographs in ``images``, depth in ``stereo/depth_maps``. Pixel
centres are at +0.5. The scale of the world is arbitrary.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from ...errors import InputError
from .cameras import camera_matrix, world_to_camera
from .files import checked_depth, folders, parse_numbers, read_bytes, read_text
from .scene import Frame, Scene, Scenes

# Names, numbers of focal lengths and of all parameters, in the order of the binary format's ids; None: no pinhole even undistorted.
MODELS: tuple[tuple[str, int | None, int], ...] = (
    ("SIMPLE_PINHOLE", 1, 3), ("PINHOLE", 2, 4), ("SIMPLE_RADIAL", 1, 4), ("RADIAL", 1, 5), ("OPENCV", 2, 8), ("OPENCV_FISHEYE", None, 8),
    ("FULL_OPENCV", 2, 12), ("FOV", None, 5), ("SIMPLE_RADIAL_FISHEYE", None, 4), ("RADIAL_FISHEYE", None, 5),
    ("THIN_PRISM_FISHEYE", None, 12),
)  # fmt: skip
BY_NAME = {name: (focals, count) for name, focals, count in MODELS}


@dataclass(frozen=True)
class Camera:
    """One camera of a model; its images share it."""

    K: Tensor
    size: tuple[int, int]


Pose = tuple[str, int, Tensor]  # name of the image, id of the camera, world to camera


def colmap(path: Path) -> Scenes:
    """One COLMAP workspace, or a folder of them."""
    found = [path] if _model(path) else [folder for folder in folders(path) if _model(folder)]
    if not found:
        raise InputError(f"{path} holds no COLMAP model: cameras and images, .bin or .txt, in sparse/0, sparse or the folder itself")
    return Scenes([p.name for p in found], partial(_load, found[0].parent))


def _model(folder: Path) -> Path | None:
    candidates = (folder / "sparse" / "0", folder / "sparse", folder)
    return next((p for p in candidates if (p / "cameras.bin").is_file() or (p / "cameras.txt").is_file()), None)


def _load(root: Path, name: str) -> Scene:
    folder = root / name
    model = _model(folder)
    if model is None:
        raise InputError(f"{folder} holds no COLMAP model any more")
    binary = (model / "cameras.bin").is_file()
    cameras = dict((_binary_cameras if binary else _text_cameras)(model / ("cameras.bin" if binary else "cameras.txt")))
    images_file = model / ("images.bin" if binary else "images.txt")
    pictures = folder / "images" if (folder / "images").is_dir() else folder
    frames = []
    for image, camera_id, pose in sorted((_binary_images if binary else _text_images)(images_file), key=lambda entry: entry[0]):
        if camera_id not in cameras:
            raise InputError(f"{images_file}: {image} is of camera {camera_id}, which is not in the model")
        camera = cameras[camera_id]
        depth_file = folder / "stereo" / "depth_maps" / f"{image}.geometric.bin"
        depth = partial(read_depth_map, depth_file) if depth_file.is_file() else None
        frames.append(Frame(image, pictures / image, camera.K, pose, depth, size=camera.size))
    return Scene(name, tuple(frames), str(folder))


def read_depth_map(path: Path) -> Tensor:
    """A depth map of COLMAP's dense stereo, ``[H, W]``: ``width&height&channels&``, then float32 row by row."""
    data = read_bytes(path)
    head = re.match(rb"(\d+)&(\d+)&1&", data)
    if head is None or len(data) - head.end() != 4 * int(head[1]) * int(head[2]):
        raise InputError(f"{path} is no depth map of COLMAP, or damaged: {len(data)} bytes that begin with {data[:16]!r}")
    values = np.frombuffer(data, "<f4", offset=head.end()).reshape(int(head[2]), int(head[1]))
    return checked_depth(values.astype(np.float32), path)


def _camera(model: str, width: int, height: int, parameters: np.ndarray, path: Path) -> Camera:
    focals, count = BY_NAME.get(model, (None, 0))
    if focals is None or (len(parameters) == count and parameters[focals + 2 :].any()):
        raise InputError(f"{path} has a {model} camera with distortion; undistort the photographs first: colmap image_undistorter")
    if len(parameters) != count:
        raise InputError(f"{path}: a {model} camera has {count} parameters, not {len(parameters)}")
    fx, fy, cx, cy = parameters[0], parameters[focals - 1], parameters[focals], parameters[focals + 1]
    return Camera(camera_matrix(np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]), str(path)), (height, width))


def _pose(quaternion: np.ndarray, translation: np.ndarray, origin: str) -> Tensor:
    """World to camera of a quaternion (w, x, y, z)."""
    norm = np.linalg.norm(quaternion)
    if not 0.5 < norm < 2:
        raise InputError(f"{origin}: the quaternion has length {norm:.3g}")
    w, x, y, z = quaternion / norm
    v = np.array([x, y, z])
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return world_to_camera((2 * w * w - 1) * np.eye(3) + 2 * np.outer(v, v) + 2 * w * cross, translation, origin)


def _text_cameras(path: Path) -> Iterator[tuple[int, Camera]]:
    for line in read_text(path).splitlines():
        if line.strip() and not line.startswith("#"):
            camera, model, width, height, *parameters = _words(line, 4, path)
            yield int(camera), _camera(model, int(width), int(height), parse_numbers(parameters, 0, path), path)


def _text_images(path: Path) -> Iterator[Pose]:
    """Two lines an image, of which the second, its points, may be empty."""
    lines = [line for line in read_text(path).splitlines() if not line.startswith("#")]
    for line in lines[::2]:
        if line.strip():
            words = line.split(maxsplit=9)
            if len(words) < 10:
                raise InputError(f"{path} should have 10 words in every other line: {line[:80]!r}")
            numbers = parse_numbers(words[:9], 9, path)
            yield words[9].strip(), int(numbers[8]), _pose(numbers[1:5], numbers[5:8], f"{path}, {words[9]}")


def _words(line: str, least: int, path: Path) -> list[str]:
    words = line.split()
    if len(words) < least or not all(word.isdigit() for word in (words[0], *words[2:4])):
        raise InputError(f"{path}: no camera: {line[:80]!r}")
    return words


def _binary_cameras(path: Path) -> Iterator[tuple[int, Camera]]:
    data, at = read_bytes(path), 8
    for _ in range(_unpack("<Q", data, 0, path)[0]):
        camera, model, width, height = _unpack("<IiQQ", data, at, path)
        if not 0 <= model < len(MODELS):
            raise InputError(f"{path} has a camera of an unknown model, {model}; undistort the photographs first: colmap image_undistorter")
        name, _, count = MODELS[model]
        parameters = np.array(_unpack(f"<{count}d", data, at + 24, path))
        at += 24 + 8 * count
        yield camera, _camera(name, width, height, parameters, path)


def _binary_images(path: Path) -> Iterator[Pose]:
    data, at = read_bytes(path), 8
    for _ in range(_unpack("<Q", data, 0, path)[0]):
        numbers = _unpack("<I7dI", data, at, path)
        end = data.find(b"\0", at + 64)
        if end < 0:
            raise InputError(f"{path} ends early: it is damaged")
        name = data[at + 64 : end].decode(errors="replace")
        at = end + 9 + 24 * _unpack("<Q", data, end + 1, path)[0]  # past the image's points
        if at > len(data):
            raise InputError(f"{path} ends early: it is damaged")
        yield name, numbers[8], _pose(np.array(numbers[1:5]), np.array(numbers[5:8]), f"{path}, {name}")


def _unpack(form: str, data: bytes, at: int, path: Path) -> tuple:
    try:
        return struct.unpack_from(form, data, at)
    except struct.error as error:
        raise InputError(f"{path} ends early: it is damaged") from error
