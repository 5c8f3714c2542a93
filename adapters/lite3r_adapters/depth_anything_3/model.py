"""Depth Anything 3 (arXiv 2511.10647) for the command line. Its library is imported only when the model is built."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from lite3r_plugin.adapter import ModelEntry
from lite3r_plugin.scene.geometry import unproject
from lite3r_plugin.scene.images import crop_centre, to_tensor
from lite3r_plugin.scene.prediction import Prediction

from .._cameras import set_field_of_view

LONGEST_SIDE = 504
PATCH = 14
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet

MODELS = {
    "da3-small": "0.03 B parameters (weights: Apache-2.0)",
    "da3-base": "0.1 B parameters (weights: Apache-2.0)",
    "da3-large": "0.4 B parameters (weights: CC BY-NC 4.0)",
    "da3-giant": "1.4 B parameters (weights: CC BY-NC 4.0)",
    "da3nested-giant-large": "giant plus a metric model: depth in metres (weights: CC BY-NC 4.0)",
}
INSTALL = "pip install --no-deps depth-anything-3 && pip install addict omegaconf einops"


def _create(name: str) -> nn.Module:
    """The bare network: the library's own wrapper would pull in video and viewer packages."""
    from depth_anything_3.cfg import create_object, load_config
    from depth_anything_3.model.cam_dec import CameraDec
    from depth_anything_3.registry import MODEL_REGISTRY

    model = create_object(load_config(MODEL_REGISTRY[name]))  # pyright: ignore[reportArgumentType]
    for module in model.modules():
        if isinstance(module, CameraDec):
            set_field_of_view(module.fc_fov[0], 1.0)  # pyright: ignore[reportArgumentType]
    return model


def _rename(name: str) -> str:
    return name.removeprefix("model.")  # published files are saved from the wrapper


def preprocess(images: Sequence[Image.Image]) -> Tensor:
    """Longest side 504 pixels, multiples of 14; the common middle of images of different sizes."""
    resized = [_resize(image) for image in images]
    width, height = min(image.width for image in resized), min(image.height for image in resized)
    return to_tensor([crop_centre(image, width, height) for image in resized])


def normalize(pixels: Tensor) -> Tensor:
    """ImageNet statistics."""
    mean, std = _statistics(pixels)
    return (pixels - mean) / std


def predict(model: nn.Module, images: Tensor) -> Prediction:
    """Depth and cameras from the model, points by unprojection. `images` as `normalize` makes them."""
    output = model(images[None])
    depth = output["depth"].reshape(images.shape[0], *images.shape[-2:]).float()
    world_to_camera, intrinsics = output["extrinsics"][0, :, :3, :4].float(), output["intrinsics"][0].float()
    mean, std = _statistics(images)
    return Prediction(
        depth=depth,
        confidence=output["depth_conf"].reshape(depth.shape),
        points=unproject(depth, world_to_camera, intrinsics),
        world_to_camera=world_to_camera,
        intrinsics=intrinsics,
        images=(images * std + mean).clamp(0, 1).permute(0, 2, 3, 1),
    )


def _resize(image: Image.Image) -> Image.Image:
    """First the longest side to 504, then both sides to the nearest multiple of 14, a half upwards."""
    scale = LONGEST_SIDE / max(image.size)
    image = _scale(image, *(max(1, round(side * scale)) for side in image.size))
    return _scale(image, *(max(1, (side + PATCH // 2) // PATCH) * PATCH for side in image.size))


def _scale(image: Image.Image, width: int, height: int) -> Image.Image:
    grows = width > image.width or height > image.height
    return image.resize((width, height), Image.Resampling.BICUBIC if grows else Image.Resampling.BOX)


def _statistics(like: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(x, device=like.device, dtype=like.dtype)[:, None, None] for x in (MEAN, STD))
    return mean, std


ENTRIES = {
    name: ModelEntry(
        name=name,
        summary=f"Depth Anything 3, {summary}",
        create=functools.partial(_create, name),
        preprocess=preprocess,
        normalize=normalize,
        predict=predict,
        default_weights=f"depth-anything/{name.upper()}",
        library="depth_anything_3",
        install=INSTALL + (" evo" if "giant" in name else ""),  # the Gaussian head of the giant imports it
        rename=_rename,
        mixed_sizes="cropped to their common middle",
    )
    for name, summary in MODELS.items()
}
