"""The linear branch over marginal blocks in Triton: sums over the marginal pairs of a query block and a key block.

The state of a query block is the sum of those of its marginal key blocks, and the gradient of a key block's state is the sum
of the gradients of the query blocks for which it is marginal. Both are the product of a 0/1 matrix [query blocks x key
blocks], or its transpose, with a matrix [blocks x D * D]. The 0/1 matrix exists in registers alone, unpacked from the bit
set of the map. Nothing cancels, as it does in the state over all blocks minus that over the others.

States of all query blocks take D / block_q of the memory of q, those of key blocks D / block_k of it. The latter are made
for some heads at a time, `GROUP_BYTES` or a `MAX_GROUPS`-th of them: 1,000 views (16 heads of 64) take 1.4 + 1.1 GB.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import launch
from .linear import block_states, precision

GROUP_BYTES = 1 << 30
MAX_GROUPS = 16


@triton.jit
def _marginal_pairs(Bits, row, first_block, rows, words, BLOCKS: tl.constexpr):
    """[BLOCKS, rows]: whether a key block, from `first_block` (a multiple of 32) on, is marginal for a query block in `row`.

    This way round, as neighbouring threads then hold neighbouring query blocks, and few words each.
    """
    lane = tl.arange(0, BLOCKS)[:, None]
    at = Bits + row * words
    first = first_block // 32
    word = tl.load(at + first, mask=row < rows, other=0)[None, :]
    for i in tl.static_range(1, BLOCKS // 32):
        word = tl.where(lane < 32 * i, word, tl.load(at + tl.minimum(first + i, words - 1), mask=row < rows, other=0)[None, :])
    return ((word >> lane % 32) & 1) == 0


@triton.jit
def _sum_tile(
    Bits, X, Out, Scales, head, tile, rows, columns, words, scale, WIDTH: tl.constexpr,
    TILE_OUT: tl.constexpr, TILE_IN: tl.constexpr, TILE: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """TILE_OUT rows and TILE columns of the product with X [inner, WIDTH]."""
    dtype: tl.constexpr = X.dtype.element_ty
    outer = columns if TRANSPOSED else rows
    inner = rows if TRANSPOSED else columns
    start = tl.program_id(0) * TILE_OUT
    own = start + tl.arange(0, TILE_OUT)
    lane = tile * TILE + tl.arange(0, TILE)
    bits = Bits + head * rows * words
    acc = tl.zeros([TILE_OUT, TILE], tl.float32)
    for first in range(0, inner, TILE_IN):
        other = first + tl.arange(0, TILE_IN)
        x = tl.load(
            X + (head * inner + other)[:, None] * WIDTH + lane[None, :], mask=(other < inner)[:, None] & (lane < WIDTH)[None, :], other=0.0
        )
        if TRANSPOSED:
            if Scales is not None:
                x = (x * tl.load(Scales + other, mask=other < rows, other=0.0)[:, None]).to(dtype)
            pairs = _marginal_pairs(bits, other, start, rows, words, TILE_OUT)
        else:
            pairs = tl.trans(_marginal_pairs(bits, own, first, rows, words, TILE_IN))
        weights = tl.where(pairs, tl.full([1, 1], 1.0, dtype), tl.full([1, 1], 0.0, dtype))
        acc = tl.dot(weights, x, acc, input_precision=PRECISION)
    if not TRANSPOSED and Scales is not None:
        acc *= tl.load(Scales + own, mask=own < rows, other=0.0)[:, None]
    at = (head * outer + own)[:, None] * WIDTH + lane[None, :]
    tl.store(Out + at, (acc * scale).to(Out.dtype.element_ty), mask=(own < outer)[:, None] & (lane < WIDTH)[None, :])


@triton.jit(do_not_specialize=["rows", "columns", "words"], do_not_specialize_on_alignment=["Bits"])
def _marginal_sums_kernel(
    Bits, States, Totals, OutStates, OutTotals, Scales, Used, rows, columns, words, scale,
    D: tl.constexpr, TILE_OUT: tl.constexpr, TILE_IN: tl.constexpr, TILE: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of states and totals over marginal pairs, times `scale`; programs that share a slice of the states run side by side.

        Bits                     [heads, rows, words] i32: a bit for each of `columns` key blocks that is not marginal
        States, Totals           [heads, columns, D, D] and [heads, columns, D] FP32; with TRANSPOSED, `rows` in place of `columns`
        OutStates, OutTotals     the same for `rows`; with TRANSPOSED, for `columns`
        Scales                   [rows] FP32: further factors of what is of a query block; or None
        Used                     [1] i32: where it is zero nothing is written; or None

    All are contiguous. Programs are [tiles of TILE_OUT results, slices of TILE numbers of a state and of 32 of a total, heads].
    """
    if Used is not None:  # noqa: SIM102 (decided when it is compiled; what follows, on the GPU)
        if tl.load(Used) == 0:
            return
    head = tl.program_id(2).to(tl.int64)
    tile = tl.program_id(1)
    tiles: tl.constexpr = (D * D + TILE - 1) // TILE
    if tile < tiles:
        _sum_tile(
            Bits, States, OutStates, Scales, head, tile, rows, columns, words, scale, D * D, TILE_OUT, TILE_IN, TILE, TRANSPOSED, PRECISION
        )  # fmt: skip
    else:
        _sum_tile(
            Bits, Totals, OutTotals, Scales, head, tile - tiles, rows, columns, words, scale, D, TILE_OUT, TILE_IN, 32, TRANSPOSED, "tf32x3"
        )  # fmt: skip


