"""COLMAP workspaces: undistorted photographs with cameras, and COLMAP's own depth maps where there are any.

The model lies in ``sparse/0`` (or another number), ``sparse``, the same below ``colmap`` (nerfstudio) or ``dense``, in
``dslr_calibration_undistorted`` (ETH3D), or in the folder itself; the photographs lie in ``images`` beside it or above, or where the names
of the images say; depth lies in ``stereo/depth_maps``. Pixel centres are at +0.5. The scale of the world is arbitrary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...errors import InputError
from ..images import is_image, natural
from ..reading import entries, is_dir, is_file, listed, say, shown
from .checks import make_scene
from .colmap_model import Camera, Image, has_model, read_model
from .files import Names, child, find_scenes, folders
from .maps import read_colmap_depth
from .scene import Frame, Scene, Scenes

ETH3D = "dslr_calibration_undistorted"


def colmap(path: Path) -> Scenes:
    """One COLMAP workspace, or a folder of them.

    Of several models in one workspace that with the most images is read, the first of them; photographs that are not in it are left out.
    Both are said in a `DataWarning`.
    """
    root, names = find_scenes(path, lambda folder: bool(_models(folder)), "cameras and images, .bin or .txt, in sparse/0, sparse, ...")
    return Scenes(names, partial(_load, root))


@dataclass(frozen=True)
class _Model:
    """A model of a workspace: where it lies, where the paths beside it begin, and what it holds."""

    folder: Path
    base: Path
    cameras: dict[int, Camera]
    images: list[Image]


def _models(workspace: Path) -> dict[Path, Path]:
    """Folders that hold a model, each with the folder that ``images`` and ``stereo`` would lie in."""
    places: dict[Path, Path] = {}
    dense = child(workspace, "dense")
    bases = [workspace, child(workspace, "colmap"), dense, *(folders(dense) if is_dir(dense) else ())]
    for base in bases:
        sparse = child(base, "sparse")
        parts = sorted(folders(sparse), key=lambda p: natural(p.name)) if is_dir(sparse) else []
        places |= dict.fromkeys((*parts, sparse), base)
    places |= {child(workspace, ETH3D): workspace, workspace: workspace}
    return {place: base for place, base in places.items() if has_model(place)}


def _best_model(workspace: Path) -> _Model:
    found, told, errors = [], [], []
    for place, base in _models(workspace).items():
        shown_place = place.relative_to(workspace).as_posix()
        try:
            cameras, images = read_model(place)
        except InputError as error:
            errors.append(error)
            told.append(f"{shown_place}, which cannot be used ({error})")
        else:
            found.append(_Model(place, base, cameras, images))
            told.append(f"{shown_place} of {len(images)} images")
    if not found:
        raise errors[0] if errors else InputError(f"{workspace} holds no COLMAP model any more")
    best = max(found, key=lambda model: len(model.images))  # the first of equals
    if len(told) > 1:
        say(f"{workspace} holds {len(told)} COLMAP models: {'; '.join(told)}; {best.folder.relative_to(workspace).as_posix()} is read")
    return best


def _load(root: Path, name: str) -> Scene:
    workspace = root / name
    model = _best_model(workspace)
    pictures, files = _photographs(workspace, model)
    _say_unregistered(pictures, set(files.values()))
    depths = next((p for base in (model.base, workspace) if is_dir(p := base / "stereo" / "depth_maps")), None)
    frames = []
    for image in sorted(model.images, key=lambda image: natural(image.name)):
        camera = model.cameras[image.camera]
        depth = None if depths is None else _depth_file(depths, image.name)
        read = None if depth is None else partial(read_colmap_depth, depth)
        frames.append(Frame(image.name, files[image.name], camera.K, image.pose, read, size=camera.size))
    return make_scene(name, frames, workspace)


def _photographs(workspace: Path, model: _Model) -> tuple[Path, dict[str, Path]]:
    """The folder that the images' names start from, of those in question that with the most of the images, and all their files."""
    names = [image.name for image in model.images]
    roots = dict.fromkeys((child(model.base, "images"), model.base, child(workspace, "images"), workspace))
    best, files = next((root for root in roots if is_dir(root)), workspace), dict[str, Path]()
    for root in roots:
        finder = Names(root)
        found = {name: path for name in names if (path := finder.find(name)) is not None and is_file(path)}
        if len(found) > len(files):
            best, files = root, found
        if len(found) == len(names):
            break
    if lost := [name for name in names if name not in files]:
        raise InputError(f"{shown(str(best / lost[0]), 300)} is missing: {len(lost)} of the {len(names)} images of {model.folder} are")
    if len(set(files.values())) < len(set(names)):
        raise InputError(f"{model.folder}: several images of the model are one file in {best}; give each its own")
    return best, files


def _say_unregistered(pictures: Path, used: set[Path]) -> None:
    """Name the photographs beside those of the model: COLMAP could not place them, or nobody asked it to."""
    places = {path.parent for path in used}
    if pictures.name.lower() == "images":
        places |= set(folders(pictures))
    rest = [path for place in sorted(places) for path in entries(place) if is_image(path) and path not in used]
    if rest:
        names = listed(path.relative_to(pictures).as_posix() if path.is_relative_to(pictures) else path for path in rest)
        say(f"{pictures}: {len(rest)} of {len(rest) + len(used)} images not in the COLMAP model, left out: {names}")


def _depth_file(depths: Path, image: str) -> Path | None:
    """The geometric depth map of an image, or None."""
    return path if is_file(path := depths / f"{image}.geometric.bin") else None
