"""Folders of photographs with calibrated cameras and no depth: DTU as IDR lays it out, and Strecha's outdoor scenes."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from ...errors import InputError
from ..images import find_images
from .cameras import camera_matrix, inverse_pose, world_to_camera
from .files import folders, image_named, parse_numbers, read_bytes, read_mask, read_text
from .mvsnet import dtu_scans
from .scene import Frame, Scene, Scenes

IDR_CAMERAS = "cameras_sphere.npz"
STRECHA_CAMERAS = "gt_dense_cameras"


def dtu_idr(path: Path) -> Scenes:
    """DTU as IDR lays it out: a folder of scans, or one scan, with ``cameras_sphere.npz``, ``image`` or ``images``, and ``mask``.

    The cameras are for pixel centres at whole numbers, so the principal point moves by half a pixel. Poses are in millimetres: the
    ``scale_mat`` of the file, which puts the object into a unit sphere, is left out.
    """
    return dtu_scans(*_find(path, _has_idr_cameras, _idr, f"a folder with {IDR_CAMERAS}"))


def strecha(path: Path) -> Scenes:
    """Strecha's scenes: a folder of them, or one, with ``images/NAME.jpg`` and ``gt_dense_cameras/NAME.jpg.camera``; both may lie together.

    A camera file holds the intrinsics, three zeros, camera to world rotation, camera centre, width and height. What the pixel centres
    are is not written; the principal point is taken as it stands. Unit: metres.
    """
    return Scenes(*_find(path, _has_strecha_cameras, _strecha, "a folder with .camera files"))


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
    return (folder / IDR_CAMERAS).is_file()


def _idr(folder: Path, name: str) -> Scene:
    file = folder / IDR_CAMERAS
    try:
        with np.load(io.BytesIO(read_bytes(file)), allow_pickle=False) as content:
            matrices = {int(key[10:]): content[key] for key in content.files if re.fullmatch(r"world_mat_\d+", key)}
    except InputError:
        raise
    except Exception as error:  # a damaged archive raises whatever its parser trips over
        raise InputError(f"{file} cannot be read as cameras: {error}") from error
    images = find_images(next((p for p in (folder / "image", folder / "images") if p.is_dir()), folder / "image"))
    masks = find_images(folder / "mask") if (folder / "mask").is_dir() else []
    if masks and len(masks) != len(images):
        raise InputError(f"{folder / 'mask'} holds {len(masks)} masks for {len(images)} images")
    frames = []
    for i, image in enumerate(images):
        if i not in matrices:
            raise InputError(f"{file} has no world_mat_{i}, the camera of {image.name}")
        if matrices[i].shape != (4, 4) or not np.isfinite(matrices[i]).all() or abs(np.linalg.det(matrices[i][:3, :3])) < 1e-9:
            raise InputError(f"{file}: world_mat_{i} is no projection")
        K, R, t = decompose(matrices[i][:3].astype(np.float64))
        K[:2, 2] += 0.5
        mask = partial(read_mask, masks[i]) if masks else None
        frames.append(Frame(image.stem, image, camera_matrix(K, f"{file}, {i}"), world_to_camera(R, t, f"{file}, {i}"), mask=mask))
    return Scene(name, tuple(frames), str(folder))


def _has_strecha_cameras(folder: Path) -> bool:
    return (folder / STRECHA_CAMERAS).is_dir() or any(folder.glob("*.camera"))


def _strecha(folder: Path, name: str) -> Scene:
    cameras = folder / STRECHA_CAMERAS if (folder / STRECHA_CAMERAS).is_dir() else folder
    pictures = folder / "images" if (folder / "images").is_dir() else folder
    found = {file.name.removesuffix(".camera"): file for file in sorted(cameras.glob("*.camera"))}
    for image in find_images(pictures):
        if image.name not in found and image.stem not in found:
            raise InputError(f"{cameras / (image.name + '.camera')} is missing: the camera of {image}")
    frames = []
    for stem, file in found.items():
        values = parse_numbers(read_text(file).split(), 26, file)
        image = pictures / stem if (pictures / stem).is_file() else image_named(pictures, Path(stem).stem)
        pose = inverse_pose(values[12:21].reshape(3, 3), values[21:24], str(file))
        size = int(values[25]), int(values[24])
        frames.append(Frame(image.stem, image, camera_matrix(values[:9].reshape(3, 3), str(file)), pose, size=size))
    return Scene(name, tuple(frames), str(folder))


def _find(
    path: Path, holds: Callable[[Path], bool], load: Callable[[Path, str], Scene], wanted: str
) -> tuple[list[str], Callable[[str], Scene]]:
    found = [path] if holds(path) else [folder for folder in folders(path) if holds(folder)]
    if not found:
        raise InputError(f"{path} holds no scene: {wanted}")
    return [p.name for p in found], partial(_load, found[0].parent, load)


def _load(root: Path, load: Callable[[Path, str], Scene], name: str) -> Scene:
    return load(root / name, name)
