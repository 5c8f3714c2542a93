"""Definition of the block map: which key blocks each query block attends to exactly, and which not at all (SLA, arXiv 2509.24006,
Eq. 2, 3).

    score[i, j]   = mean(Q_i) . mean(K_j)          blocks as image tiles
    kept(i)       = pinned blocks, and of the others the `kept - pinned` with the highest score (of equals the first;
                    NaN counts as lowest)
    negligible(i) = of those that are left the `negligible` with the lowest score (of equals the last)

SLA subtracts the mean key before pooling and applies a softmax; neither changes the order within a row, so neither
is done here. Scores are built in slabs of query blocks: memory is O(query blocks x kept), never a full map.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SLAB_BYTES = 64 << 20


def kept_blocks(key_blocks: int, keep_ratio: float, pinned: int) -> int:
    """Key blocks that a query block attends to: the pinned ones and `keep_ratio` (in (0, 1]) of the others, rounded up, at least one."""
    free = key_blocks - pinned
    return pinned + min(free, max(math.ceil(keep_ratio * free - 1e-9), 1))


def negligible_blocks(key_blocks: int, negligible_ratio: float, kept: int, pinned: int) -> int:
    """Key blocks that a query block leaves out: `negligible_ratio` (in [0, 1]) of those that are not pinned, if as many are not kept."""
    return min(key_blocks - kept, math.floor(negligible_ratio * (key_blocks - pinned) + 1e-9))


def density(
    tokens: int, keep_ratio: float, pinned_tokens: int, block_q: int, block_k: int, *, keys: tuple[int, int] | None = None
) -> float:  # fmt: skip
    """Share in [0, 1] of all (query block, key block) pairs that are computed exactly, pinned ones included.

    Args:
        tokens: Queries, and keys without `keys`; of none, all are computed.
        keep_ratio: In (0, 1], of the key blocks that are not pinned.
        pinned_tokens: The blocks of the first `pinned_tokens` tokens attend to all, and all attend to them.
        block_q, block_k: Tokens per block.
        keys: The number of keys, and of those to which all attend, where they are other tokens than queries.
    """
    all_keys, pinned_keys = (tokens, pinned_tokens) if keys is None else keys
    if tokens == 0 or all_keys == 0:
        return 1.0
    rows, columns = -(-tokens // block_q), -(-all_keys // block_k)
    pinned_rows = min(-(-pinned_tokens // block_q), rows)
    kept = kept_blocks(columns, keep_ratio, -(-pinned_keys // block_k))
    return (pinned_rows * columns + (rows - pinned_rows) * kept) / (rows * columns)


def block_map(q_mean: Tensor, k_mean: Tensor, *, kept: int, pinned: int = 0, negligible: int = 0) -> tuple[Tensor, Tensor]:
    """Indices of the kept and of the negligible key blocks of each query block, ascending.

    Args:
        q_mean: ``[B, H, query blocks, D]`` pooled queries, FP32 or FP64.
        k_mean: ``[B, H, key blocks, D]`` pooled keys, in the same dtype.
        kept: Key blocks to keep, pinned ones included.
        pinned: The first `pinned` key blocks are always kept.
        negligible: Key blocks to leave out, at most those that are not kept.

    Returns:
        ``[B, H, query blocks, kept]`` and ``[B, H, query blocks, negligible]`` int32.
    """
    rows, columns = q_mean.shape[-2], k_mean.shape[-2]
    slab = max(1, SLAB_BYTES // (4 * columns * q_mean.shape[0] * q_mean.shape[1]))
    keys = k_mean.transpose(-1, -2)
    critical, left_out = [], []
    for start in range(0, rows, slab):
        scores = q_mean[..., start : start + slab, :] @ keys
        scores = scores.masked_fill(scores.isnan(), -math.inf)
        ranked = scores[..., pinned:].sort(dim=-1, descending=True, stable=True).indices + pinned
        always = torch.arange(pinned, device=scores.device).expand(*scores.shape[:-1], pinned)
        chosen = torch.cat((always, ranked[..., : kept - pinned]), -1)
        critical.append(chosen.sort(-1).values.to(torch.int32))
        left_out.append(ranked[..., ranked.shape[-1] - negligible :].sort(-1).values.to(torch.int32))
    return torch.cat(critical, -2), torch.cat(left_out, -2)
