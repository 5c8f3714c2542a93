"""A mask as kernels read it: the kind of each block, and the bounds of each token for blocks that are partly allowed."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .mask import FREE, PARTLY, WHOLE, Allowed
from .naive import masked_counts


class KernelMask(NamedTuple):
    """A mask over ordered, padded tokens; of a batch all sequences and heads have the same. Nothing waits for the GPU.

    Attributes:
        kinds: ``[rows, columns]`` int8, of each query and key block. Of a query block that may see nothing one is partly allowed: each
            has a critical one.
        chosen, left_out: ``[rows]`` int32, how many of the free key blocks of each query block are critical, and negligible.
        near: ``[rows]`` int32, how many key blocks are critical: those, and what is not free.
        means: ``[3, rows]`` int32: how many key blocks are marginal, and from which to (exclusive) which column they lie.
        partly: ``[2, rows]`` int32, from which to (exclusive) which column key blocks are partly allowed, for each query block.
        partly_rows: ``[2, columns]`` int32, likewise from which to which query block, for each key block.
        scales: ``[rows]`` FP32, about one over the number of blocks that a linear branch has states of, a power of two: marginal ones, or
            if it is `over_all` those that are wholly allowed.
        first, last: ``[rows * block_q]`` int32, see `Allowed`; queries after the last see all.
        low, high: ``[columns * block_k]`` int32; no query sees keys after the last.
    """

    kinds: Tensor
    chosen: Tensor
    left_out: Tensor
    near: Tensor
    means: Tensor
    partly: Tensor
    partly_rows: Tensor
    scales: Tensor
    first: Tensor
    last: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(
        cls, mask: Allowed, *, keep_ratio: float, negligible_ratio: float, pinned_queries: int, pinned_keys: int, block_q: int,
        block_k: int, over_all: bool,
    ) -> KernelMask:  # fmt: skip
        """For ratios as in `naive.masked_block_map`; pinned query blocks attend to all that they may see, as `pinned_keys` all may.

        `over_all` is whether there is a linear branch over all tokens.
        """
        kinds = mask.in_blocks(block_q, block_k).kinds(slice(None), pinned_keys)
        kinds[:pinned_queries] = torch.where(kinds[:pinned_queries] == FREE, WHOLE, kinds[:pinned_queries])
        rows, columns = kinds.shape
        free = kinds == FREE
        count = free.sum(-1, dtype=torch.int32)
        chosen, left_out = masked_counts(count, keep_ratio, negligible_ratio)
        near = chosen + (kinds >= WHOLE).sum(-1, dtype=torch.int32)
        kinds[:, 0] = torch.where(near > 0, kinds[:, 0], PARTLY)
        marginal = count - chosen - left_out
        states = ((kinds == FREE) | (kinds == WHOLE)).sum(-1) if over_all else marginal
        free_columns, partly = _spans(free), kinds == PARTLY
        means = torch.stack((marginal, *torch.where(marginal > 0, free_columns, 0)))
        tokens, keys = len(mask.first), len(mask.low)
        more_queries, more_keys = (0, rows * block_q - tokens), (0, columns * block_k - keys)
        return cls(
            kinds.contiguous(), chosen, left_out, near.clamp(min=1), means, _spans(partly), _spans(partly.mT),
            scales=torch.exp2(-states.clamp(min=1).float().log2().ceil()),
            first=F.pad(mask.first, more_queries, value=-1), last=F.pad(mask.last, more_queries, value=keys),
            low=F.pad(mask.low, more_keys, value=keys + 1), high=F.pad(mask.high, more_keys, value=-2),
        )  # fmt: skip

    def not_whole(self) -> Tensor:
        """A bit for each key block that is not wholly allowed: ``[rows, ceil(columns / 32)]`` int32."""
        bits = F.pad(((self.kinds != FREE) & (self.kinds != WHOLE)).int(), (0, -self.kinds.shape[1] % 32)).unflatten(-1, (-1, 32))
        return (bits << torch.arange(32, device=bits.device, dtype=torch.int32)).sum(-1, dtype=torch.int32)


def _spans(chosen: Tensor) -> Tensor:
    """Where what is chosen starts and ends in each row of ``[M, N]`` bool: ``[2, M]`` int32."""
    place = torch.arange(chosen.shape[1], device=chosen.device, dtype=torch.int32)
    return torch.stack((torch.where(chosen, place, chosen.shape[1]).amin(-1), torch.where(chosen, place + 1, 0).amax(-1)))
