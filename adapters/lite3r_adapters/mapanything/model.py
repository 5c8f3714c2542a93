"""MapAnything (arXiv 2509.13414) for the command line. Its library is imported only when the model is built."""

from __future__ import annotations

import contextlib
import copy
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from lite3r_plugin.adapter import ModelEntry
from lite3r_plugin.errors import InputError, short
from lite3r_plugin.scene.geometry import fit_intrinsics
from lite3r_plugin.scene.images import crop_centre, to_tensor
from lite3r_plugin.scene.prediction import Prediction

from .outputs import to_outputs

LONGEST_SIDE = 518
PATCH = 14
SHORTER = (518, 392, 336, 294, 252, 168)  # sides that it was trained with beside the longest
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
NORM = "dinov2"
AT_ONCE = 16  # views whose dense heads run together, at about 0.7 GB each

_NAME = {"name": "raydirs+depth+pose+confidence+mask+scale"}
_DENSE: dict[str, Any] = _NAME | {
    "ray_directions_mode": "linear", "ray_directions_normalize_to_unit_sphere": True,
    "ray_directions_normalize_to_unit_image_plane": False, "ray_directions_vmin": -math.inf, "ray_directions_vmax": math.inf,
    "ray_directions_clamp_min_of_z_dir": False, "ray_directions_z_dir_min": -math.inf, "depth_mode": "exp", "depth_vmin": 0,
    "depth_vmax": math.inf, "confidence_type": "exp", "confidence_vmin": 1, "confidence_vmax": math.inf,
}  # fmt: skip
_POSE: dict[str, Any] = _NAME | {
    "cam_trans_mode": "linear", "cam_trans_vmin": -math.inf, "cam_trans_vmax": math.inf, "quaternions_mode": "linear",
    "quaternions_normalize": True, "quaternions_vmin": -math.inf, "quaternions_vmax": math.inf,
}  # fmt: skip
CONFIGURATION: dict[str, Any] = {
    "name": "mapanything",
    "encoder_config": {
        "encoder_str": "dinov2", "name": "dinov2_giant_24_layers", "data_norm_type": NORM, "size": "giant", "with_registers": False,
        "uses_torch_hub": True, "torch_hub_pretrained": False, "gradient_checkpointing": False, "norm_returned_features": False,
        "keep_first_n_layers": 24,
    },
    "info_sharing_config": {
        "model_type": "alternating_attention", "model_return_type": "intermediate_features", "custom_positional_encoding": None,
        "module_args": {
            "name": "aat_16_layers_vitg_dim_ifr", "indices": [7, 11], "norm_intermediate": True, "size": "16_layers", "depth": 16,
            "distinguish_ref_and_non_ref_views": True, "gradient_checkpointing": False, "dim": 1536, "num_heads": 24, "mlp_ratio": 4,
            "qkv_bias": True, "qk_norm": False, "init_values": 1e-5,
        },
    },
    "pred_head_config": {
        "type": "dpt+pose", "gradient_checkpointing": False,
        "feature_head": {"feature_dim": 256, "hooks": [0, 1, 2, 3], "checkpoint_gradient": False},
        "regressor_head": {"output_dim": 6, "checkpoint_gradient": False},
        "pose_head": {"num_resconv_block": 2, "rot_representation_dim": 4},
        "scale_head": {"output_dim": 1},
        "adaptor_type": "raydirs+depth+pose+confidence+mask",
        "dpt_adaptor": _DENSE, "pose_adaptor": _POSE, "scale_adaptor": _NAME | {"mode": "exp", "vmin": 1e-8, "vmax": math.inf},
    },
    "geometric_input_config": {
        "overall_prob": 0, "dropout_prob": 1, "ray_dirs_prob": 0, "depth_prob": 0, "cam_prob": 0, "sparse_depth_prob": 0,
        "sparsification_removal_percent": 0, "depth_scale_norm_all_prob": 0, "pose_scale_norm_all_prob": 0,
        "ray_dirs_encoder_config": {
            "name": "ray_dirs_encoder", "in_chans": 3, "encoder_str": "dense_rep_encoder", "apply_pe": False
        },
        "depth_encoder_config": {"name": "depth_encoder", "in_chans": 1, "encoder_str": "dense_rep_encoder", "apply_pe": False},
        "cam_rot_encoder_config": {"name": "cam_rot_quats_encoder", "in_chans": 4, "encoder_str": "global_rep_encoder"},
        "cam_trans_encoder_config": {"name": "cam_trans_encoder", "in_chans": 3, "encoder_str": "global_rep_encoder"},
        "scale_encoder_config": {"name": "scale_encoder", "in_chans": 1, "encoder_str": "global_rep_encoder"},
    },
    "use_register_tokens_from_encoder": True,
    "info_sharing_mlp_layer_str": "swiglufused",
}  # fmt: skip


