"""Structured masks: which keys a query may see, by the segments (frames, windows, packed samples) that tokens are of.

    query i may see key j   if   queries[i] - before <= keys[j] <= queries[i] + after

No mask of all pairs exists. A query block and a key block are *allowed* if all their pairs may see each other, *partly allowed* if that
cannot be said but some might, else *forbidden*: known from the least and the greatest bounds of each block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SegmentMask(NamedTuple):
    """Which keys a query may see, by the numbers of segments.

    Attributes:
        queries: ``[M]`` int, the segment of each query, in host order.
        keys: ``[N]`` int, that of each key; None: keys are the tokens of queries.
        before: How many segments before its own a query sees; None: all.
        after: How many after its own; None: all.

    Of frame numbers ``SegmentMask(frames)`` is frame-causal, ``before=w, after=w`` a window over frames and ``before=w`` a causal one; of
    numbers of windows or of packed samples ``before=0`` is block-diagonal.
    """

    queries: Tensor
    keys: Tensor | None = None
    before: int | None = None
    after: int | None = 0

    def ordered(self, order: Tensor | None, key_order: Tensor | None) -> Allowed:
        """The mask of tokens in order: ``[M]`` and ``[N]`` int permutations, or None."""
        queries = self.queries.long()
        keys = queries if self.keys is None else self.keys.long()
        queries = queries if order is None else queries[order.long()]
        keys = keys if key_order is None else keys[key_order.long()]
        bounds = torch.iinfo(torch.int64)
        first = torch.full_like(queries, bounds.min) if self.before is None else queries - self.before
        last = torch.full_like(queries, bounds.max) if self.after is None else queries + self.after
        return Allowed(first, last, keys)


class Allowed(NamedTuple):
    """A mask of tokens in order: a query may see the keys of its first to its last segment.

    Attributes:
        first, last: ``[M]`` int64, the bounds of each query, both included.
        keys: ``[N]`` int64, the segment of each key.
    """

    first: Tensor
    last: Tensor
    keys: Tensor

    def in_blocks(self, block_q: int, block_k: int) -> AllowedBlocks:
        """What it says of blocks."""
        least = [_extremes(x, block) for x, block in ((self.first, block_q), (self.last, block_q), (self.keys, block_k))]
        return AllowedBlocks(*(x for pair in least for x in pair))


class AllowedBlocks(NamedTuple):
    """The least and greatest first and last segments of query blocks ``[rows]``, and the segments of key blocks ``[columns]``; int64."""

    least_first: Tensor
    first: Tensor
    last: Tensor
    greatest_last: Tensor
    least_key: Tensor
    greatest_key: Tensor

    def allowed(self, rows: slice) -> Tensor:
        """``[rows, columns]`` bool: all pairs of tokens may see each other."""
        return (self.least_key >= self.first[rows, None]) & (self.greatest_key <= self.last[rows, None])

    def forbidden(self, rows: slice) -> Tensor:
        """``[rows, columns]`` bool: no pair may, and the bounds of the blocks show it."""
        return (self.greatest_key < self.least_first[rows, None]) | (self.least_key > self.greatest_last[rows, None])


def _extremes(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Least and greatest of each block of x ``[N]``; the last may be short."""
    blocks = -(-len(x) // block)
    padded = torch.cat((x, x[-1:].expand(blocks * block - len(x)))).view(blocks, block)
    return padded.amin(-1), padded.amax(-1)
