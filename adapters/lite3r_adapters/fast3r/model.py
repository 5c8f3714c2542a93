"""Fast3R (arXiv 2501.13928) for the command line. Its library is imported only when the model is built."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from lite3r_plugin.adapter import ModelEntry
from lite3r_plugin.errors import InputError
from lite3r_plugin.scene.geometry import fit_intrinsics
from lite3r_plugin.scene.images import crop_centre, to_tensor
from lite3r_plugin.scene.metrics import fit_similarity
from lite3r_plugin.scene.prediction import Prediction

LONGEST_SIDE = 512
PATCH = 16
MOST_VIEWS = 1000  # for which it has an embedding of their index
MOST_POINTS = 10_000  # of a view, of which its camera is fitted

_ATTENTION = {"attn_implementation": "flash_attention"}
ENCODER: dict[str, Any] = _ATTENTION | {
    "encoder_type": "croco", "img_size": 512, "patch_size": PATCH, "patch_embed_cls": "PatchEmbedDust3R", "embed_dim": 1024,
    "num_heads": 16, "depth": 24, "mlp_ratio": 4, "pos_embed": "RoPE100",
}  # fmt: skip
DECODER: dict[str, Any] = _ATTENTION | {
    "decoder_type": "fast3r", "random_image_idx_embedding": True, "enc_embed_dim": 1024, "embed_dim": 1024, "num_heads": 16, "depth": 24,
    "mlp_ratio": 4.0, "qkv_bias": True, "drop": 0.0, "attn_drop": 0.0, "attn_bias_for_inference_enabled": False,
}  # fmt: skip
HEAD: dict[str, Any] = {
    "head_type": "dpt", "output_mode": "pts3d", "landscape_only": False, "depth_mode": ["exp", -math.inf, math.inf],
    "conf_mode": ["exp", 1, math.inf], "patch_size": PATCH, "with_local_head": True,
}  # fmt: skip


def _create() -> nn.Module:
    """The published ViT-L, by the sizes that its authors' scripts give it."""
    with contextlib.redirect_stdout(sys.stderr):  # it tells what it does not find
        from fast3r.models.fast3r import Fast3R  # pyright: ignore[reportMissingImports]

    model = Fast3R(encoder_args=dict(ENCODER), decoder_args=dict(DECODER), head_args=dict(HEAD))
    put_in_front(model)
    return model


def put_in_front(model: Any) -> None:
    """Let fresh heads see points in front of the cameras, as random ones do or not by chance. Weights that are loaded replace this."""
    with torch.no_grad():
        for head in (model.downstream_head, model.downstream_head_local):
            head.dpt.head[-1].bias[2] = 1


def preprocess(images: Sequence[Image.Image]) -> Tensor:
    """All at one size: the first one's aspect, longest side 512 pixels, then the middle in multiples of 16; squares at 4 to 3."""
    width, height = images[0].size
    scale = LONGEST_SIDE / max(width, height)
    width, height = max(PATCH, round(width * scale)), max(PATCH, round(height * scale))
    columns, rows = width // PATCH * PATCH, height // PATCH * PATCH
    rows = rows * 3 // 4 if columns == rows else rows
    resized = (image.resize((width, height), Image.Resampling.LANCZOS) for image in images)
    return to_tensor([crop_centre(image, columns, rows) for image in resized])


def normalize(pixels: Tensor) -> Tensor:
    """From [0, 1] to [-1, 1]."""
    return pixels * 2 - 1


def arguments(images: Tensor) -> tuple[list[dict[str, Tensor]]]:
    """Views as its forward takes them, of ``[B, S, 3, H, W]``."""
    shape = torch.tensor([images.shape[-2:]] * len(images), device="cpu")
    return ([{"img": view, "true_shape": shape} for view in images.unbind(1)],)


def predict(model: nn.Module, images: Tensor) -> Prediction:
    """Points from the model, and what it does not predict from these: where each view's own points lie in the frame of the first one.

    Embeddings of the order of views, which it draws by chance, are the same in every call.
    """
    if len(images) > MOST_VIEWS:
        raise InputError(f"Fast3R takes at most {MOST_VIEWS:,} images at once, got {len(images):,}: choose fewer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = model(*arguments(images[None]))
    points, own, confidence = (
        torch.cat([view[name] for view in output]).float() for name in ("pts3d_in_other_view", "pts3d_local", "conf")
    )
    scale, world_to_camera = _cameras(own, points, confidence)
    return Prediction(
        depth=own[..., 2] * scale[:, None, None].to(own.device),
        confidence=confidence,
        points=points,
        world_to_camera=world_to_camera,
        intrinsics=fit_intrinsics(own),
        images=(images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1),
    )


def _cameras(own: Tensor, points: Tensor, confidence: Tensor) -> tuple[Tensor, Tensor]:
    """Of each view the unit of its own points ``[S]`` and the camera ``[S, 3, 4]``, of the surer half of its points ``[S, H, W, 3]``."""
    scales, cameras = [], []
    for source, target, sure in zip(own.cpu(), points.cpu(), confidence.cpu(), strict=True):
        chosen = (sure >= sure.median()).flatten().nonzero()[:, 0]
        chosen = chosen[:: max(1, len(chosen) // MOST_POINTS)]
        fit = fit_similarity(source.flatten(0, 1)[chosen], target.flatten(0, 1)[chosen])
        scales.append(fit.scale)
        cameras.append(torch.cat((fit.rotation.mT, -fit.rotation.mT @ fit.translation[:, None]), -1))
    return torch.tensor(scales, dtype=torch.float32, device="cpu"), torch.stack(cameras)


ENTRIES = {
    "fast3r": ModelEntry(
        name="fast3r",
        summary="Fast3R, 0.65 B parameters, cameras are fitted to its points (weights: FAIR Noncommercial Research License)",
        create=_create,
        preprocess=preprocess,
        normalize=normalize,
        predict=predict,
        arguments=arguments,
        default_weights="jedyang97/Fast3R_ViT_Large_512",
        library="fast3r",
        install="git clone https://github.com/facebookresearch/fast3r, pip install -r requirements.txt and -e . in it",
        mixed_sizes="stretched to the first one's shape",
    )
}
