"""Gradients of the sparse softmax (and of its block means) with respect to q, k and v.

With p the softmax weights, restored from the logarithm of their denominator, and delta = dO . O_sparse:

    dV_j = sum_i p_ij dO_i      dS_ij = p_ij (dO_i . v_j - delta_i)
    dQ_i = scale sum_j dS_ij k_j      dK_j = scale sum_i dS_ij q_i

A program of `_dq_kernel` holds a query block and streams its key blocks; one of `_dkv_kernel` holds a key block and streams
the query blocks that attend to it; one of `_dmeans_kernel` holds mean keys and streams all query blocks. Long lists are
cut into parts whose sums are stored and added in a fixed order: no atomics, the same bits on every run.

Operands are in token order, ``[B, H, padded, D]``; dO is zero and delta is zero where there is no query. Results are in
host order, ``[B, M, H, D]`` and ``[B, N, H, D]``, or in token order where the pass before attention is to be undone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .linear import phi
from .softmax import block_sizes, hide, host_rows, is_marginal, is_partly, load_rows, load_tile, places

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


@triton.jit(do_not_specialize=["M", "N", "rows", "columns", "kept", "mean_rows", "words", "pinned", "splits", "per_split"])
def _dq_kernel(
    Q, DO, KTiles, VTiles, Stats, Indices, AllIndices, Bits, KMeans, VMeans, Share, Order, DQ, Partial, Mask,
    M, N, padded, H, rows, columns, kept, mean_rows, words, pinned, splits, per_split, scale, scale_log2,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    MEANS: tl.constexpr, ADD: tl.constexpr, HOST: tl.constexpr, ORDERED: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of a query block, with Share if ADD, in host order if HOST; sums over a part of the keys for a pinned one.

    A program for each tile, in one dimension: those of `splits` parts of `per_split` key blocks of pinned query blocks come first.

        Q, DO                   [B * H, rows * BLOCK_Q, D]
        KTiles, VTiles          [B * H, padded, D]; TMA: tensor descriptors of [B * H * padded, D] in tiles of [TILE_K, D]
        Stats                   FP32, see `lse_place`
        Indices, AllIndices     [B * H, rows, kept] and [columns] i32: the critical key blocks of a query block, and of a pinned one
        Bits                    [B * H, rows, words] i32: a bit for each key block that is not marginal (MEANS)
        KMeans, VMeans          [B * H, mean_rows, D], zeros after `columns` rows (MEANS)
        Share                   [B * H, rows * BLOCK_Q, D]: what the linear branch adds (ADD)
        Order                   [M]: the host row of each query (ORDERED)
        DQ                      [B, M, H, D] if HOST, else [B * H, rows * BLOCK_Q, D]
        Partial                 [B * H, pinned, splits, BLOCK_Q, D] FP32, without Share
        Mask                    a `KernelMask`, or None: then Indices holds those of all query blocks, with kept for a stride alone

    All are contiguous. Sizes as in `_sparse_linear_kernel`; `scale_log2` is `scale` times log2(e).
    """
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
    at = (head * rows + row) * BLOCK_Q + tile * TILE_Q
    own = tl.arange(0, TILE_Q)
    dtype: tl.constexpr = Q.dtype.element_ty
    q = load_rows(Q, at + own, d, D)
    do = load_rows(DO, at + own, d, D)
    lse = tl.load(lse_place(Stats, at + own))
    delta = tl.load(lse_place(Stats, at + own) + 64)
    chosen = Indices + (head * rows + row) * kept
    if Mask is not None:
        near = tl.load(Mask.near + row)
        last = tl.where(long, tl.minimum(last, near), near)
    elif long:
        chosen = AllIndices
    acc = tl.zeros([TILE_Q, DP], tl.float32)
    for i in range(first * STEPS, last * STEPS):
        key = tl.load(chosen + i // STEPS) * BLOCK_K + i % STEPS * TILE_K
        k = load_tile(KTiles, head * padded + key, lanes, d, D, TMA)
        v = load_tile(VTiles, head * padded + key, lanes, d, D, TMA)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - lse[:, None]
        if key + TILE_K > N:
            score = tl.where((key + lanes < N)[None, :], score, float("-inf"))
        if Mask is not None:  # noqa: SIM102 (decided when it is compiled; what follows, on the GPU)
            if is_partly(Mask, row, key // BLOCK_K, columns):
                score = hide(score, Mask, row * BLOCK_Q + tile * TILE_Q + own, key + lanes, False)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = tl.exp2(score) * (dp - delta[:, None])
        acc = tl.dot(ds.to(dtype), k, acc, input_precision=PRECISION)
    if MEANS:
        bits = Bits + (head * rows + row) * words
        first_mean = 0
        means = tl.where(long, 0, mean_rows // TILE_K)
        if Mask is not None:
            first_mean = tl.load(Mask.means + rows + row) // TILE_K
            means = tl.cdiv(tl.load(Mask.means + 2 * rows + row), TILE_K)
        for i in range(first_mean, means):
            start = i * TILE_K
            k = load_rows(KMeans, head * mean_rows + start + lanes, d, D)
            v = load_rows(VMeans, head * mean_rows + start + lanes, d, D)
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
            rows_out = host_rows(places(Order, n, M, ORDERED), head, H, M)
            mask &= (n < M)[:, None]
        tl.store(DQ + rows_out[:, None] * D + d[None, :], acc.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["N", "rows", "columns", "total", "slots", "part", "splits", "first_head"])
def _dkv_kernel(
    QTiles, K, V, DOTiles, Stats, Rows, Starts, EarlyStarts, EarlyColumns, PartK, PartV, MeanDK, MeanDV, E, DTotal, Mu, Proj, Order, DK, DV,
    Mask, Part, PairDK, PairDV, N, rows, padded, H, columns, total, slots, part, splits, first_head, scale, scale_log2,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    EARLY: tl.constexpr, LINEAR: tl.constexpr, SOFTMAX: tl.constexpr, MEANS: tl.constexpr,
    HOST: tl.constexpr, ORDERED: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over an early part of a key block's list (EARLY), or dK and dV of a tile of a key block from those and the rest.

    A program for each tile of an early part or of a key block, in one dimension. Lists are those of `Columns`.

        K, V                       [B * H, padded, D]
        QTiles, DOTiles            [B * H, rows * BLOCK_Q, D]; TMA: tensor descriptors of it, flat, in tiles of [TILE_Q, D]
        Stats                      FP32, see `lse_place`
        Rows                       [B * H, total] i32: the query blocks of each key block
        Starts, EarlyStarts        [B * H, columns + 1] i32: where lists start in Rows, and their early parts among those of the head
        EarlyColumns               [B * H, slots] i32: the key block of each early part of `part` query blocks (EARLY)
        PartK, PartV               [B * H, slots, BLOCK_K, D] FP32: sums over early parts, dK before the scale; EARLY writes them
        MeanDK, MeanDV             [B * H, splits, columns, D] FP32: from `_dmeans_kernel` (MEANS)
        E, DTotal                  LINEAR == 1: [B * H, D, D] and [B * H, D]; LINEAR == 2: [heads, columns, D, D] and
                                   [heads, columns, D], of the heads from `first_head` on, which the programs are for
        Mu, Proj                   [B * H, D] FP32 and [D, D] (LINEAR)
        Order                      [N]: the host row of each key (ORDERED)
        DK                         [B, N, H, D] if HOST, else [B * H, padded, D], undefined after N tokens
        DV                         [B, N, H, D]
        Mask, Part                 a `KernelMask`, and i32: `part`; or None
        PairDK, PairDV             [B * H, padded, D] FP32: from `_pairs_dkv_kernel`, or None

    All are contiguous. Sizes, LINEAR and SOFTMAX as in `_sparse_linear_kernel`; `scale_log2` is `scale` times log2(e).
    """
    TILES: tl.constexpr = BLOCK_K // TILE_K
    STEPS: tl.constexpr = BLOCK_Q // TILE_Q
    tile = tl.program_id(0) % TILES
    pid = tl.program_id(0) // TILES
    d = tl.arange(0, DP)
    own = tl.arange(0, TILE_K)
    lanes = tl.arange(0, TILE_Q)
    dtype: tl.constexpr = V.dtype.element_ty
    if Part is not None:
        part = tl.load(Part)
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
        at = (head * rows + row) * BLOCK_Q + i % STEPS * TILE_Q
        q = load_tile(QTiles, at, lanes, d, D, TMA)
        do = load_tile(DOTiles, at, lanes, d, D, TMA)
        lse, delta = _stats_of(Stats, at, TILE_Q)
        score = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 - lse[None, :]
        if Mask is not None:  # noqa: SIM102
            if is_partly(Mask, row, column, columns):
                score = hide(score, Mask, row * BLOCK_Q + i % STEPS * TILE_Q + lanes, key + own, True)
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
        if PairDK is not None:
            to = (head * padded + key + own)[:, None] * D + d[None, :]
            dk += tl.load(PairDK + to, mask=live, other=0.0)
            dv += tl.load(PairDV + to, mask=live, other=0.0)
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
            features = phi(load_rows(K, head * padded + n, d, D).to(tl.float32), (d < D)[None, :], SOFTMAX, 1)
            dv = tl.dot(features.to(dtype), dstate, dv, input_precision=PRECISION)
        tl.store(DV + host[:, None] * D + d[None, :], dv.to(dtype), mask=inside)
        if LINEAR != 0:
            centred = load_rows(V, head * padded + n, d, D).to(tl.float32) - tl.load(Mu + head * D + d, mask=d < D, other=0.0)[None, :]
            grad = tl.dot(centred.to(dtype), tl.trans(dstate), input_precision=PRECISION)
            grad += tl.load(DTotal + at * D + d, mask=d < D, other=0.0)[None, :]
            dk += phi_backward(features, grad, SOFTMAX)
        tl.store(DK + (host if HOST else head * padded + n)[:, None] * D + d[None, :], dk.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["N", "rows", "columns", "mean_rows", "words", "pinned", "per_split"])
def _dmeans_kernel(
    QTiles, KMeans, VMeans, DOTiles, Stats, Bits, PartK, PartV,
    N, rows, columns, mean_rows, words, pinned, per_split, scale_log2,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK (before the scale) and dV of TILE_K mean keys, summed over `per_split` query blocks where they are marginal.

    Programs are [tiles of mean keys, splits of the query blocks that are not pinned, B * H].

        QTiles, DOTiles     [B * H, rows * BLOCK_Q, D]; TMA: tensor descriptors of it, flat, in tiles of [TILE_Q, D]
        KMeans, VMeans      [B * H, mean_rows, D], zeros after `columns` rows
        Stats               FP32, see `lse_place`
        Bits                [B * H, rows, words] i32: a bit for each key block that is not marginal
        PartK, PartV        [B * H, splits, columns, D] FP32

    All are contiguous. Sizes as in `_sparse_linear_kernel`.
    """
    STEPS: tl.constexpr = BLOCK_Q // TILE_Q
    split = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, DP)
    lanes = tl.arange(0, TILE_Q)
    dtype: tl.constexpr = VMeans.dtype.element_ty
    start = tl.program_id(0) * TILE_K
    own = tl.arange(0, TILE_K)
    k = load_rows(KMeans, head * mean_rows + start + own, d, D)
    v = load_rows(VMeans, head * mean_rows + start + own, d, D)
    block = start + own
    log_size = tl.log2(tl.maximum(tl.minimum(N - block * BLOCK_K, BLOCK_K), 1).to(tl.float32))
    log_size = tl.where(block < columns, log_size, float("-inf"))
    dk = tl.zeros([TILE_K, DP], tl.float32)
    dv = tl.zeros([TILE_K, DP], tl.float32)
    first = pinned + split * per_split
    for i in range(first * STEPS, tl.minimum(first + per_split, rows) * STEPS):
        row = i // STEPS
        at = (head * rows + row) * BLOCK_Q + i % STEPS * TILE_Q
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
