"""Cameras: the transformer over one token a view that VGGT's head and the encoder of Depth Anything 3 share, and fresh heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lite3r_plugin.adapter import AttentionSite

from . import _blocks

_PARTS = ("token_norm", "trunk_norm", "pose_branch")


def camera_sites(model: nn.Module) -> list[AttentionSite]:
    """Sites of every camera head and encoder inside `model`, found by structure."""
    sites = []
    for prefix, module in model.named_modules():
        trunk: Any = getattr(module, "trunk", None)
        if not _blocks.has_attention(trunk) or not all(isinstance(getattr(module, part, None), nn.Module) for part in _PARTS):
            continue
        for i, block in enumerate(trunk):
            name = f"{prefix}.trunk.{i}".lstrip(".")
            projections, whole = _blocks.projections(block.attn, "pos"), _blocks.pre_norm_block(name, block, "pos")
            sites.append(AttentionSite(f"{name}.attn", "camera", _blocks.head_dim(block.attn), projections, block=whole))
    return sites


def set_field_of_view(linear: nn.Linear, radians: float) -> None:
    """Let a fresh head, whose last two outputs are the angles of view, see as a camera does.

    Random ones are cut off at zero, and what has no focal length can be written into no file. Weights that are loaded replace this.
    """
    with torch.no_grad():
        linear.weight[-2:] = 0
        linear.bias[-2:] = radians
