"""BlendedMVS and DTU as MVSNet reads them: ``cams/00000000_cam.txt``, ``pair.txt``, PFM depth.

A camera file holds world to camera, then the intrinsics, for pixel centres at +0.5, then a depth range that is not needed here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from ...errors import InputError, plural
from ..images import is_image
from ..reading import entries, is_dir, is_file, listed, say, shown
from .cameras import camera_matrix, rigid, world_to_camera
from .checks import make_scene
from .files import child, find_scenes, folders, images_by_number, numbered
from .maps import read_mask, read_pfm
from .scene import Frame, Scene, Scenes
from .text import SMALL, parse_integers, parse_numbers, read_text

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
TRAINING = "_train"  # what the training layout puts behind the names of scans
DTU_REDUCTION = 4  # the cameras of the training layout are for images of a quarter of the size

CAMERA = r"([0-9]{1,12})_cam\.txt"
DEPTH = r"([0-9]{1,12})\.pfm"


def blendedmvs(path: Path) -> Scenes:
    """BlendedMVS: a folder of scenes, or one scene, with ``blended_images``, ``cams`` and ``rendered_depth_maps``."""
    names, load = _find(path, "blended_images", "rendered_depth_maps")
    return Scenes(names, load, BLENDEDMVS_TEST)


def dtu(path: Path) -> Scenes:
    """DTU as MVSNet lays it out: for training (``Cameras``, ``Depths``, ``Rectified``), or a folder of scans, or one scan, with ``images``
    and ``cams``. Any other data in the second layout can be read as well. Depth and poses are in millimetres."""
    if not is_dir(rectified := child(path, "Rectified")):
        names, load = _find(path, "images", "depths")
        return dtu_scans(names, load)
    names = [folder.name.removesuffix(TRAINING) for folder in folders(rectified)]
    if len(set(names)) < len(names):
        raise InputError(f"{rectified} holds scans both with and without {TRAINING}; keep one of each")
    return dtu_scans(names, partial(_dtu_training, path))


def dtu_scans(names: Sequence[str], load: Callable[[str], Scene]) -> Scenes:
    """Scans with MVSNet's split, however a folder spells the number: scan24, dtu_scan24."""
    numbers = {name: int(match[1]) for name in names if (match := re.fullmatch(r"(?:dtu_)?scan([0-9]{1,9})", name, re.IGNORECASE))}
    test, unused = ([name for name, number in numbers.items() if number in part] for part in (DTU_TEST, DTU_VALIDATION))
    return Scenes(names, load, test if numbers else None, unused)


def read_camera(path: Path, reduction: int = 1) -> tuple[Tensor, Tensor]:
    """Intrinsics ``[3, 3]``, for images larger by `reduction`, and world to camera ``[3, 4]``."""
    words = read_text(path, SMALL).split()
    if len(words) < 27 or [words[0].lower(), words[17].lower()] != ["extrinsic", "intrinsic"]:
        raise InputError(f"{path} is no camera file: 'extrinsic' with 16 numbers, then 'intrinsic' with 9")
    pose = parse_numbers(words[1:17], path).reshape(4, 4)
    K = parse_numbers(words[18:27], path).reshape(3, 3)
    K[:2] *= reduction
    return camera_matrix(K, str(path)), world_to_camera(*rigid(pose, str(path)), str(path))


def read_pairs(path: Path) -> dict[int, tuple[int, ...]]:
    """For each view of a ``pair.txt``, those that see the same parts, the best first."""
    words = read_text(path).split()
    (count,) = parse_integers(words[:1], path) or [0]
    pairs: dict[int, tuple[int, ...]] = {}
    at = 1
    while len(pairs) < count:  # each turn takes two words or more
        view, partners = parse_integers(words[at : at + 2], path) if at + 2 <= len(words) else (0, -1)
        end = at + 2 + 2 * partners
        if partners < 0 or end > len(words):
            raise InputError(f"{path} ends early: it announces {count} views and holds {len(pairs)}")
        others = tuple(parse_integers(words[at + 2 : end : 2], path))
        parse_numbers(words[at + 3 : end : 2], path)  # how much is seen together
        if view in pairs or view in others or len(set(others)) < len(others) or min((view, *others)) < 0:
            raise InputError(f"{path} names view {view} twice, pairs it with itself or twice with another, or has numbers below 0")
        pairs[view] = others
        at = end
    if count < 1 or at != len(words):
        raise InputError(f"{path} announces {count} views and goes on after them, or has none: {shown(' '.join(words[at : at + 5]))!r}")
    return pairs


def _find(path: Path, images: str, depths: str) -> tuple[list[str], Callable[[str], Scene]]:
    root, names = find_scenes(path, lambda folder: is_dir(child(folder, images)), f"a folder with {images} and cams")
    return names, partial(_scene, root, images, depths)


