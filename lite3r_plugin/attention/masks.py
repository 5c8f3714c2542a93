"""Masks of hosts that have a sparse form: those over frames, recognised by their values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..adapter.layouts import TokenLayout, Views
from ..ops.sla import SegmentMask

HIDDEN = -1e4  # what is added to scores from here on down leaves nothing of them


class Masks:
    """What masks turned out to be: a tensor that all sites of a forward are given is looked at once, since a GPU is waited for.

    It is looked at again in the next forward, and where its version says that it was written to. Tensors of inference mode have none: they
    are trusted within a forward, and nowhere else.
    """

    def __init__(self) -> None:
        self._known: Any = WeakTensorKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return Masks, ()

    def of(self, mask: Tensor, layout: TokenLayout | None, forward: object | None) -> SegmentMask | None:
        """`frame_causal`. `forward` is another object in each forward, None where it is not known which one runs."""
        version = None if mask.is_inference() else mask._version
        if version is None and forward is None:
            return frame_causal(mask, layout)
        state = forward, version, mask.device, learns(mask), layout
        known = self._known.get(mask)
        if known is None or known[0] != state:
            self._known[mask] = known = state, frame_causal(mask, layout)
        return known[1]


def learns(mask: Tensor) -> bool:
    """Whether autograd wants a gradient of `mask`, which its sparse form does not give."""
    return mask.requires_grad and torch.is_grad_enabled()


def frame_causal(mask: Tensor, layout: TokenLayout | None) -> SegmentMask | None:
    """`mask` as a mask over views, where that is what it is: each token sees all tokens of its view and of those before it.

    Those before it may be the last few alone (a window), and the first view besides. It looks at all values, for which is waited on a GPU,
    and takes no memory of the mask's size: one of 43,000 tokens takes gigabytes.

    Args:
        mask: What `scaled_dot_product_attention` takes: bool, True where a query sees a key, or numbers that are added to scores;
            ``[..., N, N]``.
        layout: Of the N tokens.

    Returns:
        None where it is anything else, the tokens of views are not known, or the mask `learns`.
    """
    if layout is None or any(not isinstance(part, Views) for part in layout.parts) or layout.views < 2 or learns(mask):
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
    with torch.inference_mode(False):  # it may be saved for a backward pass later
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
