"""Exact rewrites of VGGT: the same numbers up to rounding, fewer launches, no waits for the GPU, less memory."""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lite3r_plugin.errors import AdapterError
from lite3r_plugin.runtime.exact import cache_position_embedding, finish_in_fp32, token_positions, use_table_rope


def rewrite(model: nn.Module) -> list[str] | None:
    """Rewrite a VGGT in place; None when `model` is something else.

    Afterwards it runs in FP32 as before and, unlike the host itself, with BF16 weights without autocast.

    Raises:
        AdapterError: its aggregator alternates its blocks in another way or has no rotary embedding.
    """
    aggregator: Any = getattr(model, "aggregator", None)
    if not all(hasattr(aggregator, name) for name in ("frame_blocks", "global_blocks", "aa_order")):
        return None
    if list(aggregator.aa_order) != ["frame", "global"] or aggregator.aa_block_size != 1 or aggregator.rope is None:
        raise AdapterError("the exact rewrites know VGGT's aggregator with alternating frame and global blocks and a rotary embedding only")
    use_table_rope(aggregator)
    layers = {len(aggregator.frame_blocks) - 1}
    for name in ("depth_head", "point_head"):
        head: Any = getattr(model, name, None)
        if head is not None:
            layers.update(head.intermediate_layer_idx)
            cache_position_embedding(head, "_apply_pos_embed")
            finish_in_fp32(head.scratch.output_conv2)
    track_head: Any = getattr(model, "track_head", None)
    if track_head is not None:
        layers.update(track_head.feature_extractor.intermediate_layer_idx)
    camera_head: Any = getattr(model, "camera_head", None)
    if camera_head is not None:
        camera_head.register_forward_hook(_poses_in_fp32)
    aggregator.forward = MethodType(functools.partial(_forward, layers=frozenset(layers)), aggregator)
    return [
        "rotary embedding from tables, no wait for the GPU",
        f"only the layers {sorted(layers)} of {len(aggregator.frame_blocks)} are kept for the heads",
        "token positions and the heads' position embeddings cached",
        "heads run in the dtype of the weights, their last activation in FP32",
    ]


def _forward(aggregator: Any, images: Tensor, *, layers: frozenset[int]) -> tuple[list[Tensor | None], int]:
    """As the host's aggregator: images ``[B, S, 3, H, W]`` to one ``[B, S, P, 2C]`` per layer, None where no head reads it."""
    batch, views = images.shape[:2]
    rows, columns = (size // aggregator.patch_size for size in images.shape[-2:])
    patches = aggregator.patch_embed(((images - aggregator._resnet_mean) / aggregator._resnet_std).flatten(0, 1))
    if isinstance(patches, dict):
        patches = patches["x_norm_patchtokens"]
    # Row 0 of the special tokens belongs to the reference view, row 1 to all others.
    special = torch.cat((aggregator.camera_token, aggregator.register_token), 2)
    special = torch.cat((special[:, :1], special[:, 1:].expand(-1, views - 1, -1, -1)), 1).expand(batch, -1, -1, -1)
    tokens = torch.cat((special.flatten(0, 1).to(patches.dtype), patches), 1)
    per_view, width = tokens.shape[1:]
    frame_shape, global_shape = (batch * views, per_view), (batch, views * per_view)
    positions = token_positions(batch * views, rows, columns, aggregator.patch_start_idx, images.device)
    kept: list[Tensor | None] = []
    for i, (frame_block, global_block) in enumerate(zip(aggregator.frame_blocks, aggregator.global_blocks, strict=True)):
        in_frame = tokens = frame_block(tokens.view(*frame_shape, width), pos=positions)
        tokens = global_block(tokens.view(*global_shape, width), pos=positions.view(*global_shape, 2))
        pair = (x.view(batch, views, per_view, width) for x in (in_frame, tokens)) if i in layers else None
        kept.append(None if pair is None else torch.cat(tuple(pair), -1))
    return kept, aggregator.patch_start_idx


def _poses_in_fp32(module: nn.Module, args: tuple[object, ...], output: list[Tensor]) -> list[Tensor]:
    return [pose.float() for pose in output]
