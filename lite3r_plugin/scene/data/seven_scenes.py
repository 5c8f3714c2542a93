"""7-Scenes: sequences of ``frame-000000.{color.png,depth.png,pose.txt}`` from a Kinect.

Each sequence is a scene. Poses are camera to world, in metres; depth is in millimetres, 0 and 65535 where unknown, and seen from the depth
camera, a few pixels off the colour image at edges. Without a ``camera-intrinsics.txt`` the data set's nominal ones hold.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np

from ...errors import InputError
from .cameras import camera_matrix, inverse_pose
from .files import folders, image_named, read_depth_png, read_numbers, read_text
from .scene import Frame, Scene, Scenes

NOMINAL = ((585.0, 0.0, 320.0), (0.0, 585.0, 240.0), (0.0, 0.0, 1.0))
SIZE = (480, 640)
INTRINSICS = "camera-intrinsics.txt"


def seven_scenes(path: Path) -> Scenes:
    """All scenes (``chess/seq-01``), one scene (``seq-01``), or one sequence; the test sequences are those of ``TestSplit.txt``."""
    found = _sequences(path, 2)
    if not found:
        raise InputError(f"{path} holds no frame-*.color.* file, nor do the folders in it")
    root = path.parent if path in found else path
    names = [p.relative_to(root).as_posix() for p in found]
    lists = {p.parent for p in found if (p.parent / "TestSplit.txt").is_file()}
    test = [name for folder in lists for name in _listed(folder, root)] if lists else None
    return Scenes(names, partial(_load, root), test)


def _sequences(path: Path, depth: int) -> list[Path]:
    if any(path.glob("frame-*.color.*")):
        return [path]
    return [found for folder in folders(path) for found in _sequences(folder, depth - 1)] if depth >= 0 else []


def _listed(folder: Path, root: Path) -> list[str]:
    numbers = re.findall(r"(\d+)\s*$", read_text(folder / "TestSplit.txt"), re.MULTILINE)
    return [(folder / f"seq-{int(number):02d}").relative_to(root).as_posix() for number in numbers]


def _load(root: Path, name: str) -> Scene:
    folder = root / name
    K, size = np.array(NOMINAL), SIZE
    if (file := folder / INTRINSICS).is_file():
        K, size = read_numbers(file, 9)[:9].reshape(3, 3), None
    frames = []
    for image in sorted(folder.glob("frame-*.color.*")):
        stem = image.name.split(".")[0]
        pose_file = folder / f"{stem}.pose.txt"
        pose = read_numbers(pose_file, 16)[:16].reshape(4, 4)
        depth = partial(read_depth_png, image_named(folder, f"{stem}.depth"))
        world_to_camera = inverse_pose(pose[:3, :3], pose[:3, 3], str(pose_file))
        frames.append(Frame(stem, image, camera_matrix(K, str(folder / INTRINSICS)), world_to_camera, depth, size=size))
    return Scene(name, tuple(frames), str(folder))
