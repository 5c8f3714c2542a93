"""Pi3 and Pi3X: the decoder, whose odd blocks attend across views, the per-view heads and the image encoder."""

from __future__ import annotations

from typing import Any

from torch import nn

from lite3r_plugin.adapter import AttentionSite, TokenSource, forward_parameters

from .. import _blocks
from .._dinov2 import encoder_sites


def attention_sites(model: nn.Module) -> list[AttentionSite] | None:
    """Sites of every Pi3 inside `model`."""
    sites = []
    for prefix, module in model.named_modules():
        if is_pi3(module):
            sites += _pi3_sites(f"{prefix}." if prefix else "", module)
    return sites or None


def is_pi3(module: Any) -> bool:
    """By structure, so that forks under any module path are known too."""
    return (
        _blocks.has_attention(getattr(module, "decoder", None))
        and isinstance(getattr(module, "encoder", None), nn.Module)
        and isinstance(getattr(module, "register_token", None), nn.Parameter)
        and isinstance(getattr(module, "patch_start_idx", None), int)
        and hasattr(module, "patch_size")
    )


def _pi3_sites(prefix: str, model: Any) -> list[AttentionSite]:
    tokens = TokenSource(f"{prefix}encoder", _blocks.patch_size(model), model.patch_start_idx, reference=None)
    global_sites = {f"decoder.{i}.attn" for i in range(1, len(model.decoder), 2)}
    sites = []
    for name, attn in model.named_modules():
        # Self-attention with token coordinates: the decoder and the point, confidence and camera heads. A global site whose arguments
        # cannot be read is named, too, so that it is refused and not left out.
        arguments = forward_parameters(attn)
        if _blocks.is_attention(attn) and (name in global_sites if arguments is None else "xpos" in arguments):
            scope = "global" if name in global_sites else "frame"
            whole = _blocks.block_around(model, name, prefix, "xpos")
            sites.append(AttentionSite(f"{prefix}{name}", scope, _blocks.head_dim(attn), _blocks.projections(attn, "xpos"), tokens, whole))
    return sites + encoder_sites(f"{prefix}encoder.", model.encoder)
