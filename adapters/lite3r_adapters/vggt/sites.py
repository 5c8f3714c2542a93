"""VGGT: frame and global attention of the aggregator, its image encoder, its camera head."""

from __future__ import annotations

from typing import Any

from torch import nn

from lite3r_plugin.adapter import AttentionSite, TokenSource

from .. import _blocks
from .._cameras import camera_sites
from .._dinov2 import encoder_sites, patch_embedding


def attention_sites(model: nn.Module) -> list[AttentionSite] | None:
    """Sites of every VGGT aggregator inside `model`, and of the camera heads beside them. Those that stream have adapters of their own."""
    sites = []
    for prefix, module in model.named_modules():
        if is_aggregator(module) and not streams(module):
            sites += aggregator_sites(f"{prefix}." if prefix else "", module)
    return sites + camera_sites(model) if sites else None


def is_aggregator(module: Any) -> bool:
    """VGGT's aggregator by structure, so that forks under any module path are known too."""
    return (
        _blocks.has_attention(getattr(module, "frame_blocks", None))
        and _blocks.has_attention(getattr(module, "global_blocks", None))
        and isinstance(getattr(module, "patch_embed", None), nn.Module)
        and isinstance(getattr(module, "patch_start_idx", None), int)
        and hasattr(module, "patch_size")
    )


def streams(aggregator: Any) -> bool:
    """Whether its global attention takes a cache of earlier frames, as those of StreamVGGT and STream3R."""
    return _blocks.cache_of(aggregator.global_blocks[0].attn) is not None


def aggregator_sites(prefix: str, aggregator: Any) -> list[AttentionSite]:
    """Sites of an aggregator whose name is `prefix`, which ends in a dot unless it is empty. Blocks that stream are not described whole:
    they return a cache, too."""
    streaming = streams(aggregator)
    images, _ = patch_embedding(f"{prefix}patch_embed", aggregator.patch_embed)
    tokens = TokenSource(images, _blocks.patch_size(aggregator), aggregator.patch_start_idx)
    sites = []
    for scope in ("frame", "global"):
        for i, block in enumerate(getattr(aggregator, f"{scope}_blocks")):
            name, projections = f"{prefix}{scope}_blocks.{i}", _blocks.projections(block.attn, "pos")
            whole = None if streaming else _blocks.pre_norm_block(name, block, "pos")
            keys = tokens if streaming and scope == "global" else None  # of a fork, whose own code keeps the cache
            sites.append(AttentionSite(f"{name}.attn", scope, _blocks.head_dim(block.attn), projections, tokens, whole, keys=keys))
    return sites + encoder_sites(f"{prefix}patch_embed.", aggregator.patch_embed)
