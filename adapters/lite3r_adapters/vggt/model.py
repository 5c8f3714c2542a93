"""VGGT (arXiv 2503.11651) for the command line. Its library is imported only when the model is built."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor, nn

from lite3r_plugin.adapter import ModelEntry
from lite3r_plugin.scene.geometry import unproject
from lite3r_plugin.scene.images import crop_centre, pad_centre, to_tensor
from lite3r_plugin.scene.prediction import Prediction

from .._cameras import set_field_of_view

WIDTH = 518
PATCH = 14


def _create() -> nn.Module:
    """VGGT without the point and track heads: points come from depth and cameras, as its authors recommend."""
    from vggt.models.vggt import VGGT  # pyright: ignore[reportMissingImports]

    model = VGGT(enable_point=False, enable_track=False)
    set_field_of_view(model.camera_head.pose_branch.fc2, 0.25)  # added up in four iterations
    return model


def _rename(name: str) -> str | None:
    return None if name.startswith(("point_head.", "track_head.")) else name


def preprocess(images: Sequence[Image.Image]) -> Tensor:
    """518 pixels wide, at most 518 high (the middle of taller ones), multiples of 14; white around smaller ones."""
    resized = []
    for image in images:
        height = max(1, round(image.height * WIDTH / image.width / PATCH)) * PATCH
        image = image.resize((WIDTH, height), Image.Resampling.BICUBIC)
        resized.append(crop_centre(image, WIDTH, min(height, WIDTH)))
    height = max(image.height for image in resized)
    return to_tensor([pad_centre(image, WIDTH, height) for image in resized])


def predict(model: nn.Module, images: Tensor) -> Prediction:
    """Depth and cameras from the model, points by unprojection. `images` ``[S, 3, H, W]`` in [0, 1]."""
    from vggt.utils.pose_enc import pose_encoding_to_extri_intri  # pyright: ignore[reportMissingImports]

    output = model(images[None])
    world_to_camera, intrinsics = pose_encoding_to_extri_intri(output["pose_enc"].float(), images.shape[-2:])
    depth = output["depth"][0, ..., 0].float()
    return Prediction(
        depth=depth,
        confidence=output["depth_conf"][0],
        points=unproject(depth, world_to_camera[0], intrinsics[0]),
        world_to_camera=world_to_camera[0],
        intrinsics=intrinsics[0],
        images=images.permute(0, 2, 3, 1),
    )


ENTRIES = {
    "vggt": ModelEntry(
        name="vggt",
        summary="VGGT, 1.2 B parameters (weights: CC BY-NC 4.0)",
        create=_create,
        preprocess=preprocess,
        predict=predict,
        default_weights="facebook/VGGT-1B",
        library="vggt",
        install="pip install git+https://github.com/facebookresearch/vggt, or put a clone of it on PYTHONPATH and pip install einops",
        rename=_rename,
        mixed_sizes="padded with white to the tallest",
    )
}
