"""Triton twin of `naive`: scores by matrix products in slabs, selection by one kernel, exact and deterministic.

A program holds one row of scores. It finds the kept-th largest value by building its bits from the top (a count over the row for
each, until as many are kept as are to be), keeps what is above it and the first of what equals it, and writes the kept indices in
ascending order. A second run with another count finds what is negligible: all but the highest that are not to be left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import BackendError
from ..launch import launch
from ..qk_norm_rope.naive import block_sizes
from ..sizes import power_of_2
from .kernel_mask import KernelMask
from .naive import KeySpread

MAX_COLUMNS = 32768  # key blocks that a program can hold
SLAB_BYTES = 256 << 20
MAX_SLABS = 16


class BlockMap(NamedTuple):
    """The block map.

    Attributes:
        kv_indices: ``[B, H, query blocks, kept]`` int32, the kept key blocks, ascending.
        bits: The same as a bit set ``[B, H, query blocks, ceil(key blocks / 32)]`` int32, or None if not asked for.
        skipped: The same with a bit for negligible key blocks too: all that are not marginal. It is `bits` where none is negligible.
    """

    kv_indices: Tensor
    bits: Tensor | None
    skipped: Tensor | None


@triton.jit
def _ranks(score, eligible):
    """Scores as uint32 of the same order, above zero; zero where not `eligible`."""
    score = tl.where(score == score, score + 0.0, float("-inf"))  # NaN counts as lowest; -0 equals 0
    bits = score.to(tl.int32, bitcast=True)
    # The order of floats as the order of unsigned integers; 0 is below every float and stands for padding.
    rank = tl.where(bits < 0, ~bits, bits | -2147483648).to(tl.uint32, bitcast=True)
    return tl.where(eligible, rank, 0)


@triton.jit
def _load_scores(Scores, Variances, Sizes, at, column, inside, scale):
    """A row of scores: products of means, or with Variances (of scores) and Sizes (of key blocks) scores by error, see `naive`."""
    score = tl.load(Scores + at, mask=inside, other=0.0)
    if Variances is not None:
        variance = tl.load(Variances + at, mask=inside, other=1.0)
        size = tl.load(Sizes + column, mask=inside, other=1.0)
        score = score * scale + 0.5 * variance + 0.5 * tl.log(variance) + tl.log(size)
    return score


@triton.jit
def _highest(rank, count):
    """1 for the `count` highest of a row of ranks, of equals the first; else 0."""
    threshold = tl.zeros([], tl.uint32)
    bit = tl.full([], 2147483648, tl.uint32)
    found = tl.full([], -1, tl.int32)
    while (bit != 0) & (found != count):  # what parts the row is found before its last bit, but for equals
        candidate = (threshold | bit).to(tl.uint32)
        at_least = tl.sum((rank >= candidate).to(tl.int32), 0)
        threshold = tl.where(at_least >= count, candidate, threshold).to(tl.uint32)
        found = tl.where(at_least >= count, at_least, found)
        bit = (bit >> 1).to(tl.uint32)
    above = (rank > threshold).to(tl.int32)
    equal = (rank == threshold).to(tl.int32)
    room = count - tl.sum(above, 0)
    if tl.sum(equal, 0) > room:
        equal = equal & (tl.cumsum(equal, 0) <= room).to(tl.int32)
    return above | equal


@triton.jit
def _store_bits(to, chosen, words, WIDTH: tl.constexpr):
    """Writes a row of zeros and ones as bits."""
    word = tl.arange(0, WIDTH // 32)
    found = tl.sum(tl.reshape(chosen, (WIDTH // 32, 32)) << tl.arange(0, 32)[None, :], 1)
    tl.store(to + word, found, mask=word < words)


@triton.jit(do_not_specialize=["columns", "words", "out_row_offset", "rows", "out_rows"])
def _select_masked_kernel(
    Scores, Variances, Sizes, Kinds, Counts, LeftOut, Indices, Bits, Skipped, columns, words, out_row_offset, rows, out_rows, scale,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """As `_select_kernel` with a mask: of the free blocks of a row the highest, and all that are kept; and what is not marginal.

    Programs are [rows of a slab, heads]. Besides what that kernel takes:

        Kinds               [out_rows, columns] i8
        Counts, LeftOut     [out_rows] i32: how many free blocks are critical, and how many negligible
        Indices             [heads, out_rows, columns] i32, of which as many are written as blocks are critical
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < columns
    of_all = out_row_offset + row
    score = _load_scores(Scores, Variances, Sizes, (head * rows + row) * columns + column, column, inside, scale)
    kind = tl.load(Kinds + of_all * columns + column, mask=inside, other=0).to(tl.int32)
    rank = _ranks(score, kind == 1)
    free = tl.sum((kind == 1).to(tl.int32), 0)
    best = _highest(rank, tl.load(Counts + of_all))
    chosen = best | (kind >= 2).to(tl.int32)
    marginal = _highest(rank, free - tl.load(LeftOut + of_all)) - best
    out = head * out_rows + of_all
    tl.store(Indices + out * columns + tl.cumsum(chosen, 0) - 1, column, mask=chosen == 1)
    _store_bits(Bits + out * words, chosen, words, WIDTH)
    _store_bits(Skipped + out * words, inside.to(tl.int32) - marginal, words, WIDTH)


