"""Gradients of the sparse softmax (and of its block means) with respect to q, k and v.

With p the softmax weights, restored from the logarithm of their denominator, and delta = dO . O_sparse:

    dV_j = sum_i p_ij dO_i      dS_ij = p_ij (dO_i . v_j - delta_i)
    dQ_i = scale sum_j dS_ij k_j      dK_j = scale sum_i dS_ij q_i

A program of `_dq_kernel` holds a query block and streams its key blocks; one of `_dkv_kernel` holds a key block and streams
the query blocks that attend to it; one of `_dmeans_kernel` holds mean keys and streams all query blocks. Long lists are
cut into parts whose sums are stored and added in a fixed order: no atomics, the same bits on every run.

Operands are in token order, ``[B, H, padded, D]``; dO is zero and delta is zero where there is no token. Results are in
host order, ``[B, N, H, D]``, or in token order where the pass before attention is to be undone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .linear_kernels import _phi
from .softmax_kernels import block_sizes, host_rows, is_marginal, load_rows, load_tile, places

MEAN_PARTS = tl.constexpr(16)  # most parts that the sums of `_dmeans_kernel` come in


@triton.jit
def lse_place(Stats, at):
    """Where the logarithm of the denominator of queries `at` lies; delta lies 64 numbers after it."""
    return Stats + at // 64 * 128 + at % 64


@triton.jit
def _stats_of(Stats, at, TILE: tl.constexpr):
    """Logarithm of the denominator, and delta, of the TILE queries from `at` on, at most 64. One load for both: of fewer numbers
    than there are threads, the compiler lets every thread load all that it needs by itself."""
    lanes = tl.arange(0, 2 * TILE)
    both = tl.load(lse_place(Stats, at) + lanes // TILE * 64 + lanes % TILE)
    return tl.split(tl.trans(tl.reshape(both, (2, TILE))))


@triton.jit
def phi_backward(features, grad, SOFTMAX: tl.constexpr):
    """Gradient with respect to x of phi(x) over the rows, whose values are `features`, from that of phi(x)."""
    if SOFTMAX:
        return features * (grad - tl.sum(features * grad, 1)[:, None])
    return grad * tl.minimum(features, 1.0)  # elu(x) + 1 is x + 1 above zero, and its own derivative below


@triton.jit(do_not_specialize=["N", "rows", "columns", "kept", "far", "words", "pinned", "splits", "per_split"])
def _dq_kernel(
    Q, DO, KTiles, VTiles, Stats, Indices, AllIndices, Bits, KFar, VFar, Share, Order, DQ, Partial,
    N, padded, H, rows, columns, kept, far, words, pinned, splits, per_split, scale, scale_log2,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    MEANS: tl.constexpr, ADD: tl.constexpr, HOST: tl.constexpr, ORDERED: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of a query block, with Share if ADD, in host order if HOST; sums over a part of the keys for a pinned one."""
    TILES: tl.constexpr = BLOCK_Q // TILE_Q
    STEPS: tl.constexpr = BLOCK_K // TILE_K
    tile = tl.program_id(0) % TILES
    pid = tl.program_id(0) // TILES
    heads = tl.num_programs(0) // TILES // (pinned * splits + rows - pinned)
    long = pid < heads * pinned * splits  # first, as they take longest
    other = pid - heads * pinned * splits
    head = tl.where(long, pid // tl.maximum(pinned * splits, 1), other // tl.maximum(rows - pinned, 1)).to(tl.int64)
    row = tl.where(long, pid // splits % tl.maximum(pinned, 1), pinned + other % tl.maximum(rows - pinned, 1))
    first = tl.where(long, pid % splits * per_split, 0)
    last = tl.where(long, tl.minimum(first + per_split, columns), kept)
    d = tl.arange(0, DP)
    lanes = tl.arange(0, TILE_K)
    at = head * padded + row * BLOCK_Q + tile * TILE_Q
    own = tl.arange(0, TILE_Q)
    dtype: tl.constexpr = Q.dtype.element_ty
    q = load_rows(Q, at + own, d, D)
    do = load_rows(DO, at + own, d, D)
    lse = tl.load(lse_place(Stats, at + own))
    delta = tl.load(lse_place(Stats, at + own) + 64)
    chosen = Indices + (head * rows + row) * kept
    if long:
        chosen = AllIndices
    acc = tl.zeros([TILE_Q, DP], tl.float32)
    for i in range(first * STEPS, last * STEPS):
        key = tl.load(chosen + i // STEPS) * BLOCK_K + i % STEPS * TILE_K
        k = load_tile(KTiles, head * padded + key, lanes, d, D, TMA)
        v = load_tile(VTiles, head * padded + key, lanes, d, D, TMA)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - lse[:, None]
        if key + TILE_K > N:
            score = tl.where((key + lanes < N)[None, :], score, float("-inf"))
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = tl.exp2(score) * (dp - delta[:, None])
        acc = tl.dot(ds.to(dtype), k, acc, input_precision=PRECISION)
    if MEANS:
        bits = Bits + (head * rows + row) * words
        for i in range(0, tl.where(long, 0, far // TILE_K)):
            start = i * TILE_K
            k = load_rows(KFar, head * far + start + lanes, d, D)
            v = load_rows(VFar, head * far + start + lanes, d, D)
            sizes = block_sizes(bits, start, lanes, N, columns, words, BLOCK_K)
            score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - lse[:, None]
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            p = tl.exp2(tl.minimum(score, 0.0)) * sizes[None, :]  # only scores of blocks that are left out exceed lse
            ds = p * (dp - delta[:, None])
            acc = tl.dot(ds.to(dtype), k, acc, input_precision=PRECISION)
    acc *= scale
    mask = (own < TILE_Q)[:, None] & (d < D)[None, :]
    if long:
        to = (((head * pinned + row) * splits + pid % splits) * BLOCK_Q + tile * TILE_Q + own)[:, None] * D + d[None, :]
        tl.store(Partial + to, acc, mask=mask)
    else:
        if ADD:
            acc += tl.load(Share + (at + own)[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        rows_out = at + own
        if HOST:
            n = row * BLOCK_Q + tile * TILE_Q + own
            rows_out = host_rows(places(Order, n, N, ORDERED), head, H, N)
            mask &= (n < N)[:, None]
        tl.store(DQ + rows_out[:, None] * D + d[None, :], acc.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["N", "columns", "total", "slots", "part", "splits", "first_head"])
def _dkv_kernel(
    QTiles, K, V, DOTiles, Stats, Rows, Starts, EarlyStarts, EarlyColumns, PartK, PartV, MeanDK, MeanDV, E, DTotal, Mu, Proj, Order, DK, DV,
    N, padded, H, columns, total, slots, part, splits, first_head, scale, scale_log2,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    EARLY: tl.constexpr, LINEAR: tl.constexpr, SOFTMAX: tl.constexpr, MEANS: tl.constexpr,
    HOST: tl.constexpr, ORDERED: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over an early part of a key block's list, or dK and dV of a tile of a key block from those and the rest.

    E and DTotal are of each head, or with LINEAR == 2 of each key block of the heads from `first_head` on. dV is stored in host
    order, and dK too if HOST.
    """
    TILES: tl.constexpr = BLOCK_K // TILE_K
    STEPS: tl.constexpr = BLOCK_Q // TILE_Q
    tile = tl.program_id(0) % TILES
    pid = tl.program_id(0) // TILES
    d = tl.arange(0, DP)
    own = tl.arange(0, TILE_K)
    lanes = tl.arange(0, TILE_Q)
    dtype: tl.constexpr = V.dtype.element_ty
    if EARLY:
        head = (pid // slots).to(tl.int64)
        column = tl.load(EarlyColumns + pid)
        if column >= columns:
            return
    else:
        head = (first_head + pid // columns).to(tl.int64)
        column = pid % columns
    at = head * (columns + 1) + column
    early = tl.load(EarlyStarts + at)
    parts = tl.load(EarlyStarts + at + 1) - early
    first = tl.load(Starts + at)
    last = tl.load(Starts + at + 1)
    if EARLY:
        first += (pid % slots - early) * part
        last = first + part
    else:
        first += parts * part
    key = column * BLOCK_K + tile * TILE_K
    k = load_rows(K, head * padded + key + own, d, D)
    v = load_rows(V, head * padded + key + own, d, D)
    dk = tl.zeros([TILE_K, DP], tl.float32)
    dv = tl.zeros([TILE_K, DP], tl.float32)
    for i in range(first * STEPS, last * STEPS):
        row = tl.load(Rows + head * total + i // STEPS)
        at = head * padded + row * BLOCK_Q + i % STEPS * TILE_Q
        q = load_tile(QTiles, at, lanes, d, D, TMA)
        do = load_tile(DOTiles, at, lanes, d, D, TMA)
        lse, delta = _stats_of(Stats, at, TILE_Q)
        score = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 - lse[None, :]
        p = tl.exp2(score)
        dv = tl.dot(p.to(dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(dtype), q, dk, input_precision=PRECISION)
    live = (own < TILE_K)[:, None] & (d < D)[None, :]
    if EARLY:
        to = ((pid * BLOCK_K + tile * TILE_K).to(tl.int64) + own)[:, None] * D + d[None, :]
        tl.store(PartK + to, dk, mask=live)
        tl.store(PartV + to, dv, mask=live)
    else:
        for i in range(0, parts):
            slot = head * slots + early + i
            to = (slot * BLOCK_K + tile * TILE_K + own)[:, None] * D + d[None, :]
            dk += tl.load(PartK + to, mask=live, other=0.0)
            dv += tl.load(PartV + to, mask=live, other=0.0)
        if MEANS:
            size = tl.minimum(N - column * BLOCK_K, BLOCK_K).to(tl.float32)
            part_of = tl.arange(0, MEAN_PARTS)
            mean = ((head * splits + part_of)[:, None] * columns + column) * D + d[None, :]
            there = (part_of < splits)[:, None] & (d < D)[None, :]
            mean_dk = tl.sum(tl.load(MeanDK + mean, mask=there, other=0.0), 0)
            mean_dv = tl.sum(tl.load(MeanDV + mean, mask=there, other=0.0), 0)
            dk += (mean_dk / size)[None, :]
            dv += (mean_dv / size)[None, :]
        dk *= scale
        n = key + own
        inside = live & (n < N)[:, None]
        host = host_rows(places(Order, n, N, ORDERED), head, H, N)
        if LINEAR != 0:
            at = head if LINEAR == 1 else (head - first_head) * columns + column
            both = (d < D)[:, None] & (d < D)[None, :]
            square = d[:, None] * D + d[None, :]
            e = tl.load(E + at * D * D + square, mask=both, other=0.0).to(dtype)
            proj = tl.load(Proj + square, mask=both, other=0.0).to(dtype)
            dstate = tl.dot(e, proj, input_precision=PRECISION).to(dtype)
            # Loaded again: kept in registers through the loop, they would push others out.
            features = _phi(load_rows(K, head * padded + n, d, D).to(tl.float32), (d < D)[None, :], SOFTMAX, 1)
            dv = tl.dot(features.to(dtype), dstate, dv, input_precision=PRECISION)
        tl.store(DV + host[:, None] * D + d[None, :], dv.to(dtype), mask=inside)
        if LINEAR != 0:
            centred = load_rows(V, head * padded + n, d, D).to(tl.float32) - tl.load(Mu + head * D + d, mask=d < D, other=0.0)[None, :]
            grad = tl.dot(centred.to(dtype), tl.trans(dstate), input_precision=PRECISION)
            grad += tl.load(DTotal + at * D + d, mask=d < D, other=0.0)[None, :]
            dk += phi_backward(features, grad, SOFTMAX)
        tl.store(DK + (host if HOST else head * padded + n)[:, None] * D + d[None, :], dk.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["N", "rows", "columns", "far", "words", "pinned", "per_split"])
def _dmeans_kernel(
    QTiles, KFar, VFar, DOTiles, Stats, Bits, PartK, PartV,
    N, padded, rows, columns, far, words, pinned, per_split, scale_log2,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK (before the scale) and dV of TILE_K mean keys, summed over `per_split` query blocks where they are marginal."""
    STEPS: tl.constexpr = BLOCK_Q // TILE_Q
    split = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, DP)
    lanes = tl.arange(0, TILE_Q)
    dtype: tl.constexpr = VFar.dtype.element_ty
    start = tl.program_id(0) * TILE_K
    own = tl.arange(0, TILE_K)
    k = load_rows(KFar, head * far + start + own, d, D)
    v = load_rows(VFar, head * far + start + own, d, D)
    block = start + own
    log_size = tl.log2(tl.maximum(tl.minimum(N - block * BLOCK_K, BLOCK_K), 1).to(tl.float32))
    log_size = tl.where(block < columns, log_size, float("-inf"))
    dk = tl.zeros([TILE_K, DP], tl.float32)
    dv = tl.zeros([TILE_K, DP], tl.float32)
    first = pinned + split * per_split
    for i in range(first * STEPS, tl.minimum(first + per_split, rows) * STEPS):
        row = i // STEPS
        at = head * padded + row * BLOCK_Q + i % STEPS * TILE_Q
        q = load_tile(QTiles, at, lanes, d, D, TMA)
        do = load_tile(DOTiles, at, lanes, d, D, TMA)
        lse, delta = _stats_of(Stats, at, TILE_Q)
        marginal = is_marginal(Bits + (head * rows + row) * words, start, own, words)
        bias = tl.where(marginal, log_size, float("-inf"))  # what is left out may have a score as large as it likes
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 + bias[:, None] - lse[None, :])
        dv = tl.dot(p.to(dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(dtype), q, dk, input_precision=PRECISION)
    to = ((head * tl.num_programs(1) + split) * columns + block)[:, None] * D + d[None, :]
    mask = (block < columns)[:, None] & (d < D)[None, :]
    # Transposed: from the layout of other FP32 stores the assembler makes every matrix product of the loop wait for the one before.
    tl.store(PartK + tl.trans(to), tl.trans(dk), mask=tl.trans(mask))
    tl.store(PartV + tl.trans(to), tl.trans(dv), mask=tl.trans(mask))