def marginal_sums(
    bits: Tensor, states: Tensor, totals: Tensor, into: tuple[Tensor, Tensor], *, columns: int, scale: float, transposed: bool,
    scales: Tensor | None = None, used: Tensor | None = None,
) -> None:  # fmt: skip
    """`naive.over_marginal` of states and totals times `scale`, or with `transposed` the sums the other way round.

    Args:
        bits: ``[heads, query blocks, words]`` int32, a bit for each key block that is not marginal.
        states: ``[heads, key blocks, D, D]``.
        totals: ``[heads, key blocks, D]`` FP32.
        into: The results, as `states` and `totals`, for query blocks.
        columns: Number of key blocks.
        scale: Factor of all results.
        transposed: From states of query blocks to results for key blocks.
        scales: ``[query blocks]`` FP32, further factors of what is of a query block, powers of two; or None.
        used: Of `linear.is_used`: where it is zero, nothing is written.
    """
    heads, rows, words = bits.shape
    dim = states.shape[-1]
    options = sums_options(states.dtype)
    grid = (-(-into[0].shape[1] // options["TILE_OUT"]), -(-dim * dim // options["TILE"]) + -(-dim // 32), heads)
    launch(
        _marginal_sums_kernel, grid,
        bits, states, totals, *into, scales, used, rows, columns, words, scale,
        D=dim, TRANSPOSED=transposed, PRECISION=precision(states), **options,
    )  # fmt: skip


def marginal_states(
    k: Tensor, v: Tensor, bits: Tensor, *, tokens: int, marginal: int, feature_map: str, block_k: int,
    mu: Tensor | None = None, proj: Tensor | None = None, scales: Tensor | None = None, used: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The states of all query blocks, divided by the number of tokens they are over (as if the last block were full).

    Args:
        k, v: ``[B, H, padded, D]``.
        bits: ``[B, H, query blocks, words]`` int32, a bit for each key block that is not marginal.
        tokens: Of which the first are tokens.
        marginal: Key blocks that are marginal for a query block that is not pinned.
        feature_map, block_k, mu, proj, used: See `block_states`.
        scales: Factors of the states of each query block, see `marginal_sums`, in place of one over `marginal`.

    Returns:
        ``[B * H, query blocks, D, D]`` in v's dtype and ``[B * H, query blocks, D]`` FP32.
    """
    k, v, bits = (x.flatten(0, 1) for x in (k, v, bits))
    heads, rows, _ = bits.shape
    columns, dim = -(-tokens // block_k), v.shape[-1]
    states = torch.empty(heads, rows, dim, dim, device=v.device, dtype=v.dtype)
    totals = torch.empty(heads, rows, dim, device=v.device, dtype=torch.float32)
    for some in head_groups(heads, columns, v):
        of_blocks = block_states(k[some], v[some], tokens, feature_map, block_k, mu=None if mu is None else mu[some], proj=proj, used=used)
        marginal_sums(
            bits[some], *of_blocks, (states[some], totals[some]), columns=columns, scale=1 / marginal if scales is None else 1.0,
            transposed=False, scales=scales, used=used,
        )  # fmt: skip
        del of_blocks  # before those of the next group are allocated
    return states, totals


def head_groups(heads: int, columns: int, v: Tensor) -> Iterator[slice]:
    """All heads, in groups for which the states of `columns` key blocks in v's dtype take a bounded amount of memory."""
    size = max(1, GROUP_BYTES // (columns * v.shape[-1] ** 2 * v.element_size()), -(-heads // MAX_GROUPS))
    return (slice(first, min(first + size, heads)) for first in range(0, heads, size))


def sums_options(dtype: torch.dtype) -> dict[str, int]:
    """Tiles, warps and pipeline stages of the kernel of sums."""
    if dtype == torch.float32:
        return dict(TILE_OUT=64, TILE_IN=32, TILE=64, num_warps=4, num_stages=1)
    return dict(TILE_OUT=128, TILE_IN=32, TILE=128, num_warps=4, num_stages=4)
