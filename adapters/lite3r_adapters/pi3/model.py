"""Pi3 (arXiv 2507.13347) for the command line. Its library is imported only when the model is built."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from lite3r_plugin.adapter import ModelEntry
from lite3r_plugin.scene.geometry import fit_intrinsics
from lite3r_plugin.scene.images import to_tensor
from lite3r_plugin.scene.prediction import Prediction

PATCH = 14
PIXEL_LIMIT = 255_000


def _create() -> nn.Module:
    from pi3.models.pi3 import Pi3  # pyright: ignore[reportMissingImports]

    return Pi3()


def _size(width: int, height: int) -> tuple[int, int]:
    """The size in pixels, multiples of 14 below the pixel limit, that is nearest to the aspect of `width` x `height`."""
    scale = math.sqrt(PIXEL_LIMIT / (width * height)) / PATCH
    columns, rows = round(width * scale), round(height * scale)
    while columns * rows * PATCH**2 > PIXEL_LIMIT:
        if columns * height > rows * width:
            columns -= 1
        else:
            rows -= 1
    return max(1, columns) * PATCH, max(1, rows) * PATCH


def preprocess(images: Sequence[Image.Image]) -> Tensor:
    """All at one size: the first one's aspect, about 255,000 pixels, multiples of 14."""
    size = _size(*images[0].size)
    return to_tensor([image.resize(size, Image.Resampling.LANCZOS) for image in images])


def predict(model: nn.Module, images: Tensor) -> Prediction:
    """Points and cameras from the model; the focal length, which it does not predict, is fitted to its points."""
    output = model(images[None])
    camera_points = output["local_points"][0].float()
    pose = output["camera_poses"][0].float()  # camera to world
    rotation = pose[:, :3, :3].mT
    return Prediction(
        depth=camera_points[..., 2],
        confidence=output["conf"][0, ..., 0].float().sigmoid(),
        points=output["points"][0],
        world_to_camera=torch.cat((rotation, -rotation @ pose[:, :3, 3:]), -1),
        intrinsics=fit_intrinsics(camera_points),
        images=images.permute(0, 2, 3, 1),
    )


ENTRIES = {
    "pi3": ModelEntry(
        name="pi3",
        summary="Pi3, 0.96 B parameters, no reference view (weights: CC BY-NC 4.0)",
        create=_create,
        preprocess=preprocess,
        predict=predict,
        default_weights="yyfz233/Pi3",
        library="pi3",
        install="git clone https://github.com/yyfz/Pi3 and put the clone on PYTHONPATH",
        mixed_sizes="stretched to the first one's shape",
    )
}
