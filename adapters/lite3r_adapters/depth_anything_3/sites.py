"""Depth Anything 3: the DINOv2 backbone whose odd blocks, from `alt_start` on, attend across views."""

from __future__ import annotations

from typing import Any

from torch import nn

from lite3r_plugin.adapter import AttentionSite, TokenSource

from .. import _blocks
from .._cameras import camera_sites


def attention_sites(model: nn.Module) -> list[AttentionSite] | None:
    """Sites of every Depth Anything 3 backbone inside `model`, of which the nested model has two, and of the encoders of cameras."""
    sites = []
    for prefix, module in model.named_modules():
        if is_backbone(module):
            sites += _backbone_sites(f"{prefix}." if prefix else "", module)
    return sites + camera_sites(model) if sites else None


def is_backbone(module: Any) -> bool:
    """By structure, so that forks under any module path are known too."""
    return (
        _blocks.has_attention(getattr(module, "blocks", None))
        and isinstance(getattr(module, "patch_embed", None), nn.Module)
        and all(isinstance(getattr(module, name, None), int) for name in ("alt_start", "rope_start", "num_register_tokens"))
    )


def _backbone_sites(prefix: str, backbone: Any) -> list[AttentionSite]:
    tokens = TokenSource(f"{prefix}patch_embed", _blocks.patch_size(backbone), special_tokens=1 + backbone.num_register_tokens)
    sites = []
    for i, block in enumerate(backbone.blocks):
        scope = "global" if backbone.alt_start != -1 and i >= backbone.alt_start and i % 2 == 1 else "frame"
        name, projections = f"{prefix}blocks.{i}", _blocks.projections(block.attn, "pos")
        whole = _blocks.pre_norm_block(name, block, "pos")
        sites.append(AttentionSite(f"{name}.attn", scope, _blocks.head_dim(block.attn), projections, tokens, whole))
    return sites
