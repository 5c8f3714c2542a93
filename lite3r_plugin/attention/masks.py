"""Masks of hosts that have a sparse form: those over frames, recognised by their values."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapter.layouts import TokenLayout, Views
from ..ops.sla import SegmentMask

HIDDEN = -1e4  # what is added to scores from here on down leaves nothing of them
SLAB_BYTES = 64 << 20  # of a mask that is looked at at once: one of 43,000 tokens takes gigabytes


def frame_causal(mask: Tensor, layout: TokenLayout | None) -> SegmentMask | None:
    """`mask` as a mask over views, where that is what it is: each token sees all tokens of its view and of those before it.

    Those before it may be the last few alone (a window), and the first view besides. It looks at all values, for which a GPU waits,
    and takes no memory of the mask's size.

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
    sizes = torch.tensor([part.tokens_per_view for part in layout.parts if isinstance(part, Views) for _ in range(part.count)])
    starts = (sizes.cumsum(0) - sizes).to(mask.device)
    found = _over_views(_sees(mask[starts][:, starts]).cpu())
    if found is None:
        return None
    seen, before, sink = found
    views = torch.arange(len(sizes)).repeat_interleave(sizes).to(mask.device)
    seen = seen.to(mask.device)[:, views]
    right = torch.ones((), dtype=torch.bool, device=mask.device)
    slab = max(1, SLAB_BYTES // (tokens * mask.element_size()))
    for part, rows in zip(mask.split(slab), views.split(slab), strict=True):
        expected = seen[rows]
        right &= (_sees(part) == expected).all()
        if mask.dtype != torch.bool:
            right &= ((part <= HIDDEN) != expected).all()
    return SegmentMask(views.int(), views.int(), before, 0, sink) if right else None


def _sees(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask == 0


def _over_views(sees: Tensor) -> tuple[Tensor, int | None, int | None] | None:
    """Which views ``[S, S]`` bool see which, if that is all before them, a window or a window and the first; and the `SegmentMask` of that,
    its `before` and its `sink`."""
    view = torch.arange(len(sees))
    apart = view[:, None] - view  # by how many views a key comes before
    causal = apart >= 0
    furthest = [int(torch.where(some, apart, 0).amax()) for some in (sees, sees & (view > 0))]
    for seen, before, sink in (
        (causal, None, None),
        (causal & (apart <= furthest[0]), furthest[0], None),
        (causal & ((apart <= furthest[1]) | (view == 0)), furthest[1], 0),
    ):
        if torch.equal(sees, seen):
            return seen, before, sink
    return None