@triton.jit(do_not_specialize=["columns", "count", "pinned", "words", "out_row_offset", "rows", "out_rows"])
def _select_kernel(
    Scores, Variances, Sizes, Indices, Bits, Skipped, columns, count, pinned, words, out_row_offset, rows, out_rows, scale,
    WIDTH: tl.constexpr, BITS: tl.constexpr, SKIPPED: tl.constexpr,
):  # fmt: skip
    """Writes the `count` highest of a row, as indices and (BITS) as bits; or (SKIPPED) adds all but them to the bits of before.

    Programs are [rows of a slab, heads].

        Scores            [heads, rows, columns] FP32: a slab of query blocks
        Variances, Sizes  [heads, rows, columns] and [columns] FP32, to choose by error; else None, and `scale` has no part
        Indices           [heads, out_rows, count] i32: of all query blocks, of which the slab begins at `out_row_offset`
        Bits, Skipped     [heads, out_rows, words] i32

    All are contiguous. The first `pinned` columns are chosen whatever their scores; WIDTH is `columns` up to a power of two.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < columns
    score = _load_scores(Scores, Variances, Sizes, (head * rows + row) * columns + column, column, inside, scale)
    rank = _ranks(score, inside)
    rank = tl.where(column < pinned, 4294967295, rank).to(tl.uint32)
    chosen = _highest(rank, count)
    out = head * out_rows + out_row_offset + row
    if SKIPPED:
        chosen = inside.to(tl.int32) - chosen
    else:
        tl.store(Indices + out * count + tl.cumsum(chosen, 0) - 1, column, mask=chosen == 1)
    if BITS or SKIPPED:
        word = tl.arange(0, WIDTH // 32)
        found = tl.sum(tl.reshape(chosen, (WIDTH // 32, 32)) << tl.arange(0, 32)[None, :], 1)
        if SKIPPED:
            found |= tl.load(Bits + out * words + word, mask=word < words, other=0)
            tl.store(Skipped + out * words + word, found, mask=word < words)
        else:
            tl.store(Bits + out * words + word, found, mask=word < words)


@triton.jit(do_not_specialize=["N", "padded", "blocks"])
def _variance_kernel(X, Variance, N, padded, blocks, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr):
    """Variance of each BLOCK of rows, by dimension; programs [blocks, heads].

        X           [heads, padded, D], of which N rows count
        Variance    [heads, blocks, D] FP32

    All are contiguous. DP is D up to a power of two.
    """
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    row, d = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DP)
    inside = (row < N)[:, None] & (d < D)[None, :]
    x = tl.load(X + (head * padded + row)[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    size = tl.minimum(N - block * BLOCK, BLOCK).to(tl.float32)
    gap = tl.where(inside, x - (tl.sum(x, 0) / size)[None, :], 0.0)
    tl.store(Variance + (head * blocks + block) * D + d, tl.sum(gap * gap, 0) / size, mask=d < D)


def key_spread(k: Tensor, *, tokens: int, scale: float, block_k: int) -> KeySpread:
    """As `naive.key_spread`, of the first `tokens` of k ``[B, H, padded, D]``, contiguous."""
    batch, heads, padded, dim = k.shape
    columns = -(-tokens // block_k)
    variance = torch.empty(batch, heads, columns, dim, device=k.device, dtype=torch.float32)
    launch(
        _variance_kernel, (columns, batch * heads), k, variance, tokens, padded, columns,
        D=dim, DP=power_of_2(dim), BLOCK=block_k, num_warps=4,
    )  # fmt: skip
    return KeySpread(variance, block_sizes(tokens, block_k, k.device).float(), scale)


def block_map_with_bits(
    q_mean: Tensor, k_mean: Tensor, *, kept: int, pinned: int = 0, negligible: int = 0, bits: bool = True,
    by_error: KeySpread | None = None,
) -> BlockMap:  # fmt: skip
    """As `naive.block_map` (SLA, arXiv 2509.24006, Eq. 2, 3), and the same as bit sets where `bits`.

    Args:
        q_mean: ``[B, H, query blocks, D]`` FP32.
        k_mean: ``[B, H, key blocks, D]`` FP32.
        kept, pinned, negligible: Numbers of key blocks, see `naive.block_map`.
        bits: Whether bit sets are made.
        by_error: Choose by error; None: by the score of means.

    Scores take `SLAB_BYTES` or a `MAX_SLABS`-th of the whole map, whichever is more: launches do not grow with the length.

    Raises:
        BackendError: there are more than `MAX_COLUMNS` key blocks.
    """
    batch, heads, rows, _ = q_mean.shape
    columns = _columns_of(k_mean)
    words = -(-columns // 32)

    def empty(width: int) -> Tensor:
        return torch.empty(batch, heads, rows, width, device=q_mean.device, dtype=torch.int32)

    indices = empty(kept)
    chosen = empty(words) if bits else None
    skipped = empty(words) if bits and negligible else chosen
    counts = (kept,) if skipped is chosen else (kept, columns - negligible)
    width = max(32, power_of_2(columns))
    for start, scores, *spread in _slabs(q_mean, k_mean, by_error):
        for i, count in enumerate(counts):
            launch(
                _select_kernel, (scores.shape[-2], batch * heads),
                scores, *spread, indices, *(indices if x is None else x for x in (chosen, skipped)),
                columns, count, pinned, words, start, scores.shape[-2], rows, 1.0 if by_error is None else by_error.scale,
                WIDTH=width, BITS=bits, SKIPPED=i == 1, **launch_options(width),
            )  # fmt: skip
        del scores, spread  # before the next slab is allocated
    return BlockMap(indices, chosen, skipped)


def masked_block_map_with_bits(q_mean: Tensor, k_mean: Tensor, mask: KernelMask, by_error: KeySpread | None = None) -> BlockMap:
    """As `naive.masked_block_map`, with critical blocks of pinned query blocks too, and the same as bit sets.

    Args:
        q_mean, k_mean, by_error: As in `block_map_with_bits`.
        mask: What may be seen, and how many blocks are to be chosen.

    Returns:
        The block map; in a row of ``kv_indices`` ``[B, H, query blocks, key blocks]`` the first ``mask.near`` are written.

    Raises:
        BackendError: there are more than `MAX_COLUMNS` key blocks.
    """
    batch, heads, rows, _ = q_mean.shape
    columns = _columns_of(k_mean)
    words = -(-columns // 32)
    indices, chosen, skipped = (
        torch.empty(batch, heads, rows, size, device=q_mean.device, dtype=torch.int32) for size in (columns, words, words)
    )
    width = max(32, power_of_2(columns))
    for start, scores, *spread in _slabs(q_mean, k_mean, by_error):
        launch(
            _select_masked_kernel, (scores.shape[-2], batch * heads),
            scores, *spread, mask.kinds, mask.chosen, mask.left_out, indices, chosen, skipped, columns, words, start, scores.shape[-2],
            rows, 1.0 if by_error is None else by_error.scale, WIDTH=width, **launch_options(width),
        )  # fmt: skip
        del scores, spread
    return BlockMap(indices, chosen, skipped)


def _columns_of(k_mean: Tensor) -> int:
    columns = k_mean.shape[-2]
    if columns > MAX_COLUMNS:
        raise BackendError(
            f"the sequence has {columns} key blocks, the kernels take {MAX_COLUMNS}; use a larger block_k or backend='naive'"
        )
    return columns


def _slabs(q_mean: Tensor, k_mean: Tensor, by_error: KeySpread | None) -> Iterator[tuple[int, Tensor, Tensor | None, Tensor | None]]:
    """The first of some query blocks at a time, their products with mean keys, and by error variances of scores and sizes of key blocks."""
    batch, heads, rows, _ = q_mean.shape
    held = 4 * k_mean.shape[-2] * batch * heads * (1 if by_error is None else 2)
    slab = max(1, SLAB_BYTES // held, -(-rows // MAX_SLABS))
    for start in range(0, rows, slab):
        some = q_mean[..., start : start + slab, :]
        if by_error is None:
            yield start, some @ k_mean.mT, None, None
        else:
            yield start, some @ k_mean.mT, (some * by_error.scale).square() @ by_error.variance.mT, by_error.sizes


def launch_options(width: int) -> dict[str, int]:
    """Warps of the selection kernel for rows of `width` scores: few, as each of its counts ends with them waiting for each other."""
    return dict(num_warps=min(16, max(1, width // 1024)))
