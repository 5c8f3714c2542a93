"""The softmax of one tile of queries over its critical key blocks and over the means of its marginal ones.

Two things make it fast where exponentials take as long as matrix products:

* **A fixed reference.** An online softmax (FlashAttention, arXiv 2205.14135) rescales its sums whenever it meets a larger
  score. Here the largest score of the first tile of keys is subtracted from all scores, so that nothing is rescaled. The
  result is the same as long as no sum overflows: while no score is some fifty above that reference. Who calls this looks at
  the sums, and retries the tiles that fail. FP16 ends too soon for that; it always runs online.
* **A pipeline.** The scores of the next tile of keys are multiplied while the exponentials of this one are taken.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import launch
from ...sizes import cover, power_of_2

LARGEST_SUM = tl.constexpr(2.0**80)  # with values up to 2**47 nothing overflows in FP32 or BF16
SMALLEST_SUM = tl.constexpr(2.0**-80)  # with a mask the reference may be a score that is not in the sum
MEAN_ROWS = 32


@triton.jit
def load_rows(X, rows, d, D: tl.constexpr):
    """Rows `rows` of a ``[*, D]`` matrix; zeros beyond D."""
    at = rows.to(tl.int64)[:, None] * D + d[None, :]
    if d.shape[0] == D:
        return tl.load(X + at)
    return tl.load(X + at, mask=(d < D)[None, :], other=0.0)


@triton.jit
def load_tile(X, first, lanes, d, D: tl.constexpr, TMA: tl.constexpr):
    """Rows ``first + lanes`` of a ``[*, D]`` matrix, of which X is a tensor descriptor if TMA; if not, with zeros beyond D."""
    if TMA:
        return X.load([first.to(tl.int32), 0])
    else:  # noqa: RET505 (without it both are compiled)
        return load_rows(X, first + lanes, d, D)


@triton.jit
def places(Order, n, N, ORDERED: tl.constexpr):
    """Where tokens `n` lie in host order."""
    if ORDERED:
        return tl.load(Order + n, mask=n < N, other=0).to(tl.int64)
    return n.to(tl.int64)


@triton.jit
def host_rows(places, head, heads, N):
    """Rows of a ``[B, N, heads, *]`` tensor at `places` of `head`, of all heads of a batch."""
    return (head // heads * N + places) * heads + head % heads


@triton.jit
def is_partly(Mask, row, column, columns):
    """Whether a mask allows some pairs of a query and a key block alone."""
    return tl.load(Mask.kinds + row * columns + column) == 3  # PARTLY; of kinds there are less than 2**31


@triton.jit
def is_seen(Mask, queries, keys, TRANSPOSED: tl.constexpr):
    """Which of those tokens see each other: ``[queries, keys]``, or if TRANSPOSED ``[keys, queries]``."""
    first, last = tl.load(Mask.first + queries), tl.load(Mask.last + queries)
    low, high = tl.load(Mask.low + keys), tl.load(Mask.high + keys)
    if TRANSPOSED:
        return (first[None, :] <= high[:, None]) & (low[:, None] <= last[None, :])
    else:  # noqa: RET505 (without it both are compiled)
        return (first[:, None] <= high[None, :]) & (low[None, :] <= last[:, None])


@triton.jit
def hide(score, Mask, queries, keys, TRANSPOSED: tl.constexpr):
    """Scores, of `is_seen`'s shape, with -inf for what is not seen."""
    return tl.where(is_seen(Mask, queries, keys, TRANSPOSED), score, float("-inf"))


