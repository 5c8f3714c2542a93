"""BlendedMVS and DTU as MVSNet reads them: ``cams/00000000_cam.txt``, ``pair.txt``, PFM depth.

A camera file holds world to camera, then the intrinsics, for pixel centres at +0.5, then a depth range that is not needed here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from ...errors import InputError
from .cameras import camera_matrix, world_to_camera
from .files import folders, image_named, parse_numbers, read_mask, read_numbers, read_pfm, read_text
from .scene import Frame, Scene, Scenes

# The seven scenes that the authors of BlendedMVS keep for validation.
BLENDEDMVS_TEST = (
    "5b7a3890fc8fcf6781e2593a",
    "5c189f2326173c3a09ed7ef3",
    "5b950c71608de421b1e7318f",
    "5a6400933d809f1d8200af15",
    "59d2657f82ca7774b1ec081d",
    "5ba19a8a360c7c30c1c169df",
    "59817e4a1bd4b175e7038d19",
)
# MVSNet's scans for evaluation and for validation; it trains on the others.
DTU_TEST = (1, 4, 9, 10, 11, 12, 13, 15, 23, 24, 29, 32, 33, 34, 48, 49, 62, 75, 77, 110, 114, 118)
DTU_VALIDATION = (3, 5, 17, 21, 28, 35, 37, 38, 40, 43, 56, 59, 66, 67, 82, 86, 106, 117)
DTU_LIGHT = 3  # of seven; MVSNet evaluates with this one
DTU_REDUCTION = 4  # the cameras of the training layout are for images of a quarter of the size

CAMERA = re.compile(r"(\d{8})_cam\.txt")


def blendedmvs(path: Path) -> Scenes:
    """BlendedMVS: a folder of scenes, or one scene, with ``blended_images``, ``cams`` and ``rendered_depth_maps``."""
    names, load = _find(path, "blended_images", "rendered_depth_maps")
    return Scenes(names, load, BLENDEDMVS_TEST)


def dtu(path: Path) -> Scenes:
    """DTU as MVSNet lays it out: for training (``Cameras``, ``Depths``, ``Rectified``), or a folder of scans, or one scan, with ``images``
    and ``cams``. Any other data in the second layout can be read as well. Depth and poses are in millimetres."""
    if not (path / "Rectified").is_dir():
        names, load = _find(path, "images", "depths")
        return dtu_scans(names, load)
    names = [folder.name.removesuffix("_train") for folder in folders(path / "Rectified")]
    return dtu_scans(names, partial(_dtu_training, path))


def dtu_scans(names: Sequence[str], load: Callable[[str], Scene]) -> Scenes:
    """Scans with MVSNet's split, however a folder spells the number: scan24, dtu_scan24."""
    numbers = {name: int(match[1]) for name in names if (match := re.fullmatch(r"(?:dtu_)?scan(\d+)", name, re.IGNORECASE))}
    test, unused = ([name for name, number in numbers.items() if number in part] for part in (DTU_TEST, DTU_VALIDATION))
    return Scenes(names, load, test if numbers else None, unused)


def read_camera(path: Path, reduction: int = 1) -> tuple[Tensor, Tensor]:
    """Intrinsics ``[3, 3]``, for images larger by `reduction`, and world to camera ``[3, 4]``."""
    words = read_text(path).split()
    if len(words) < 27 or [words[0].lower(), words[17].lower()] != ["extrinsic", "intrinsic"]:
        raise InputError(f"{path} is no camera file: 'extrinsic' with 16 numbers, then 'intrinsic' with 9")
    pose = parse_numbers(words[1:17], 16, path).reshape(4, 4)
    K = parse_numbers(words[18:27], 9, path).reshape(3, 3)
    K[:2] *= reduction
    return camera_matrix(K, str(path)), world_to_camera(pose[:3, :3], pose[:3, 3], str(path))


def read_pairs(path: Path) -> dict[int, tuple[int, ...]]:
    """For each view of a ``pair.txt``, those that see the same parts, the best first."""
    numbers = read_numbers(path, 1)
    pairs, at = {}, 1
    for _ in range(int(numbers[0])):
        if at + 2 > len(numbers) or (end := at + 2 + 2 * int(numbers[at + 1])) > len(numbers):
            raise InputError(f"{path} ends early: it announces {int(numbers[0])} views and holds {len(pairs)}")
        pairs[int(numbers[at])] = tuple(int(i) for i in numbers[at + 2 : end : 2])
        at = end
    return pairs


def _find(path: Path, images: str, depths: str) -> tuple[list[str], Callable[[str], Scene]]:
    if (path / images).is_dir():
        names, root = [path.name], path.parent
    else:
        names, root = [folder.name for folder in folders(path) if (folder / images).is_dir()], path
    if not names:
        raise InputError(f"{path} holds no scene: a folder with {images} and cams")
    return names, partial(_scene, root, images, depths)


def _scene(root: Path, images: str, depths: str, name: str) -> Scene:
    folder = root / name
    cams = folder / "cams"
    if not cams.is_dir():
        raise InputError(f"{cams} is missing: the cameras of the scene")
    views = sorted(int(match[1]) for file in cams.iterdir() if (match := CAMERA.fullmatch(file.name)))
    pictures = {int(file.stem) for file in (folder / images).iterdir() if re.fullmatch(r"\d{8}", file.stem)}
    if lost := sorted(pictures - set(views)):
        raise InputError(f"{cams / f'{lost[0]:08d}_cam.txt'} is missing: the camera of view {lost[0]}")
    covisible = _covisible(next((p for p in (cams / "pair.txt", folder / "pair.txt") if p.is_file()), None), views)
    frames = []
    for view in views:
        K, pose = read_camera(cams / f"{view:08d}_cam.txt")
        depth = partial(read_pfm, folder / depths / f"{view:08d}.pfm") if (folder / depths).is_dir() else None
        frames.append(Frame(f"{view:08d}", image_named(folder / images, f"{view:08d}"), K, pose, depth, covisible=covisible.get(view, ())))
    return Scene(name, tuple(frames), str(folder))


def _dtu_training(path: Path, name: str) -> Scene:
    cameras = path / "Cameras" / "train"
    if not cameras.is_dir():
        raise InputError(f"{cameras} is missing: the cameras of the training layout")
    pictures, depths = ((path / kind / f"{name}_train") for kind in ("Rectified", "Depths"))
    views = sorted(
        int(match[1]) - 1 for file in pictures.iterdir() if (match := re.fullmatch(rf"rect_(\d+)_{DTU_LIGHT}_r5000\.png", file.name))
    )
    covisible = _covisible(p if (p := path / "Cameras" / "pair.txt").is_file() else None, views)
    frames = []
    for view in views:
        K, pose = read_camera(cameras / f"{view:08d}_cam.txt", DTU_REDUCTION)
        image = pictures / f"rect_{view + 1:03d}_{DTU_LIGHT}_r5000.png"
        depth = partial(read_pfm, depths / f"depth_map_{view:04d}.pfm")
        mask = partial(read_mask, file) if (file := depths / f"depth_visual_{view:04d}.png").is_file() else None
        frames.append(Frame(f"{view:08d}", image, K, pose, depth, mask, covisible=covisible.get(view, ())))
    return Scene(name, tuple(frames), str(pictures))


def _covisible(path: Path | None, views: list[int]) -> dict[int, tuple[int, ...]]:
    """The pairs of a file as positions in `views`; a DTU file is for all scans, so it may name more."""
    position = {view: i for i, view in enumerate(views)}
    pairs = {} if path is None else read_pairs(path)
    return {view: tuple(position[i] for i in others if i in position) for view, others in pairs.items()}
