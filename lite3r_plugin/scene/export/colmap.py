"""COLMAP models, from which 3D Gaussian splatting starts: a folder with ``images`` and ``sparse/0``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...errors import InputError
from ..images import to_image
from .point_cloud import point_cloud
from .reconstruction import Reconstruction

INSTALL = "COLMAP models are written by pycolmap: pip install 'lite3r-plugin[colmap]'"
MAX_POINTS = 100_000  # with more, splatting starts slower and not better; each is an observation too


def has_pycolmap() -> bool:
    """Whether pycolmap can be imported."""
    import importlib.util

    return importlib.util.find_spec("pycolmap") is not None


def write_colmap(scene: Reconstruction, folder: Path) -> None:
    """Write ``sparse/0`` of a new `folder`, in COLMAP's binary and its text format, for ``images`` of `write_images`.

    World and cameras are the prediction's own: COLMAP has the same axes and pixel centres. Each view has a PINHOLE camera of its own, for
    its image as the model saw it. Each point is observed once, in the pixel that it comes from.

    Raises:
        InputError: pycolmap is not installed, or a camera is none.
    """
    if not has_pycolmap():
        raise InputError(INSTALL)
    import pycolmap

    pose, intrinsics = (x.numpy() for x in scene.cameras())
    cloud = point_cloud(scene.prediction, scene.drop_percent, min(scene.max_points, MAX_POINTS))
    views, height, width = scene.prediction.depth.shape
    assert cloud.pixels is not None
    view, pixel = np.divmod(cloud.pixels.numpy(), height * width)
    row, column = np.divmod(pixel, width)
    seen = np.stack((column, row), -1) + 0.5
    model = pycolmap.Reconstruction()
    first = np.searchsorted(view, np.arange(views + 1))  # pixels are in order
    for i, name in enumerate(scene.image_names):
        K = intrinsics[i]
        parameters = [K[0, 0], K[1, 1], K[0, 2], K[1, 2]]
        camera = pycolmap.Camera(model="PINHOLE", width=width, height=height, params=parameters, camera_id=i + 1)
        model.add_camera_with_trivial_rig(camera)
        image = pycolmap.Image(name=name, keypoints=seen[first[i] : first[i + 1]], camera_id=i + 1, image_id=i + 1)
        model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(pose[i]))
    for i, (point, color) in enumerate(zip(cloud.points.double().numpy(), cloud.colors.numpy(), strict=True)):
        track = pycolmap.Track()
        track.add_element(int(view[i]) + 1, int(i - first[view[i]]))
        model.add_point3D(point, track, color)
    target = folder / "sparse" / "0"
    target.mkdir(parents=True)
    model.write_binary(str(target))
    model.write_text(str(target))


def write_images(scene: Reconstruction, folder: Path) -> None:
    """Write what the model saw of each view, as PNGs called `Reconstruction.image_names`, into a new `folder`."""
    folder.mkdir()
    for name, pixels in zip(scene.image_names, scene.prediction.images, strict=True):
        to_image(pixels).save(folder / name)