@triton.jit
def accumulate(
    score, sizes, v, scale_log2, top, weight, acc,
    SIZED: tl.constexpr, MASKED: tl.constexpr, FIXED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds a tile of keys to the sums; if SIZED, each key counts `sizes` times. Returns the reference and the sums.

    If MASKED some queries may have seen no key yet: their reference is -inf then.
    """
    reference = top
    if not FIXED:
        if SIZED:  # what is left out may be as large as it likes
            score = tl.where((sizes > 0.0)[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1) * scale_log2)
        reference = new_top
        if MASKED:
            reference = tl.where(new_top == float("-inf"), 0.0, new_top)
        decay = tl.exp2(top - reference)
        weight *= decay
        acc *= decay[:, None]
        top = new_top
    p = tl.exp2(score * scale_log2 - reference[:, None])
    if SIZED:
        p *= sizes[None, :]
    weight += tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return top, weight, acc


@triton.jit
def is_lost(weight, MASKED: tl.constexpr):
    """1 where a sum of exponentials is too large, or NaN, or if MASKED too small, else 0."""
    lost = tl.where(weight < LARGEST_SUM, 0, 1)
    if MASKED:
        lost = tl.where(weight > SMALLEST_SUM, lost, 1)
    return lost


@triton.jit
def is_marginal(bits, first, lanes, words):
    """Whether the bit of the key blocks ``first + lanes`` is not set; of blocks beyond the last word, that of another block."""
    TILE: tl.constexpr = lanes.shape[0]
    word = tl.load(bits + first // 32)
    for j in tl.static_range(1, TILE // 32):
        word = tl.where(lanes < 32 * j, word, tl.load(bits + tl.minimum(first // 32 + j, words - 1)))
    place = (first + lanes) % 32 if TILE < 32 else lanes % 32
    return (word >> place) & 1 == 0


@triton.jit
def block_sizes(bits, first, lanes, N, columns, words, BLOCK_K: tl.constexpr):
    """Tokens in each of the key blocks ``first + lanes``; zero for those that are set in `bits`, and beyond the last of `columns`."""
    sizes = tl.where(is_marginal(bits, first, lanes, words), BLOCK_K + 0.0, 0.0)
    if first + lanes.shape[0] >= columns:  # the last block may be partial, and beyond it there is none
        last = (N - (columns - 1) * BLOCK_K).to(tl.float32)
        block = first + lanes
        sizes = tl.where(block < columns - 1, sizes, tl.where(block < columns, tl.minimum(sizes, last), 0.0))
    return sizes


@triton.jit
def attend(
    q, keys, values, chosen, near, k_means, v_means, bits, first_mean, means, Mask, row, n, N, columns, words, scale_log2, d,
    D: tl.constexpr, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr, MEANS: tl.constexpr, FIXED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax of a tile of queries `q` ``[TILE_Q, DP]`` over `near` key blocks, and the means of the marginal ones of all `columns`.

    Pointers are those of one head. The near blocks are listed in `chosen`, ascending; of others `bits` tells which are
    marginal. Rows `first_mean` (of a whole tile) to `means` of means are read: the columns and zeros up to a whole tile, or none at all.
    With a Mask (`KernelMask`, else None) the queries are `n`, of query block `row`.
    Returns the sum of values ``[TILE_Q, DP]``, the sum of exponentials and the reference ``[TILE_Q]``, in powers of two.
    """
    STEPS: tl.constexpr = BLOCK_K // TILE_K
    lanes = tl.arange(0, TILE_K)
    weight = tl.zeros([q.shape[0]], tl.float32)
    acc = tl.zeros([q.shape[0], d.shape[0]], tl.float32)
    # Only the last block may hold padding. Its first tile, which holds some key, goes first: it needs a mask, and it gives
    # the reference. Where blocks have several tiles, its others are masked in the loop.
    last = (near - 1) * STEPS
    key = tl.load(chosen + near - 1) * BLOCK_K
    score = tl.dot(q, tl.trans(load_rows(keys, key + lanes, d, D)), input_precision=PRECISION)
    score = tl.where((key + lanes < N)[None, :], score, float("-inf"))
    MASKED: tl.constexpr = Mask is not None
    partly = False
    every_score = score
    if MASKED:
        score = hide(score, Mask, n, key + lanes, False)
    if FIXED:
        top = tl.max(score, 1) * scale_log2
        if MASKED:  # of queries that see none of these keys any score will do
            top = tl.where(top == float("-inf"), tl.max(every_score, 1) * scale_log2, top)
    else:
        top = tl.full([q.shape[0]], float("-inf"), tl.float32)
    for i in range(0, near * STEPS - 1):
        tile = i
        if STEPS > 1:
            tile = tl.where(i < last, i, i + 1)
        next_key = tl.load(chosen + tile // STEPS) * BLOCK_K + tile % STEPS * TILE_K
        if MASKED:
            next_partly = is_partly(Mask, row, next_key // BLOCK_K, columns)
        next_score = tl.dot(q, tl.trans(load_rows(keys, next_key + lanes, d, D)), input_precision=PRECISION)
        if STEPS > 1:
            next_score = tl.where((next_key + lanes < N)[None, :], next_score, float("-inf"))
        v = load_rows(values, key + lanes, d, D)
        if MASKED:
            if partly:
                score = hide(score, Mask, n, key + lanes, False)
            partly = next_partly
        top, weight, acc = accumulate(score, lanes, v, scale_log2, top, weight, acc, False, MASKED, FIXED, PRECISION)
        score = next_score
        key = next_key
    v = load_rows(values, key + lanes, d, D)
    if MASKED:  # noqa: SIM102 (decided when it is compiled; what follows, on the GPU)
        if partly:
            score = hide(score, Mask, n, key + lanes, False)
    top, weight, acc = accumulate(score, lanes, v, scale_log2, top, weight, acc, False, MASKED, FIXED, PRECISION)
    if MEANS:
        for i in range(first_mean // TILE_K if MASKED else 0, tl.cdiv(means, TILE_K)):
            first = i * TILE_K
            sizes = block_sizes(bits, first, lanes, N, columns, words, BLOCK_K)
            score = tl.dot(q, tl.trans(load_rows(k_means, first + lanes, d, D)), input_precision=PRECISION)
            v = load_rows(v_means, first + lanes, d, D)
            top, weight, acc = accumulate(score, sizes, v, scale_log2, top, weight, acc, True, MASKED, FIXED, PRECISION)
    return acc, weight, top


@triton.jit(do_not_specialize=["columns", "padded"])
def _padded_means_kernel(KMean, VMean, KPadded, VPadded, columns, padded, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr):
    """Mean keys and values of one head, from KMean, VMean ``[B * H, columns, D]`` FP32 to KPadded, VPadded ``[B * H, padded, D]``.

    The latter are in a dtype of their own, with rows of zeros after `columns`; all are contiguous.
    """
    head = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    inside = (block < columns)[:, None] & (d < D)[None, :]
    written = (block < padded)[:, None] & (d < D)[None, :]
    source = (head * columns + block)[:, None] * D + d[None, :]
    to = (head * padded + block)[:, None] * D + d[None, :]
    tl.store(KPadded + to, tl.load(KMean + source, mask=inside, other=0.0).to(KPadded.dtype.element_ty), mask=written)
    tl.store(VPadded + to, tl.load(VMean + source, mask=inside, other=0.0).to(VPadded.dtype.element_ty), mask=written)


def padded_means(k_mean: Tensor, v_mean: Tensor, tile: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean keys and values ``[B, H, columns, D]`` in `dtype`, followed by rows of zeros up to a multiple of `tile`."""
    batch, heads, columns, dim = k_mean.shape
    padded = cover(columns, tile) * tile
    k, v = torch.empty(2, batch, heads, padded, dim, device=k_mean.device, dtype=dtype)
    launch(
        _padded_means_kernel, (cover(padded, MEAN_ROWS), batch * heads), k_mean, v_mean, k, v, columns, padded,
        D=dim, DP=power_of_2(dim), ROWS=MEAN_ROWS, num_warps=4,
    )  # fmt: skip
    return k, v
