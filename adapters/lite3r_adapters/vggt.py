"""VGGT: frame and global attention of the aggregator, and its image encoder."""

from __future__ import annotations

from torch import nn

from lite3r_plugin import AttentionSite, FusedQKV, Rope2D, TokenSource, hookimpl


def _is_aggregator(module: nn.Module) -> bool:
    """VGGT's aggregator by structure, so that forks under any module path are known too."""
    return (
        isinstance(getattr(module, "frame_blocks", None), nn.ModuleList)
        and isinstance(getattr(module, "global_blocks", None), nn.ModuleList)
        and isinstance(getattr(module, "patch_embed", None), nn.Module)
        and isinstance(getattr(module, "patch_start_idx", None), int)
    )


@hookimpl
def lite3r_attention_sites(model: nn.Module) -> list[AttentionSite] | None:
    """Sites of every VGGT aggregator inside `model`."""
    sites = []
    for prefix, module in model.named_modules():
        if _is_aggregator(module):
            sites += _aggregator_sites(prefix + "." if prefix else "", module)
    return sites or None


def _aggregator_sites(prefix: str, aggregator: nn.Module) -> list[AttentionSite]:
    tokens = TokenSource(f"{prefix}patch_embed", (aggregator.patch_size,) * 2, aggregator.patch_start_idx)
    sites = []
    for scope in ("frame", "global"):
        for i, block in enumerate(getattr(aggregator, f"{scope}_blocks")):
            attn = block.attn
            rope = Rope2D(attn.rope.base_frequency) if attn.rope is not None else None
            projections = FusedQKV(
                attn.num_heads, q_norm="q_norm", k_norm="k_norm", attn_drop="attn_drop", out_drop="proj_drop", rope=rope, positions="pos"
            )
            sites.append(AttentionSite(f"{prefix}{scope}_blocks.{i}.attn", scope, attn.head_dim, projections, tokens))
    return sites
