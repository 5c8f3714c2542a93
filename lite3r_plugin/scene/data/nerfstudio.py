"""nerfstudio and NeRF: a ``transforms.json`` that names images and their poses, as nerfstudio, instant-ngp and Blender's add-ons do.

Poses are camera to world in OpenGL's axes (x right, y up, z backward); pixel centres are at +0.5. Depth, where there is any, is in the
unit of the poses times 1000, in PNGs of 16 bits.
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError, plural
from ..images import is_image
from ..reading import entries, is_dir, is_file, listed, only, say, shown
from .cameras import camera_matrix, inverse_pose, rigid
from .checks import make_scene
from .files import Names, find_scenes, image_size
from .maps import read_depth_png, read_mask
from .scene import Frame, Scene, Scenes
from .text import read_text

FILE = "transforms.json"
PARTS = ("transforms_train.json", "transforms_val.json", "transforms_test.json")
DISTORTION = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2", "distortion_params")
PINHOLES = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "PERSPECTIVE")  # without the distortion, which is refused
# What holds for all frames where it stands beside them.
KEYS = (*DISTORTION, "camera_model", "is_fisheye", "w", "h", "cx", "cy", "depth_unit_scale_factor") + tuple(
    f"{kind}_{axis}" for kind in ("fl", "camera_angle") for axis in "xy"
)
OPENCV_AXES = np.diag([1.0, -1, -1])


def nerfstudio(path: Path) -> Scenes:
    """A folder with ``transforms.json``, or ``transforms_train.json`` and its like, whose frames are put together; or a folder of them.

    Photographs beside those that the file names are left out with a `DataWarning`. Distortion is refused.
    """
    root, names = find_scenes(path, lambda folder: bool(_files(folder)), f"a folder with {FILE}")
    return Scenes(names, partial(_load, root))


def _files(folder: Path) -> list[Path]:
    if is_file(whole := folder / FILE):
        return [whole]
    return [folder / part for part in PARTS if is_file(folder / part)]


def _load(root: Path, name: str) -> Scene:
    folder = root / name
    finder, frames, used = Names(folder), list[Frame](), set[Path]()
    for file in _files(folder):
        content = _read(file)
        shared = {key: content[key] for key in KEYS if key in content}
        for number, entry in enumerate(content["frames"]):
            if not isinstance(entry, dict):
                raise InputError(f"{file}: frame {number} is no object with file_path and transform_matrix")
            frames.append(_frame(finder, {**shared, **entry}, f"{file}: frame {number}"))
            used.add(Path(frames[-1].image) if isinstance(frames[-1].image, Path) else folder)
    if len(used) < len(frames):
        raise InputError(f"{folder}: several frames are of one image; give each its own")
    rest = [p for place in sorted({p.parent for p in used} - {folder}) for p in entries(place) if is_image(p) and p not in used]
    masks_and_depth = _beside(frames)
    if rest := [p.name for p in rest if p not in masks_and_depth]:
        say(f"{folder}: {plural(len(rest), 'image is', 'images are')} not in {FILE} and left out: {listed(rest)}")
    return make_scene(name, frames, folder)


def _beside(frames: list[Frame]) -> set[Path]:
    """The files of depth maps and masks."""
    return {part.args[0] for frame in frames for part in (frame.depth, frame.mask) if isinstance(part, partial)}


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError too
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} cannot be read as JSON: {shown(str(error), 200)}") from error
    if not isinstance(content, dict) or not isinstance(content.get("frames"), list) or not content["frames"]:
        raise InputError(f"{file} has no list of frames")
    return content


def _frame(finder: Names, values: dict[str, Any], origin: str) -> Frame:
    """The frame of an entry and of what holds for all of them."""
    image = _named(finder, values, "file_path", origin)
    if image is None:
        raise InputError(f"{origin} has no file_path")
    matrix = _matrix(values.get("transform_matrix"), origin)
    rotation, centre = rigid(matrix, origin)
    pose = inverse_pose(rotation @ OPENCV_AXES, centre, origin)
    K, size = _camera(values, image, origin)
    depth, mask = (_named(finder, values, key, origin) for key in ("depth_file_path", "mask_path"))
    if depth is not None and depth.suffix.lower() != ".png":
        raise InputError(f"{origin}: the depth map {depth.name} is no PNG of 16 bits; save it as one")
    unit = _number(values, "depth_unit_scale_factor", origin, 0.001)
    if not 0 < unit < 1e6:
        raise InputError(f"{origin} has depth_unit_scale_factor {unit}, which is no unit")
    name = image.relative_to(finder.root).as_posix() if image.is_relative_to(finder.root) else str(image)
    return Frame(
        name,
        image,
        camera_matrix(K, origin),
        pose,
        None if depth is None else partial(read_depth_png, depth, unit),
        None if mask is None else partial(read_mask, mask),
        size=size,
    )


def _camera(values: dict[str, Any], image: Path, origin: str) -> tuple[np.ndarray, tuple[int, int] | None]:
    """Intrinsics ``[3, 3]``, and height and width where the file tells them."""
    model = values.get("camera_model", PINHOLES[0])
    distorted = [key for key in DISTORTION if not _is_zero(values.get(key))]
    if model not in PINHOLES or values.get("is_fisheye") or distorted:
        what = f"a camera {_brief(model)}" + (f" with {', '.join(distorted)}" if distorted else "")
        raise InputError(f"{origin} has {what}, which is distorted; undistort the photographs first: colmap image_undistorter")
    told = [_number(values, key, origin) for key in ("h", "w")]
    if any(side is not None and not (0 < side < 1e6 and side == int(side)) for side in told):
        raise InputError(f"{origin} has h and w {told}, which are no numbers of pixels")
    size = (int(told[0]), int(told[1])) if told[0] is not None and told[1] is not None else None
    height, width = size or image_size(image)
    focal = [_focal(values, axis, side, origin) for axis, side in (("x", width), ("y", height))]
    fx = focal[0] if focal[0] is not None else focal[1]
    fy = focal[1] if focal[1] is not None else focal[0]
    if fx is None or fy is None:
        raise InputError(f"{origin} has no focal length: fl_x or camera_angle_x")
    cx, cy = _number(values, "cx", origin, width / 2), _number(values, "cy", origin, height / 2)
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]), size


def _is_zero(value: Any) -> bool:
    """Whether nothing is written, or 0, or zeros."""
    return value is None or value in (0, []) or (isinstance(value, list) and all(part == 0 for part in value))


def _brief(value: Any) -> str:
    """A value of the file for a message."""
    return repr(shown(str(value), 40)) if value is None or isinstance(value, str | int | float) else f"a {type(value).__name__}"


def _focal(values: dict[str, Any], axis: str, side: int, origin: str) -> float | None:
    focal, angle = _number(values, f"fl_{axis}", origin), _number(values, f"camera_angle_{axis}", origin)
    if focal is not None or angle is None:
        return focal
    if not 0 < angle < math.pi:
        raise InputError(f"{origin} has camera_angle_{axis} {angle}; angles of view are in radians, between 0 and pi")
    return side / (2 * math.tan(angle / 2))


def _number(values: dict[str, Any], key: str, origin: str, otherwise: Any = None) -> Any:
    """A number of the file as float; what is not there is `otherwise`."""
    value = values.get(key, otherwise)
    return None if value is None else _finite(value, origin, key)


def _finite(value: Any, origin: str, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise InputError(f"{origin} has {what} {_brief(value)}, which is no finite number")
    return float(value)


def _matrix(value: Any, origin: str) -> np.ndarray:
    """A pose ``[4, 4]``, of which the last row may be left out."""
    rows = value if isinstance(value, list) else []
    if len(rows) == 3:
        rows = [*rows, [0, 0, 0, 1]]
    if len(rows) != 4 or not all(isinstance(row, list) and len(row) == 4 for row in rows):
        raise InputError(f"{origin} has no transform_matrix of 4x4 numbers")
    return np.array([[_finite(number, f"{origin}, transform_matrix,", "a number") for number in row] for row in rows])


def _named(finder: Names, values: dict[str, Any], key: str, origin: str) -> Path | None:
    """The file that an entry names, relative to the folder; Blender's exporter leaves the suffix of images out."""
    name = values.get(key)
    if name is None:
        return None
    if not isinstance(name, str) or not name:
        raise InputError(f"{origin} has {key} {_brief(name)}, which is no name")
    found = finder.find(name)
    if found is not None and is_file(found):
        return found
    folder = finder.root / Path(name).parent
    same = [p for p in entries(folder) if is_image(p) and p.stem == Path(name).name] if is_dir(folder) else []
    if not same:
        raise InputError(f"{shown(str(finder.root / name), 300)} is missing, which {origin} names")
    return only(same, name)
