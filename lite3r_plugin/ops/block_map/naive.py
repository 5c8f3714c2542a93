"""Definition of the block map: which key blocks each query block attends to exactly, and which not at all (SLA, arXiv 2509.24006,
Eq. 2, 3).

    score[i, j]   = mean(Q_i) . mean(K_j)          blocks as image tiles
    or, by error,   mean(Q_i) . mean(K_j) * scale + s^2 / 2 + log s + log |K_j|
                    s[i, j]^2 = (mean(Q_i) * scale)^2 . var(K_j): the variance of scores in block j, dimension by dimension
    kept(i)       = pinned blocks, and of the others the `kept - pinned` with the highest score (of equals the first;
                    NaN counts as lowest)
    negligible(i) = of those that are left the `negligible` with the lowest score (of equals the last)

With a mask (`mask.py`) blocks that are partly allowed are kept as well as pinned ones, forbidden ones are neither kept, marginal nor
negligible, and ratios are of the allowed blocks that are not pinned, for each query block: `masked_block_map`.

By error those blocks are kept whose mean would stand for them worst in the softmax (`sla.naive`): p s, in logarithms. p, of which the
softmax over a row would leave the order as it is, estimates the attention that a block gets, to second order; what its mean makes of that
is off by a share that grows with s: where all scores are equal the mean is exact, however large they are. An estimate from pooled blocks
is known from SpargeAttn (arXiv 2502.18137).

SLA subtracts the mean key before pooling and applies a softmax; neither changes the order within a row, so neither
is done here. Scores are built in slabs of query blocks: memory is O(query blocks x kept), never a full map.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..qk_norm_rope.naive import block_means, block_sizes
from .mask import FREE, WHOLE, Allowed, AllowedBlocks

SLAB_BYTES = 64 << 20


def kept_blocks(key_blocks: int, keep_ratio: float, pinned: int) -> int:
    """Key blocks that a query block attends to: the pinned ones and `keep_ratio` (in (0, 1]) of the others, rounded up, at least one."""
    free = key_blocks - pinned
    return pinned + min(free, max(math.ceil(keep_ratio * free - 1e-9), 1))


def negligible_blocks(key_blocks: int, negligible_ratio: float, kept: int, pinned: int) -> int:
    """Key blocks that a query block leaves out: `negligible_ratio` (in [0, 1]) of those that are not pinned, if as many are not kept."""
    return min(key_blocks - kept, math.floor(negligible_ratio * (key_blocks - pinned) + 1e-9))


def masked_counts(free: Tensor, keep_ratio: float, negligible_ratio: float) -> tuple[Tensor, Tensor]:
    """How many of `free` blocks (int, any shape) are kept, and left out: `kept_blocks` and `negligible_blocks` of each number."""
    count = free.double()
    kept = torch.minimum((keep_ratio * count - 1e-9).ceil().clamp(min=1), count)
    return kept.to(free.dtype), torch.minimum((negligible_ratio * count + 1e-9).floor(), count - kept).to(free.dtype)


def density(queries: int, keys: int, keep_ratio: float, pinned_queries: int, pinned_keys: int, block_q: int, block_k: int) -> float:
    """Share in [0, 1] of all (query block, key block) pairs that are computed exactly, pinned ones included.

    Args:
        queries, keys: How many there are; of none, all are computed.
        keep_ratio: In (0, 1], of the key blocks that are not pinned.
        pinned_queries: The blocks of the first so many attend to all.
        pinned_keys: All attend to the blocks of the first so many.
        block_q, block_k: Tokens per block.
    """
    if queries == 0 or keys == 0:
        return 1.0
    rows, columns = -(-queries // block_q), -(-keys // block_k)
    pinned_rows = min(-(-pinned_queries // block_q), rows)
    kept = kept_blocks(columns, keep_ratio, -(-pinned_keys // block_k))
    return (pinned_rows * columns + (rows - pinned_rows) * kept) / (rows * columns)


def masked_density(mask: Allowed, keep_ratio: float, pinned_queries: int, pinned_keys: int, block_q: int, block_k: int) -> float:
    """As `density`, of tokens that attend to each other with a mask: of all pairs, those too that may not be seen."""
    kinds = mask.in_blocks(block_q, block_k).kinds(slice(None), -(-pinned_keys // block_k))
    free = (kinds == FREE).sum(-1)
    kept = masked_counts(free, keep_ratio, 0.0)[0]
    pinned = -(-pinned_queries // block_q)
    kept[:pinned] = free[:pinned]
    return float(kept.sum() + (kinds >= WHOLE).sum()) / kinds.numel()


class KeySpread(NamedTuple):
    """What choosing by error reads beside means.

    Attributes:
        variance: ``[B, H, key blocks, D]``, that of the keys of each block, by dimension.
        sizes: ``[key blocks]``, the keys of each block.
        scale: Of scores.
    """

    variance: Tensor
    sizes: Tensor
    scale: float


def key_spread(k: Tensor, *, scale: float, block_k: int) -> KeySpread:
    """Of keys ``[B, H, N, D]`` in token order, in FP32 (FP64 for FP64 input)."""
    mean = block_means(k, block_k)
    keys = F.pad(k.to(mean.dtype), (0, 0, 0, -k.shape[-2] % block_k)).unflatten(-2, (-1, block_k))
    sizes = block_sizes(k.shape[-2], block_k, k.device)
    inside = (torch.arange(block_k, device=k.device) < sizes[:, None])[..., None]
    variance = (keys - mean[..., None, :]).square().where(inside, 0).sum(-2) / sizes[:, None]
    return KeySpread(variance, sizes.to(mean.dtype), scale)


def scores_of(q_mean: Tensor, k_mean: Tensor, by_error: KeySpread | None) -> Tensor:
    """Scores ``[B, H, query blocks, key blocks]``, as the module's docstring has them; NaN counts as lowest."""
    scores = q_mean @ k_mean.mT
    if by_error is not None:
        variance = (q_mean * by_error.scale).square() @ by_error.variance.mT
        scores = scores * by_error.scale + variance / 2 + variance.log() / 2 + by_error.sizes.log()
    return scores.masked_fill(scores.isnan(), -math.inf)


