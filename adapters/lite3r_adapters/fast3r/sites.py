"""Fast3R (arXiv 2501.13928): the decoder over the patches of all views, and the encoder of CroCo in front of it.

Views may be of different sizes, so layouts are read from the coordinates that come with the patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lite3r_plugin.adapter import AttentionSite, FusedQKV, LayoutFunction, Routed, TokenLayout, Views, forward_parameters

from .. import _blocks
from .._coordinates import can_be_read, layout_of, view_of

_DECODER = ["encoded_feats", "positions", "image_ids"]


def attention_sites(model: nn.Module) -> list[AttentionSite] | None:
    """Sites of every Fast3R inside `model`."""
    sites = []
    modules: dict[str, Any] = dict(model.named_modules())
    for name, module in modules.items():
        if is_decoder(module):
            sites += _decoder_sites(name, module)
            encoder = f"{name.rpartition('.')[0]}.encoder".lstrip(".")
            sites += _encoder_sites(encoder, modules.get(encoder))
    return sites or None


def is_decoder(module: Any) -> bool:
    """Whether it is such a decoder, by structure, so that forks under any module path are known too. It has no cross-attention."""
    if not isinstance(getattr(module, "decoder_embed", None), nn.Module) or list(forward_parameters(module) or ())[:3] != _DECODER:
        return False
    blocks: Any = getattr(module, "dec_blocks", None)
    if _blocks.has_attention(blocks):
        return all(_attends_to_itself(block.attn) and not hasattr(block, "cross_attn") for block in blocks)
    return _is_llama(getattr(module, "layers", None))


def _attends_to_itself(attn: Any) -> bool:
    return list(forward_parameters(attn) or ()) == ["x", "xpos"]


def _is_llama(layers: Any) -> bool:
    """The other decoder that Fast3R has, whose rotary embedding is by the index of a view."""
    parts = ("wq", "wk", "wv", "wo")
    found = [getattr(layer, "attention", None) for layer in layers] if isinstance(layers, nn.ModuleList) else []
    return len(found) > 0 and all(isinstance(getattr(attn, part, None), nn.Module) for attn in found for part in parts)


def _decoder_sites(name: str, decoder: Any) -> list[AttentionSite]:
    tokens = LayoutFunction(of_views, module=name)
    if not hasattr(decoder, "dec_blocks"):
        return [
            AttentionSite(f"{name}.layers.{i}.attention".lstrip("."), "global", a.head_dim, Routed(a.n_heads), tokens)
            for i, a in enumerate(layer.attention for layer in decoder.layers)
        ]
    return [_site(f"{name}.dec_blocks.{i}".lstrip("."), "global", block, tokens) for i, block in enumerate(decoder.dec_blocks)]


def _encoder_sites(name: str, encoder: Any) -> list[AttentionSite]:
    """Those of CroCo's; that of DINOv2, which is an option, runs as it is."""
    blocks: Any = getattr(encoder, "enc_blocks", None)
    if not _blocks.has_attention(blocks) or not all(_attends_to_itself(block.attn) for block in blocks):
        return []
    return [_site(f"{name}.enc_blocks.{i}", "encoder", block, LayoutFunction(of_tokens)) for i, block in enumerate(blocks)]


def _site(name: str, scope: Any, block: Any, tokens: LayoutFunction) -> AttentionSite:
    whole = _blocks.pre_norm_block(name, block, "xpos")
    return AttentionSite(f"{name}.attn", scope, _blocks.head_dim(block.attn), _projections(block.attn), tokens, whole)


def _projections(attn: Any) -> FusedQKV | Routed:
    """How `attn` makes q, k and v.

    In evaluation its scores may be larger, for sequences that are longer than in training, where a trial in training would not show it.
    Without a rotary embedding there is nothing to fuse, and by its own forward it attends in BF16 whatever comes in; but it must call
    `scaled_dot_product_attention`, as it does unless that is spelled out.
    """
    spelled_out = getattr(attn, "attn_implementation", "pytorch_naive") == "pytorch_naive"
    other = getattr(attn, "attn_bias_for_inference_enabled", False) or getattr(attn, "is_causal", False)
    if other or getattr(attn, "attn_mask", None) is not None or not (spelled_out or attn.rope is not None):
        return Routed(attn.num_heads)
    return _blocks.projections(attn, "xpos")


def of_tokens(x: Tensor, xpos: Tensor | None = None) -> TokenLayout | None:
    """The layout of one view in the encoder."""
    return layout_of(xpos)


def of_views(encoded_feats: Sequence[Tensor], positions: Sequence[Tensor], *_: Any, **__: Any) -> TokenLayout:
    """The layout of the decoder's sequence: each view with its own grid; the first one is the reference, in whose frame points are.

    Where coordinates cannot be read, or are no grid, a view is one long row. A GPU waits for them once, as it does for the decoder's
    own look at `image_ids`.

    Args:
        encoded_feats: ``[B, n, C]`` of each view.
        positions: Their coordinates ``[B, n, 2]`` (row, column).
    """
    lengths = [view.shape[1] for view in encoded_feats]
    read = torch.cat(tuple(positions), 1).cpu().split(lengths, 1) if can_be_read(positions[0]) else None
    parts: list[Views] = []
    before: Tensor | None = None
    for i, length in enumerate(lengths):
        here = None if read is None else read[i]
        if here is not None and before is not None and torch.equal(here, before):
            parts.append(parts[-1])
        else:
            parts.append((None if here is None else _grid(here)) or Views((1, length)))
        before = here
    return TokenLayout(_together(parts))


def _grid(positions: Tensor) -> Views | None:
    """Row by row, or column by column, as DINOv2's portrait images are."""
    return view_of(positions) or view_of(positions.flip(-1))


def _together(parts: list[Views]) -> tuple[Views, ...]:
    """Views that are alike and follow each other, as one part."""
    joined: list[Views] = []
    for part in parts:
        if joined and joined[-1].grid == part.grid:
            joined[-1] = Views(part.grid, joined[-1].count + 1)
        else:
            joined.append(part)
    return tuple(joined)
