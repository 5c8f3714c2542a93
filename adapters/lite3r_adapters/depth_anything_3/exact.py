"""Exact rewrites of Depth Anything 3: the same numbers up to rounding, fewer launches, no waits for the GPU."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lite3r_plugin.runtime.exact import cache_position_embedding, finish_in_fp32, token_positions, use_table_rope


def rewrite(model: nn.Module) -> list[str] | None:
    """Rewrite a `DepthAnything3Net` in place; None when `model` is something else.

    Afterwards it runs in FP32 as before and, unlike the host itself, with BF16 weights without autocast.
    """
    host: Any = model
    encoder: Any = getattr(getattr(model, "backbone", None), "pretrained", None)
    if not hasattr(encoder, "_prepare_rope") or not hasattr(encoder, "alt_start"):
        return None
    rewritten = []
    if encoder.rope is not None:
        use_table_rope(encoder)
        encoder._prepare_rope = MethodType(_prepare_rope, encoder)
        rewritten.append("rotary embedding from tables and cached token positions, no wait for the GPU")
    if hasattr(host.head, "_add_pos_embed"):
        cache_position_embedding(host.head, "_add_pos_embed")
        finish_in_fp32(host.head.scratch.output_conv2)
        if hasattr(host.head.scratch, "output_conv2_aux"):
            finish_in_fp32(host.head.scratch.output_conv2_aux[-1])
        rewritten.append("position embeddings of the depth head cached; it runs in the dtype of the weights, its last activation in FP32")
    if host.cam_dec is not None:
        # Its last Linears are given FP32 by the host whatever the weights are.
        host.cam_dec.float().register_forward_pre_hook(_input_in_fp32)
        rewritten.append("camera decoder in FP32")
    return rewritten or None


def _prepare_rope(encoder: Any, B: int, S: int, H: int, W: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Coordinates ``[B, S, P, 2]`` of the tokens for local blocks, and for global ones, where all patches share one."""
    local = token_positions(B * S, H // encoder.patch_size, W // encoder.patch_size, encoder.patch_start_idx, device)
    return local.unflatten(0, (B, S)), local.clamp(max=1).unflatten(0, (B, S))


def _input_in_fp32(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.float() for x in args)
