"""VGGT-Omega: the aggregator's frame and inter-frame attention, of which some layers see camera and register tokens alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lite3r_plugin.adapter import AttentionSite, LayoutFunction, Routed, TokenLayout, TokenSource, hookimpl

from . import _blocks


@hookimpl
def lite3r_attention_sites(model: nn.Module) -> list[AttentionSite] | None:
    """Sites of every VGGT-Omega aggregator inside `model`."""
    sites: list[AttentionSite] = []
    for prefix, module in model.named_modules():
        if _is_aggregator(module):
            sites += _aggregator_sites(f"{prefix}." if prefix else "", module)
    return sites or None


def _is_aggregator(module: Any) -> bool:
    """By structure, so that forks under any module path are known too."""
    return (
        _blocks.has_attention(getattr(module, "frame_blocks", None))
        and _blocks.has_attention(getattr(module, "inter_frame_blocks", None))
        and isinstance(getattr(module, "patch_embed", None), nn.Module)
        and isinstance(getattr(module, "inter_frame_attention_types", None), list)
        and isinstance(getattr(module, "patch_token_start", None), int)
        and hasattr(module, "patch_size")
    )


def _aggregator_sites(prefix: str, aggregator: Any) -> list[AttentionSite]:
    tokens = TokenSource(f"{prefix}patch_embed", _blocks.patch_size(aggregator), aggregator.patch_token_start)
    sites = []
    for i, block in enumerate(aggregator.frame_blocks):
        sites.append(_site(f"{prefix}frame_blocks.{i}.attn", "frame", block.attn, tokens))
    kinds = aggregator.inter_frame_attention_types
    for i, (block, kind) in enumerate(zip(aggregator.inter_frame_blocks, kinds, strict=True)):
        alone = kind == "register"
        sites.append(
            _site(f"{prefix}inter_frame_blocks.{i}.attn", "global", block.attn, LayoutFunction(special_alone) if alone else tokens)
        )
    return sites


def _site(fqn: str, scope: Any, attn: Any, tokens: TokenSource | LayoutFunction) -> AttentionSite:
    return AttentionSite(fqn, scope, _blocks.head_dim(attn), Routed(attn.num_heads), tokens)  # the rotary embedding is its own


def special_alone(x: Tensor, *_: Any, **__: Any) -> TokenLayout:
    """A sequence ``[B, N, C]`` of camera and register tokens."""
    return TokenLayout((x.shape[1],))
