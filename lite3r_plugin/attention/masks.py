"""Masks of hosts that have a sparse form: frame-causal ones, recognised by their values."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapter.layouts import TokenLayout, Views
from ..ops.sla import SegmentMask

HIDDEN = -1e4  # what is added to scores from here on down leaves nothing of them


def frame_causal(mask: Tensor, layout: TokenLayout | None) -> SegmentMask | None:
    """`mask` as a mask over views, where that is what it is: each token sees all tokens of its view and of those before it.

    Those before it may be the last few alone (a window). It looks at all values, for which a GPU waits.

    Args:
        mask: What `scaled_dot_product_attention` takes: bool, True where a query sees a key, or numbers that are added to scores;
            ``[..., N, N]``.
        layout: Of the N tokens.

    Returns:
        None where it is anything else, or the tokens of views are not known.
    """
    if layout is None or any(not isinstance(part, Views) for part in layout.parts) or layout.views < 2:
        return None
    tokens = layout.num_tokens
    if mask.shape[-2:] != (tokens, tokens) or mask.numel() != tokens * tokens:
        return None
    mask = mask.reshape(tokens, tokens)
    sizes = [part.tokens_per_view for part in layout.parts if isinstance(part, Views) for _ in range(part.count)]
    views = torch.arange(len(sizes), device=mask.device).repeat_interleave(torch.tensor(sizes, device=mask.device))
    sees = mask if mask.dtype == torch.bool else mask == 0
    hides = ~mask if mask.dtype == torch.bool else mask <= HIDDEN
    apart = views[:, None] - views[None, :]  # by how many views a key comes before
    before = torch.where(sees, apart, -1).amax()
    expected = (apart >= 0) & (apart <= before)
    right, window = torch.stack((((sees == expected) & (hides == ~expected)).all().long(), before)).tolist()
    if not right:
        return None
    return SegmentMask(views.int(), views.int(), None if window >= layout.views - 1 else window)