def _create() -> nn.Module:
    """MapAnything 1.1 for images alone, by the sizes of its configuration. The code of its encoder comes from torch.hub.

    Raises:
        InputError: it cannot be had there.
    """
    with contextlib.redirect_stdout(sys.stderr):  # it tells what it loads
        from mapanything.models.mapanything.model import MapAnything  # pyright: ignore[reportMissingImports]

        try:
            return MapAnything(**copy.deepcopy(CONFIGURATION))  # which writes into it
        except (OSError, RuntimeError) as error:
            if not (isinstance(error, OSError) or isinstance(error.__cause__, OSError)):  # torch.hub's own has the network's as its cause
                raise
            raise InputError(
                f"MapAnything takes the code of its image encoder from torch.hub, which does not give it ({short(error)}): run "
                "torch.hub.load('facebookresearch/dinov2', 'dinov2_vitg14', pretrained=False) once where there is a network"
            ) from error


def _size(aspect: float) -> tuple[int, int]:
    """Width and height in pixels of the shape that it was trained with and that is nearest to `aspect`, width by height."""
    wide = [(LONGEST_SIDE, side) for side in SHORTER]
    tall = [(height, width) for width, height in wide if width / height <= LONGEST_SIDE / 252]
    return min((*wide, *tall), key=lambda size: abs(size[0] / size[1] - aspect))


def preprocess(images: Sequence[Image.Image]) -> Tensor:
    """All at one size: the shape nearest to their mean aspect, the longest side 518 pixels, and the middle of what is longer."""
    width, height = _size(sum(image.width / image.height for image in images) / len(images))
    return to_tensor([_covering(image, width, height) for image in images])


def _covering(image: Image.Image, width: int, height: int) -> Image.Image:
    scale = max(width / image.width, height / image.height)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    shrinks = size[0] < image.width
    return crop_centre(image.resize(size, Image.Resampling.LANCZOS if shrinks else Image.Resampling.BICUBIC), width, height)


def normalize(pixels: Tensor) -> Tensor:
    """ImageNet statistics."""
    mean, std = _statistics(pixels)
    return (pixels - mean) / std


def arguments(images: Tensor) -> tuple[list[dict[str, Any]]]:
    """Views as its forward takes them, of ``[B, S, 3, H, W]``."""
    return ([{"img": view, "data_norm_type": [NORM]} for view in images.unbind(1)],)


def predict(model: nn.Module, images: Tensor) -> Prediction:
    """Points and cameras from the model, in metres; the focal length is fitted to its rays. `images` as `normalize` makes them."""
    (views,) = arguments(images[None])
    output = model(views, memory_efficient_inference=len(views) > AT_ONCE, minibatch_size=AT_ONCE)
    found = to_outputs(output)
    assert found.depth is not None
    assert found.points is not None
    assert found.world_to_camera is not None
    mean, std = _statistics(images)
    return Prediction(
        depth=found.depth[0],
        confidence=torch.cat([view["conf"] for view in output]),
        points=found.points[0],
        world_to_camera=found.world_to_camera[0],
        intrinsics=fit_intrinsics(torch.cat([view["ray_directions"] for view in output])),
        images=(images * std + mean).clamp(0, 1).permute(0, 2, 3, 1),
    )


def _statistics(like: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(x, device=like.device, dtype=like.dtype)[:, None, None] for x in (MEAN, STD))
    return mean, std


ENTRIES = {
    "mapanything": ModelEntry(
        name="mapanything",
        summary="MapAnything 1.1, 1.2 B parameters, images alone, depth in metres (weights: CC BY-NC 4.0)",
        create=_create,
        preprocess=preprocess,
        normalize=normalize,
        predict=predict,
        arguments=arguments,
        default_weights="facebook/map-anything",
        library="mapanything",
        install="git clone https://github.com/facebookresearch/map-anything and pip install -e . in it",
        mixed_sizes="scaled and cropped to one shape",
    )
}