def _scene(root: Path, images: str, depths: str, name: str) -> Scene:
    folder = root / name
    cams, pictures, maps = (child(folder, part) for part in ("cams", images, depths))
    if not is_dir(cams):
        raise InputError(f"{cams} is missing: the cameras of the scene")
    cameras, photographs = numbered(entries(cams), CAMERA, "camera"), images_by_number(pictures, r"([0-9]{1,12})")
    if lost := sorted(photographs.keys() - cameras.keys()):
        raise InputError(f"{cams / f'{lost[0]:08d}_cam.txt'} is missing: the camera of {photographs[lost[0]].name}{_more(lost)}")
    if lost := sorted(cameras.keys() - photographs.keys()):
        raise InputError(f"{pictures} has no image {lost[0]:08d}, of which {cameras[lost[0]].name} is the camera{_more(lost)}")
    _say_rest(pictures, photographs.values(), "_masked")
    _say_rest(cams, [*cameras.values(), cams / "pair.txt"])
    deep = numbered(entries(maps), DEPTH, "depth map") if is_dir(maps) else None
    if deep and (lost := sorted(deep.keys() - cameras.keys())):
        say(f"{maps}: {len(lost)} depth maps are left out, which have no camera: {listed(lost)}")
    views = list(cameras)
    covisible = _covisible(next((p for p in (child(cams, "pair.txt"), child(folder, "pair.txt")) if is_file(p)), None), views)
    frames = []
    for view in views:
        K, pose = read_camera(cameras[view])
        depth = None if deep is None else partial(read_pfm, deep.get(view, maps / f"{view:08d}.pfm"))
        frames.append(Frame(f"{view:08d}", photographs[view], K, pose, depth, covisible=covisible.get(view, ())))
    return make_scene(name, frames, folder)


def _dtu_training(path: Path, name: str) -> Scene:
    cameras = path / "Cameras" / "train"
    if not is_dir(cameras):
        raise InputError(f"{cameras} is missing: the cameras of the training layout")
    pictures, depths = (child(child(path, kind), name + TRAINING, name) for kind in ("Rectified", "Depths"))
    if not is_dir(depths):
        raise InputError(f"{depths} is missing: the depth maps of the training layout")
    photographs = numbered(entries(pictures), rf"rect_([0-9]{{1,9}})_{DTU_LIGHT}_r5000\.png", "view")
    lights = (re.fullmatch(r"rect_([0-9]{1,9})_(?:max|[0-9])_r5000\.png", p.name) for p in entries(pictures))
    if dark := sorted({int(match[1]) for match in lights if match} - photographs.keys()):
        say(f"{pictures}: {plural(len(dark), 'view is', 'views are')} left out, without an image of light {DTU_LIGHT}: {listed(dark)}")
    if not photographs:
        raise InputError(f"{pictures} holds no image rect_*_{DTU_LIGHT}_r5000.png")
    views = [number - 1 for number in photographs]
    if views[0] < 0:
        raise InputError(f"{photographs[0]} is view 0; the images of the training layout are counted from 1")
    deep = numbered(entries(depths), r"depth_map_([0-9]{1,9})\.pfm", "depth map")
    seen = numbered(entries(depths), r"depth_visual_([0-9]{1,9})\.png", "mask")
    covisible = _covisible(p if is_file(p := path / "Cameras" / "pair.txt") else None, views)
    frames = []
    for view in views:
        K, pose = read_camera(cameras / f"{view:08d}_cam.txt", DTU_REDUCTION)
        depth = partial(read_pfm, deep.get(view, depths / f"depth_map_{view:04d}.pfm"))
        mask = partial(read_mask, seen[view]) if view in seen else None
        frames.append(Frame(f"{view:08d}", photographs[view + 1], K, pose, depth, mask, covisible=covisible.get(view, ())))
    return make_scene(name, frames, pictures)


def _covisible(path: Path | None, views: list[int]) -> dict[int, tuple[int, ...]]:
    """The pairs of a file as positions in `views`; a DTU file is for all scans, so it may name more."""
    position = {view: i for i, view in enumerate(views)}
    pairs = {} if path is None else read_pairs(path)
    if path is not None and (without := [view for view in views if view not in pairs]):
        say(f"{path} pairs {len(pairs)} views, but not {len(without)} of {len(views)} of the scene: {listed(without)}")
    return {view: tuple(position[i] for i in others if i in position) for view, others in pairs.items()}


def _say_rest(folder: Path, used: Iterable[Path], but: str | None = None) -> None:
    """Name the images or text files of `folder` that are not used, except for those whose stems end in `but`."""
    names = {path.name.lower() for path in used}
    rest = [
        path.name
        for path in entries(folder)
        if path.name.lower() not in names
        and (is_image(path) or path.suffix.lower() == ".txt")
        and not (but and path.stem.lower().endswith(but))
    ]
    if rest:
        say(f"{folder}: {plural(len(rest), 'file is', 'files are')} left out, no view by name: {listed(rest)}")


def _more(lost: list[int]) -> str:
    return f", and {len(lost) - 1} more are missing" if len(lost) > 1 else ""
