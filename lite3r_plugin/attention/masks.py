"""Masks of hosts that have a sparse form: those over frames, recognised by their values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..adapter.layouts import TokenLayout, Views
from ..ops.sla import SegmentMask

HIDDEN = -1e4  # what is added to scores from here on down leaves nothing of them


def frame_causal(mask: Tensor, layout: TokenLayout | None) -> SegmentMask | None:
    """`mask` as a mask over views, where that is what it is: each token sees all tokens of its view and of those before it.

    Those before it may be the last few alone (a window), and the first view besides. It looks at all values, for which is waited on a GPU,
    and takes no memory of the mask's size: one of 43,000 tokens takes gigabytes.

    Args:
        mask: What `scaled_dot_product_attention` takes: bool, True where a query sees a key, or numbers that are added to scores;
            ``[..., N, N]``.
        layout: Of the N tokens.

    Returns:
        None where it is anything else, the tokens of views are not known, or the mask learns: what is recognised gives it no gradient.
    """
    if layout is None or any(not isinstance(part, Views) for part in layout.parts) or layout.views < 2:
        return None
    if mask.requires_grad and torch.is_grad_enabled():
        return None
    while mask.dim() > 2 and (mask.shape[0] == 1 or mask.stride(0) == 0):
        mask = mask[0]  # expanded: the same for all
    tokens = layout.num_tokens
    if mask.shape[-2:] != (tokens, tokens) or mask.numel() != tokens * tokens:
        return None
    mask = mask.reshape(tokens, tokens)
    sizes = [part.tokens_per_view for part in layout.parts if isinstance(part, Views) for _ in range(part.count)]
    low, high = torch.stack((_by_views(mask, sizes, torch.amin), _by_views(mask, sizes, torch.amax))).cpu()
    boolean = mask.dtype == torch.bool
    sees, hides = (low, ~high) if boolean else ((low == 0) & (high == 0), high <= HIDDEN)
    found = _over_views(sees) if torch.equal(sees, ~hides) else None
    if found is None:
        return None
    lengths = torch.tensor(sizes, device="cpu")
    views = torch.arange(len(sizes), device="cpu", dtype=torch.int32).repeat_interleave(lengths).to(mask.device)
    return SegmentMask(views, views, found[0], 0, found[1])


def _by_views(mask: Tensor, sizes: list[int], extreme: Callable[..., Tensor]) -> Tensor:
    """``[S, S]``: the extreme of the values ``[N, N]`` of each two views."""
    of_queries = torch.stack([extreme(part, 0) for part in mask.split(sizes)])
    return torch.stack([extreme(part, 1) for part in of_queries.split(sizes, 1)], 1)


def _over_views(sees: Tensor) -> tuple[int | None, int | None] | None:
    """`before` and `sink` of the `SegmentMask` by which views see each other as in ``[S, S]`` bool: all before them, a window, or a window
    and the first; None where they do not."""
    view = torch.arange(len(sees), device=sees.device)
    apart = view[:, None] - view  # by how many views a key comes before
    causal = apart >= 0
    furthest, of_others = (int(torch.where(some, apart, 0).amax()) for some in (sees, sees & (view > 0)))
    for seen, before, sink in (
        (causal, None, None),
        (causal & (apart <= furthest), furthest, None),
        (causal & ((apart <= of_others) | (view == 0)), of_others, 0),
    ):
        if torch.equal(sees, seen):
            return before, sink
    return None
