"""Structured masks: which keys a query may see, by the segments (frames, windows, packed samples) that tokens are of.

    query i may see key j   if   keys[j] <= queries[i] + after   and   (keys[j] >= queries[i] - before  or  keys[j] <= sink)

No mask of all pairs exists. A query block and a key block are *allowed* if all their pairs may see each other, *partly allowed* if that
cannot be said but some might, else *forbidden*: known from the least and the greatest bounds of each block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FORBIDDEN, FREE, WHOLE, PARTLY = range(4)
"""Kinds of key blocks for a query block: no pair may be seen; all may, and it may be chosen; all may, and it is kept; some may, kept."""


class SegmentMask(NamedTuple):
    """Which keys a query may see, by the numbers of segments.

    Attributes:
        queries: ``[M]`` int, the segment of each query, in host order.
        keys: ``[N]`` int, that of each key; None: keys are the tokens of queries.
        before: How many segments before its own a query sees; None: all.
        after: How many after its own; None: all.
        sink: The last of the first segments that a query sees although they are more than `before` before its own; None: there are none.

    Of frame numbers ``SegmentMask(frames)`` is frame-causal, ``before=w, after=w`` a window over frames and ``before=w`` a causal one,
    which with ``sink=0`` sees frame 0 as well; of numbers of windows or of packed samples ``before=0`` is block-diagonal.
    """

    queries: Tensor
    keys: Tensor | None = None
    before: int | None = None
    after: int | None = 0
    sink: int | None = None

    def ordered(self, order: Tensor | None, key_order: Tensor | None) -> Allowed:
        """The mask of tokens in order: ``[M]`` and ``[N]`` int permutations, or None."""
        queries = self.queries.long()
        keys = queries if self.keys is None else self.keys.long()
        # The place of a segment among the sorted ones of all keys compares as its number does, and 32 bits hold it.
        places = keys.sort().values
        queries = (queries if order is None else queries[order.long()]).contiguous()
        keys = (keys if key_order is None else keys[key_order.long()]).contiguous()
        first, last = torch.zeros_like(queries, dtype=torch.int32), torch.full_like(queries, len(keys), dtype=torch.int32)
        if self.before is not None:
            first = torch.searchsorted(places, queries - self.before, out_int32=True)
        if self.after is not None:
            last = torch.searchsorted(places, queries + self.after, right=True, out_int32=True) - 1
        low = torch.searchsorted(places, keys, out_int32=True)
        high = low if self.sink is None else torch.where(keys <= self.sink, len(keys), low).int()
        return Allowed(first, last, low, high)


class Allowed(NamedTuple):
    """A mask of tokens in order: query i may see key j if ``first[i] <= high[j]`` and ``low[j] <= last[i]``.

    Attributes:
        first, last: ``[M]`` int32.
        low, high: ``[N]`` int32.
    """

    first: Tensor
    last: Tensor
    low: Tensor
    high: Tensor

    def in_blocks(self, block_q: int, block_k: int) -> AllowedBlocks:
        """What it says of blocks."""
        sizes = (block_q, block_q, block_k, block_k)
        extremes = [_extremes(x, block) for x, block in zip(self, sizes, strict=True)]
        return AllowedBlocks(*(Allowed(*of_all) for of_all in zip(*extremes, strict=True)))


class AllowedBlocks(NamedTuple):
    """The least and the greatest of each bound in each query block ``[rows]`` and key block ``[columns]``."""

    least: Allowed
    greatest: Allowed

    def allowed(self, rows: slice) -> Tensor:
        """``[rows, columns]`` bool: all pairs of tokens may see each other."""
        return (self.least.high >= self.greatest.first[rows, None]) & (self.greatest.low <= self.least.last[rows, None])

    def forbidden(self, rows: slice) -> Tensor:
        """``[rows, columns]`` bool: no pair may, and the bounds of the blocks show it."""
        return (self.greatest.high < self.least.first[rows, None]) | (self.least.low > self.greatest.last[rows, None])

    def kinds(self, rows: slice, pinned: int) -> Tensor:
        """``[rows, columns]`` int8, `FORBIDDEN`, `FREE`, `WHOLE` or `PARTLY`: blocks that are not free are kept, `pinned` ones too."""
        allowed = self.allowed(rows)
        kinds = torch.where(allowed, FREE, torch.where(self.forbidden(rows), FORBIDDEN, PARTLY)).to(torch.int8)
        kinds[:, :pinned] = torch.where(allowed[:, :pinned], WHOLE, kinds[:, :pinned])
        return kinds


def _extremes(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Least and greatest of each block of x ``[N]``; the last may be short."""
    blocks = -(-len(x) // block)
    padded = torch.cat((x, x[-1:].expand(blocks * block - len(x)))).view(blocks, block)
    return padded.amin(-1), padded.amax(-1)
