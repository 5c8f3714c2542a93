"""The DINOv2 image encoder in front of VGGT's and Pi3's transformers."""

from __future__ import annotations

from typing import Any

from torch import nn

from lite3r_plugin.adapter import AttentionSite, TokenSource

from . import _blocks


def patch_embedding(fqn: str, encoder: Any) -> tuple[str, Any]:
    """Name and module of what is given the images where `encoder` at `fqn` makes tokens of them: inside a DINOv2 its own patch embedding,
    which sees them also where `forward_features` is called and not the encoder."""
    inner = getattr(encoder, "patch_embed", None)
    return (".".join(filter(None, (fqn, "patch_embed"))), inner) if isinstance(inner, nn.Module) else (fqn, encoder)


def encoder_sites(prefix: str, encoder: Any) -> list[AttentionSite]:
    """Encoder sites of the DINOv2 at `prefix`, which ends in a dot; none when the encoder is a plain convolution."""
    registers, patches = getattr(encoder, "num_register_tokens", None), getattr(encoder, "patch_embed", None)
    if not isinstance(registers, int) or not isinstance(patches, nn.Module):
        return []
    tokens = TokenSource(f"{prefix}patch_embed", _blocks.patch_size(encoder), special_tokens=1 + registers)
    sites = []
    for name, attn in encoder.named_modules():
        if _blocks.is_attention(attn):
            block = _blocks.block_around(encoder, name, prefix, "pos")
            sites.append(
                AttentionSite(f"{prefix}{name}", "encoder", _blocks.head_dim(attn), _blocks.projections(attn, "pos"), tokens, block)
            )
    return sites
