"""From ``LAYOUT:PATH`` to scenes."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from ...errors import InputError
from ..images import find_images, has_images
from ..reading import is_dir, shown
from .calibrated import dtu_idr, strecha
from .checks import make_scene
from .colmap import colmap
from .files import find_scenes, folders
from .mvsnet import blendedmvs, dtu
from .nerfstudio import nerfstudio
from .procedural import procedural
from .scene import Frame, Scene, Scenes
from .seven_scenes import seven_scenes


def images(path: Path) -> Scenes:
    """A folder of photographs of one scene, or a folder of such folders. No cameras, no depth."""
    if not has_images(path) and not any(has_images(folder) for folder in folders(path)):
        find_images(path)  # says what is there instead
    root, names = find_scenes(path, has_images, "a folder with photographs")
    return Scenes(names, partial(_photographs, root))


LAYOUTS: dict[str, Callable[[Path], Scenes]] = {
    "blendedmvs": blendedmvs,
    "dtu": dtu,
    "dtu-idr": dtu_idr,
    "7scenes": seven_scenes,
    "strecha": strecha,
    "colmap": colmap,
    "nerfstudio": nerfstudio,
    "images": images,
}
PROCEDURAL = "procedural"


def open_scenes(spec: str, split: Literal["train", "test"] | None = None) -> Scenes:
    """The scenes of ``LAYOUT:PATH``; a scene's files are read when it is asked for.

    Args:
        spec: LAYOUT is one of `LAYOUTS` with a folder as PATH, or ``procedural:scenes=16,views=8,size=224,seed=0``.
        split: A part of the published split; None: all scenes.

    Raises:
        InputError: the layout is unknown, the folder does not hold it, or nothing is published to split by.
    """
    layout, colon, rest = spec.partition(":")
    if layout not in (*LAYOUTS, PROCEDURAL) or not colon:
        raise InputError(f"data is named LAYOUT:PATH with LAYOUT one of {', '.join((*LAYOUTS, PROCEDURAL))}; got {shown(spec)!r}")
    scenes = procedural(rest) if layout == PROCEDURAL else LAYOUTS[layout](_folder(rest))
    if split is None:
        return scenes
    if split not in ("train", "test"):
        raise InputError(f"a split is 'train' or 'test', not {split!r}")
    part = scenes.split()[split == "test"]
    if not part:
        raise InputError(f"{spec} holds no scene of the published {split} split; it has {', '.join(scenes.names[:20])}")
    return part


def _folder(name: str) -> Path:
    try:
        path = Path(os.path.abspath(Path(name).expanduser()))  # a name even for "." and ".."; links keep theirs
    except (RuntimeError, ValueError) as error:  # ~ of nobody, a NUL
        raise InputError(f"{shown(name)} is no folder ({error}); name the folder that holds the data") from error
    if not name or not is_dir(path):
        raise InputError(f"{shown(name, 300) or 'an empty path'} is no folder; name the folder that holds the data")
    return path


def _photographs(root: Path, name: str) -> Scene:
    folder = root / name
    return make_scene(name, [Frame(path.name, path) for path in find_images(folder)], folder)
