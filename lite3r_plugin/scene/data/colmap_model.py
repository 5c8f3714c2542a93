"""The files of a COLMAP model, text and binary: ``cameras`` and ``images``, read as COLMAP reads them.

Nothing is read beyond what a file's size allows; what is left over at the end is damage.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from ...errors import InputError
from ..reading import is_file, read_bytes, say, shown
from .cameras import camera_matrix, world_to_camera
from .text import parse_integers, parse_numbers, read_lines

# Names, numbers of focal lengths and of all parameters, in the order of the binary format's ids; None: no pinhole even undistorted.
MODELS: tuple[tuple[str, int | None, int], ...] = (
    ("SIMPLE_PINHOLE", 1, 3), ("PINHOLE", 2, 4), ("SIMPLE_RADIAL", 1, 4), ("RADIAL", 1, 5), ("OPENCV", 2, 8), ("OPENCV_FISHEYE", None, 8),
    ("FULL_OPENCV", 2, 12), ("FOV", None, 5), ("SIMPLE_RADIAL_FISHEYE", None, 4), ("RADIAL_FISHEYE", None, 5),
    ("THIN_PRISM_FISHEYE", None, 12),
)  # fmt: skip
BY_NAME = {name: (focals, count) for name, focals, count in MODELS}
UNDISTORT = "undistort the photographs first: colmap image_undistorter"
LARGEST_SIDE = 10**6  # pixels
QUATERNION_TOLERANCE = 0.01  # of its length, which is 1
POINTS = re.compile(r"[-+.0-9eEnaif\s]*", re.ASCII)  # of numbers, nan and inf


@dataclass(frozen=True)
class Camera:
    """One camera of a model; its images share it.

    Attributes:
        K: ``[3, 3]``.
        size: Height and width.
    """

    K: Tensor
    size: tuple[int, int]


@dataclass(frozen=True)
class Image:
    """One registered image of a model.

    Attributes:
        id, name, camera: Its number, its name (a path with slashes), and its camera's number.
        pose: World to camera ``[3, 4]``.
    """

    id: int
    name: str
    camera: int
    pose: Tensor


def has_model(folder: Path) -> bool:
    """Whether there is a COLMAP model in `folder` itself."""
    return any(is_file(folder / f"cameras.{kind}") for kind in ("bin", "txt"))


def read_model(folder: Path) -> tuple[dict[int, Camera], list[Image]]:
    """Cameras by their numbers, and images. Where there are both kinds of files, the binary ones, as COLMAP does.

    Raises:
        InputError: a file is missing or damaged, a number is twice there, or a camera has distortion.
    """
    kind = "bin" if is_file(folder / "cameras.bin") else "txt"
    cameras_file, images_file = folder / f"cameras.{kind}", folder / f"images.{kind}"
    cameras: dict[int, Camera] = {}
    for number, camera in (_binary_cameras if kind == "bin" else _text_cameras)(cameras_file):
        if number in cameras:
            raise InputError(f"{cameras_file} has camera {number} twice")
        cameras[number] = camera
    images: dict[int, Image] = {}
    for image in (_binary_images if kind == "bin" else _text_images)(images_file):
        if image.id in images:
            raise InputError(f"{images_file} has image {image.id} twice: {shown(images[image.id].name)} and {shown(image.name)}")
        if image.camera not in cameras:
            raise InputError(f"{images_file}: {shown(image.name)} is of camera {image.camera}, which is not in the model")
        images[image.id] = image
    if not images:
        raise InputError(f"{images_file} holds no images")
    return cameras, list(images.values())


def _camera(model: str, width: int, height: int, parameters: np.ndarray, path: Path) -> Camera:
    if not (0 < width <= LARGEST_SIDE and 0 < height <= LARGEST_SIDE):
        raise InputError(f"{path} has a camera for images of {width}x{height} pixels")
    focals, count = BY_NAME.get(model, (None, 0))
    if focals is None or (len(parameters) == count and parameters[focals + 2 :].any()):
        raise InputError(f"{path} has a {shown(model)} camera with distortion; {UNDISTORT}")
    if len(parameters) != count:
        raise InputError(f"{path}: a {model} camera has {count} parameters, not {len(parameters)}")
    fx, fy, cx, cy = parameters[0], parameters[focals - 1], parameters[focals], parameters[focals + 1]
    return Camera(camera_matrix(np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]), str(path)), (height, width))


def _pose(quaternion: np.ndarray, translation: np.ndarray, origin: str) -> Tensor:
    """World to camera of a quaternion (w, x, y, z)."""
    norm = np.sqrt(np.clip(quaternion, -1e9, 1e9) @ np.clip(quaternion, -1e9, 1e9))
    if not abs(norm - 1) <= QUATERNION_TOLERANCE:
        raise InputError(f"{origin}: the quaternion {quaternion.tolist()} has length {norm:.3g}, not 1")
    w, x, y, z = quaternion / norm
    v = np.array([x, y, z])
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return world_to_camera((2 * w * w - 1) * np.eye(3) + 2 * np.outer(v, v) + 2 * w * cross, translation, origin)


def _text_cameras(path: Path) -> Iterator[tuple[int, Camera]]:
    for line in read_lines(path):
        if line and not line.startswith("#"):
            words = line.split()
            if len(words) < 4:
                raise InputError(f"{path}: no camera: {shown(line)!r}")
            camera, width, height = parse_integers((words[0], *words[2:4]), path)
            yield camera, _camera(words[1], width, height, parse_numbers(words[4:], path), path)


def _text_images(path: Path) -> Iterator[Image]:
    """As COLMAP reads them: lines that are empty or begin with # are skipped, then comes an image, and the very next line holds its points,
    none if it is empty. Behind the last image that line may be missing."""
    lines, announced, count = read_lines(path), None, 0
    for line in lines:
        if match := re.match(r"# Number of images: ([0-9]{1,9})", line):
            announced = int(match[1])
        if not line or line.startswith("#"):
            continue
        count += 1
        words = line.split(maxsplit=9)
        if len(words) < 10:
            raise InputError(f"{path} should have 10 words in the line of an image: {shown(line)!r}")
        number, camera = parse_integers((words[0], words[8]), path)
        numbers = parse_numbers(words[1:8], path)
        points = next(lines, "")
        if not _are_points(points):
            raise InputError(
                f"{path} should have the points of {shown(words[9])} behind its line, or an empty line, not {shown(points)!r}; "
                "two lines are one image"
            )
        yield Image(number, words[9], camera, _pose(numbers[:4], numbers[4:], f"{path}, {shown(words[9])}"))
    if announced not in (None, count):
        say(f"{path} announces {announced} images and holds {count}; if nobody took images out, it is damaged")


def _are_points(line: str) -> bool:
    """Whether a line holds x, y and a whole number each time; only the last number is looked at, for there are millions."""
    last = line[-30:].split()[-1:]
    return not line or (POINTS.fullmatch(line) is not None and len(line.split()) % 3 == 0 and last[0].lstrip("-").isdigit())


def _binary_cameras(path: Path) -> Iterator[tuple[int, Camera]]:
    data, at = read_bytes(path), 8
    for _ in range(_unpack("<Q", data, 0, path)[0]):
        camera, model, width, height = _unpack("<IiQQ", data, at, path)
        if not 0 <= model < len(MODELS):
            raise InputError(f"{path} has a camera of an unknown model, {model}; {UNDISTORT}")
        name, _, count = MODELS[model]
        parameters = np.array(_unpack(f"<{count}d", data, at + 24, path))
        at += 24 + 8 * count
        yield camera, _camera(name, width, height, parameters, path)
    _require_end(data, at, path)


def _binary_images(path: Path) -> Iterator[Image]:
    data, at = read_bytes(path), 8
    for _ in range(_unpack("<Q", data, 0, path)[0]):
        numbers = _unpack("<I7dI", data, at, path)
        end = data.find(b"\0", at + 64, at + 64 + 4096)
        if end < 0:
            raise InputError(f"{path} ends early, or has a name without an end: it is damaged")
        try:
            name = data[at + 64 : end].decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{path} has an image whose name is no UTF-8, {data[at + 64 : end][:80]!r}; rename it") from error
        at = end + 9 + 24 * _unpack("<Q", data, end + 1, path)[0]  # past the image's points
        if at > len(data):
            raise InputError(f"{path} ends early: it is damaged")
        if not name:
            raise InputError(f"{path} has an image without a name: it is damaged")
        yield Image(numbers[0], name, numbers[8], _pose(np.array(numbers[1:5]), np.array(numbers[5:8]), f"{path}, {shown(name)}"))
    _require_end(data, at, path)


def _require_end(data: bytes, at: int, path: Path) -> None:
    if at != len(data):
        raise InputError(f"{path} goes on for {len(data) - at} bytes after what it announces: it is damaged")


def _unpack(form: str, data: bytes, at: int, path: Path) -> tuple:
    try:
        return struct.unpack_from(form, data, at)
    except struct.error as error:
        raise InputError(f"{path} ends early: it is damaged") from error
