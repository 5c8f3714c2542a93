"""What every projection style hands to attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..adapter.layouts import TokenLayout
from ..ops.qk_norm_rope import HeadNorm
from ..tokens.layout import Pinned


@dataclass(frozen=True)
class AttentionInputs:
    """Queries, keys and values, with what is still to be done to queries and keys before attention.

    Attributes:
        q: ``[B, H, N, D]``, floating point; q and k may be of another dtype than v, in whose dtype attention is computed.
        k, v: ``[B, H, N, D]``; ``[B, H, M, D]`` where they are of other tokens.
        q_norm, k_norm: Norms over the head dimension that are still to be applied, or None.
        positions: Token coordinates ``[B, N, 2]``, or None where there is no rotary embedding.
        rope_base: Base of the axial rotary embedding that is still to be applied (`lite3r_plugin.adapter.sites.Rope2D`), or None.
        scale: What scores are multiplied by; None: ``D ** -0.5``.
        layout: How the sequence is laid out, which the site adds; None where that is not known.
        crossed: Whether keys and values are of other tokens than queries. Else positions and layout are those of keys, too.
        key_positions, key_layout: Those of keys, where they are of other tokens.
        pinned: The queries and the keys that are always kept, where the layouts alone do not say, as of the calls of a stream; or None.
        mask: What `scaled_dot_product_attention` takes as ``attn_mask``, ``[..., N, M]``, or None.
        num_heads: How many heads the site has, where these are only some of them; None where they are all.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_norm: HeadNorm | None = None
    k_norm: HeadNorm | None = None
    positions: Tensor | None = None
    rope_base: float | None = None
    scale: float | None = None
    layout: TokenLayout | None = None
    crossed: bool = False
    key_positions: Tensor | None = None
    key_layout: TokenLayout | None = None
    pinned: Pinned | None = None
    mask: Tensor | None = None
    num_heads: int | None = None
