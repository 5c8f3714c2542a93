"""Folders of photographs with calibrated cameras and no depth: DTU as IDR lays it out, and Strecha's outdoor scenes."""

from __future__ import annotations

from collections.abc import Set
from functools import partial
from pathlib import Path

import numpy as np

from ...errors import InputError
from ..images import is_image
from ..reading import entries, is_dir, is_file, listed, only
from .archives import read_matrices
from .cameras import FARTHEST, camera_matrix, inverse_pose, rigid, world_to_camera
from .checks import make_scene
from .files import Names, child, find_scenes, images_by_number
from .maps import read_mask
from .mvsnet import dtu_scans
from .scene import Frame, Scene, Scenes
from .text import parse_integers, read_numbers, read_text

IDR_CAMERAS = "cameras_sphere.npz"
STRECHA_CAMERAS = "gt_dense_cameras"


def dtu_idr(path: Path) -> Scenes:
    """DTU as IDR lays it out: a folder of scans, or one scan, with ``cameras_sphere.npz``, ``image`` or ``images``, and ``mask``.

    Images and masks belong to the camera of the last number in their names. The cameras are for pixel centres at whole numbers, so the
    principal point moves by half a pixel. Poses are in millimetres: the ``scale_mat`` of the file, which puts the object into a unit
    sphere, is left out.
    """
    root, names = find_scenes(path, _has_idr_cameras, f"a folder with {IDR_CAMERAS}")
    return dtu_scans(names, partial(_idr, root))


def strecha(path: Path) -> Scenes:
    """Strecha's scenes: a folder of them, or one, with ``images/NAME.jpg`` and ``gt_dense_cameras/NAME.jpg.camera``; both may lie together.

    A camera file holds the intrinsics, three zeros, camera to world rotation, camera centre, width and height. What the pixel centres
    are is not written; the principal point is taken as it stands. Unit: metres.
    """
    root, names = find_scenes(path, _has_strecha_cameras, "a folder with .camera files")
    return Scenes(names, partial(_strecha, root))


def decompose(projection: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Intrinsics, rotation and translation of a projection ``[3, 4]`` that is K [R | t] times any number."""
    M = projection[:, :3] * np.sign(np.linalg.det(projection[:, :3]))
    q, r = np.linalg.qr(M[::-1].T)  # an RQ decomposition is the QR decomposition of the transpose, rows reversed
    K, R = r.T[::-1, ::-1], q.T[::-1]
    signs = np.sign(np.diag(K))
    K, R = K * signs, R * signs[:, None]
    t = np.linalg.solve(K, projection[:, 3] * np.sign(np.linalg.det(projection[:, :3])))
    return np.triu(K / K[2, 2]), R, t


def _has_idr_cameras(folder: Path) -> bool:
    return is_file(folder / IDR_CAMERAS)


def _idr(root: Path, name: str) -> Scene:
    folder = root / name
    file, pictures, silhouettes = folder / IDR_CAMERAS, child(folder, "image", "images"), child(folder, "mask", "masks")
    matrices, images = read_matrices(file, "world_mat_"), _all_numbered(pictures)
    _require_same(file, "world_mat", matrices.keys(), pictures, "image", images.keys())
    masks = _all_numbered(silhouettes) if is_dir(silhouettes) else {}
    if is_dir(silhouettes):
        _require_same(silhouettes, "mask", masks.keys(), pictures, "image", images.keys())
    frames = []
    for number, image in images.items():
        origin, matrix = f"{file}: world_mat_{number}", matrices[number]
        rigid(matrix, origin)
        if not np.abs(matrix).max() < FARTHEST or abs(np.linalg.det(matrix[:3, :3])) < 1e-9:
            raise InputError(f"{origin} is no projection")
        K, R, t = decompose(matrix[:3])
        K[:2, 2] += 0.5
        mask = partial(read_mask, masks[number]) if masks else None
        frames.append(Frame(image.stem, image, camera_matrix(K, origin), world_to_camera(R, t, origin), mask=mask))
    return make_scene(name, frames, folder)


def _all_numbered(folder: Path) -> dict[int, Path]:
    """All images of a folder by the last number of their names."""
    images = images_by_number(folder)
    if without := [p.name for p in entries(folder) if is_image(p) and p not in images.values()]:
        raise InputError(f"{folder} holds {len(without)} images without a number, which pairs them with cameras: {listed(without)}")
    return images


def _require_same(first: Path, what: str, numbers: Set[int], second: Path, kind: str, others: Set[int]) -> None:
    for lost, holder, missing, owner, thing in (
        (sorted(others - numbers), first, what, second, kind),
        (sorted(numbers - others), second, kind, first, what),
    ):
        if lost:
            raise InputError(
                f"{first} holds {len(numbers)} {what}s for {len(others)} {kind}s of {second}: {holder.name} has no {missing}_{lost[0]}, "
                f"whose {thing} is in {owner.name}; they are paired by number, so give each its own"
            )


def _has_strecha_cameras(folder: Path) -> bool:
    return is_dir(child(folder, STRECHA_CAMERAS)) or any(p.suffix.lower() == ".camera" for p in entries(folder))


def _strecha(root: Path, name: str) -> Scene:
    folder = root / name
    cameras = held if is_dir(held := child(folder, STRECHA_CAMERAS)) else folder
    pictures = held if is_dir(held := child(folder, "images")) else folder
    files = [p for p in entries(cameras) if p.suffix.lower() == ".camera"]
    names, images = Names(pictures), {p: None for p in entries(pictures) if is_image(p)}
    frames = []
    for file in files:
        values = read_numbers(file, 26)
        image = _photograph(names, list(images), file)
        images.pop(image)
        pose = inverse_pose(values[12:21].reshape(3, 3), values[21:24], str(file))
        width, height = parse_integers(read_text(file).split()[24:26], file)
        frames.append(Frame(image.stem, image, camera_matrix(values[:9].reshape(3, 3), str(file)), pose, size=(height, width)))
    if images:
        raise InputError(f"{cameras / (next(iter(images)).name + '.camera')} is missing: the camera of {listed(images)}")
    return make_scene(name, frames, folder)


def _photograph(names: Names, unpaired: list[Path], file: Path) -> Path:
    """The image ``0000.jpg`` of ``0000.jpg.camera``, or the one that differs in its kind alone."""
    found = names.find(file.stem)
    if found is None or not is_image(found):
        same = [p for p in unpaired if p.stem.casefold() == Path(file.stem).stem.casefold()]
        found = only(same, f"the camera {file.name}") if same else None
    if found is None or found not in unpaired:
        raise InputError(f"{names.root} has no image {file.stem} of its own for the camera {file.name}")
    return found