def _slab(q_mean: Tensor, k_mean: Tensor) -> int:
    """Query blocks whose scores are held at once."""
    held = 4 * k_mean.shape[-2] * q_mean.shape[0] * q_mean.shape[1]
    return max(1, SLAB_BYTES // held)


def block_map(
    q_mean: Tensor, k_mean: Tensor, *, kept: int, pinned: int = 0, negligible: int = 0, by_error: KeySpread | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Indices of the kept and of the negligible key blocks of each query block, ascending.

    Args:
        q_mean: ``[B, H, query blocks, D]`` pooled queries, FP32 or FP64.
        k_mean: ``[B, H, key blocks, D]`` pooled keys, in the same dtype.
        kept: Key blocks to keep, pinned ones included.
        pinned: The first `pinned` key blocks are always kept.
        negligible: Key blocks to leave out, at most those that are not kept.
        by_error: Choose by error; None: by the score of means.

    Returns:
        ``[B, H, query blocks, kept]`` and ``[B, H, query blocks, negligible]`` int32.
    """
    rows, slab = q_mean.shape[-2], _slab(q_mean, k_mean)
    critical, left_out = [], []
    for start in range(0, rows, slab):
        some = slice(start, start + slab)
        scores = scores_of(q_mean[..., some, :], k_mean, by_error)
        ranked = scores[..., pinned:].sort(dim=-1, descending=True, stable=True).indices + pinned
        always = torch.arange(pinned, device=scores.device).expand(*scores.shape[:-1], pinned)
        chosen = torch.cat((always, ranked[..., : kept - pinned]), -1)
        critical.append(chosen.sort(-1).values.to(torch.int32))
        left_out.append(ranked[..., ranked.shape[-1] - negligible :].sort(-1).values.to(torch.int32))
    return torch.cat(critical, -2), torch.cat(left_out, -2)


def masked_block_map(
    q_mean: Tensor, k_mean: Tensor, *, keep_ratio: float, mask: AllowedBlocks, pinned: int = 0, negligible_ratio: float = 0.0,
    by_error: KeySpread | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `block_map`, of the blocks that a mask allows.

    Args:
        q_mean, k_mean, pinned, by_error: As in `block_map`.
        keep_ratio: Share of the allowed key blocks that are not pinned to keep, of each query block; at least one of them.
        mask: What may be seen. Partly allowed blocks are kept.
        negligible_ratio: Share of them to leave out, if as many are not kept.

    Returns:
        ``[B, H, query blocks, most kept]`` and ``[B, H, query blocks, most left out]`` int32, ascending, then -1 where there are fewer.
    """
    rows, slab = q_mean.shape[-2], _slab(q_mean, k_mean)
    critical, left_out = [], []
    for start in range(0, rows, slab):
        some = slice(start, start + slab)
        kinds = mask.kinds(some, pinned)
        free = kinds == FREE
        scores = scores_of(q_mean[..., some, :], k_mean, by_error)
        count = free.sum(-1, keepdim=True)
        kept, negligible = masked_counts(count, keep_ratio, negligible_ratio)
        ranked = scores.sort(dim=-1, descending=True, stable=True).indices
        first = free.expand_as(scores).take_along_dim(ranked, -1).sort(dim=-1, descending=True, stable=True).indices
        place = ranked.take_along_dim(first, -1).argsort(-1)  # of each block among those that are free, the best first
        critical.append(_listed(free & (place < kept) | (kinds >= WHOLE)))
        left_out.append(_listed(free & (place >= count - negligible)))
    return _stacked(critical), _stacked(left_out)


def _listed(chosen: Tensor) -> Tensor:
    """The columns of ``[..., columns]`` bool that are set, ascending, then -1, as many as are set in any row; int32."""
    columns = chosen.shape[-1]
    listed = torch.where(chosen, torch.arange(columns, device=chosen.device), columns).sort(-1).values
    listed = listed[..., : max(1, int(chosen.sum(-1).max()))]
    return torch.where(listed < columns, listed, -1).to(torch.int32)


def _stacked(lists: list[Tensor]) -> Tensor:
    width = max(x.shape[-1] for x in lists)
    return torch.cat([F.pad(x, (0, width - x.shape[-1]), value=-1) for x in lists], -2)
