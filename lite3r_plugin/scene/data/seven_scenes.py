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
from ..images import SUFFIXES
from ..reading import entries, is_file, listed, say, shown
from .cameras import camera_matrix, inverse_pose, rigid
from .checks import make_scene
from .files import child, folders, numbered
from .maps import read_depth_png
from .scene import Frame, Scene, Scenes
from .text import read_lines, read_numbers

NOMINAL = ((585.0, 0.0, 320.0), (0.0, 585.0, 240.0), (0.0, 0.0, 1.0))
SIZE = (480, 640)
INTRINSICS = "camera-intrinsics.txt"
SPLIT = "TestSplit.txt"
IMAGE = rf"(?:{'|'.join(suffix[1:] for suffix in SUFFIXES)})"
COLOUR, DEPTH, POSE = (rf"frame-([0-9]{{1,12}})\.{kind}" for kind in (rf"color\.{IMAGE}", rf"depth\.{IMAGE}", r"pose\.txt"))


def seven_scenes(path: Path) -> Scenes:
    """All scenes (``chess/seq-01``), one scene (``seq-01``), or one sequence; the test sequences are those of ``TestSplit.txt``."""
    found = _sequences(path, 2)
    if not found:
        raise InputError(f"{path} holds no frame-*.color.* file, nor do the folders in it")
    root = path.parent if path in found else path
    names = [p.relative_to(root).as_posix() for p in found]
    splits = {p.parent: file for p in found if is_file(file := child(p.parent, SPLIT))}
    listing = {folder.relative_to(root).as_posix(): _listed(file) for folder, file in splits.items()}
    test = (
        [name if folder == "." else f"{folder}/{name}" for folder, sequences in listing.items() for name in sequences] if splits else None
    )
    if test is not None and path not in found and (absent := sorted(set(test) - set(names))):
        say(f"{path}: {len(absent)} of {len(test)} test sequences are not there: {listed(absent)}")
    return Scenes(names, partial(_load, root), test)


def _sequences(path: Path, depth: int) -> list[Path]:
    colour = re.compile(COLOUR, re.IGNORECASE)
    if any(colour.fullmatch(p.name) for p in entries(path)):
        return [path]
    found = {folder: _sequences(folder, depth - 1) for folder in folders(path)} if depth >= 0 else {}
    without = [folder.name for folder, sequences in found.items() if not sequences]
    if len(without) < len(found) and without:
        say(f"{path}: {len(without)} of {len(found)} folders are left out, which hold no frame-*.color.* file: {listed(without)}")
    return [sequence for sequences in found.values() for sequence in sequences]


def _listed(file: Path) -> list[str]:
    """The names of the sequences that a split lists by their numbers, one in a line: ``sequence1``."""
    names = []
    for line in filter(None, read_lines(file)):
        match = re.fullmatch(r"[^0-9]*([0-9]{1,9})", line)
        if match is None:
            raise InputError(f"{file} should name a sequence by its number in every line, has {shown(line, 40)!r}")
        names.append(f"seq-{int(match[1]):02d}")
    return names


def _load(root: Path, name: str) -> Scene:
    folder = root / name
    K, size = np.array(NOMINAL), SIZE
    if is_file(file := child(folder, INTRINSICS)):
        K, size = _intrinsics(file), None
    held = entries(folder)
    colours, depths, poses = (
        numbered(held, pattern, f"{kind} of frame") for pattern, kind in ((COLOUR, "colour"), (DEPTH, "depth"), (POSE, "pose"))
    )
    if lost := sorted((depths.keys() | poses.keys()) - colours.keys()):
        raise InputError(f"{folder} has no colour image of {len(lost)} frames that have depth or a pose: {listed(lost)}")
    frames = []
    for number, image in colours.items():
        stem = image.name.split(".")[0]
        pose_file = poses.get(number, folder / f"{stem}.pose.txt")
        pose = inverse_pose(*rigid(read_numbers(pose_file, 16).reshape(4, 4), str(pose_file)), str(pose_file))
        if number not in depths:
            raise InputError(f"{folder} has no image {stem}.depth")
        frames.append(Frame(stem, image, camera_matrix(K, str(file)), pose, partial(read_depth_png, depths[number]), size=size))
    return make_scene(name, frames, folder)


def _intrinsics(file: Path) -> np.ndarray:
    """``[3, 3]`` of a file with 3x3 numbers, or 4x4 as other scanners write them."""
    numbers = read_numbers(file, 9, 16)
    if len(numbers) == 9:
        return numbers.reshape(3, 3)
    K, offset = rigid(numbers.reshape(4, 4), str(file))
    if offset.any():
        raise InputError(f"{file}: the last column of the intrinsics is {offset.tolist()}, not 0 0 0")
    return K
