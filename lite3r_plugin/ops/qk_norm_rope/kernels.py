"""Triton twin of `naive`: one pass over q, k, v that norms, rotates, reorders and pools.

A program holds one query block of one head, or of two in turn, for which it computes rotary angles once; they are never stored. A head is
held as two halves of D/2: element i of one is the rotary partner of element i of the other.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..sizes import power_of_2
from .naive import HeadNorm, Prepared, Tokens

NORMS = {None: 0, "layer": 1, "rms": 2}
ALL, QUERIES, KEYS = 0, 1, 2  # what a launch is for


@triton.jit
def _norm_rotate(x1, x2, W, B, lanes1, lanes2, live_lane, cos, sin, eps, D: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr):
    """The two halves of rows of a head, x1 and x2 (FP32), normed and rotated."""
    if NORM == 1:
        mean = (tl.sum(x1, 1) + tl.sum(x2, 1)) / D
        x1 = tl.where(live_lane[None, :], x1 - mean[:, None], 0.0)
        x2 = tl.where(live_lane[None, :], x2 - mean[:, None], 0.0)
    if NORM != 0:
        scale = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / D + eps)
        x1 = x1 * scale[:, None] * tl.load(W + lanes1, mask=live_lane, other=0.0).to(tl.float32)[None, :]
        x2 = x2 * scale[:, None] * tl.load(W + lanes2, mask=live_lane, other=0.0).to(tl.float32)[None, :]
    if NORM == 1:
        x1 += tl.load(B + lanes1, mask=live_lane, other=0.0).to(tl.float32)[None, :]
        x2 += tl.load(B + lanes2, mask=live_lane, other=0.0).to(tl.float32)[None, :]
    if ROPE:
        y1 = x1 * cos - x2 * sin
        x2 = x2 * cos + x1 * sin
        x1 = y1
    return x1, x2


@triton.jit
def _store_means(M, x, live, base, lanes, live_lane, first_row, N, blocks, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Mean of each BLOCK of the ROWS rows of x, over rows below N, into rows of M."""
    HALF: tl.constexpr = x.shape[1]
    x = tl.where(live[:, None], x, 0.0)
    sums = tl.sum(tl.reshape(x, (ROWS // BLOCK, BLOCK, HALF)), 1)
    sub = tl.arange(0, ROWS // BLOCK)
    counts = tl.minimum(tl.maximum(N - first_row - sub * BLOCK, 1), BLOCK).to(tl.float32)
    block = first_row // BLOCK + sub
    means = M + (base * blocks + block)[:, None] * D + lanes[None, :]
    tl.store(means, sums / counts[:, None], mask=(block < blocks)[:, None] & live_lane[None, :])


@triton.jit
def _load_halves(at, lanes1, lanes2, inside):
    """Rows at `at`, in FP32: entry i of the second half is the rotary partner of entry i of the first."""
    x1 = tl.load(at + lanes1[None, :], mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(at + lanes2[None, :], mask=inside, other=0.0).to(tl.float32)
    return x1, x2


@triton.jit
def _store_halves(
    x1, x2, Out, Mean, base, to, lanes1, lanes2, live, live_lane, written, first_row, N, blocks,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """The rows into Out, and if POOL their means over blocks into Mean; then padding is zero."""
    if POOL:
        _store_means(Mean, x1, live, base, lanes1, live_lane, first_row, N, blocks, D, ROWS, BLOCK)
        _store_means(Mean, x2, live, base, lanes2, live_lane, first_row, N, blocks, D, ROWS, BLOCK)
        x1 = tl.where(live[:, None], x1, 0.0)
        x2 = tl.where(live[:, None], x2, 0.0)
    tl.store(Out + to + lanes1[None, :], x1.to(Out.dtype.element_ty), mask=written)
    tl.store(Out + to + lanes2[None, :], x2.to(Out.dtype.element_ty), mask=written)


@triton.jit
def rotation(place, p_stride_c, live, lane, log2_base, D: tl.constexpr):
    """cos and sin of the angles of tokens whose two coordinates are at `place` and `p_stride_c` after it, by half lane.

    An angle is a position times a frequency. With the frequency in quarter turns, whole quarters come off the product without a division
    by pi, and before it is rounded: one reduction serves both functions, and large positions need no other path. What is left is in
    [-pi/4, pi/4], where short polynomials (Cephes, sinf and cosf) are within 1e-7.
    """
    first = tl.load(place, mask=live, other=0).to(tl.float32)
    second = tl.load(place + p_stride_c, mask=live, other=0).to(tl.float32)
    position = tl.where((lane < D // 4)[None, :], first[:, None], second[:, None])
    frequency = tl.exp2(-log2_base * (lane % (D // 4)).to(tl.float32) / (D // 4)) * 0.6366197723675814  # 2 / pi
    frequency = tl.broadcast_to(frequency[None, :], position.shape)
    quarters = tl.floor(position * frequency + 0.5)
    rest = tl.fma(position, frequency, -quarters)
    x = tl.clamp(rest, -1.0, 1.0) * 1.5707963267948966  # more than one: FP32 does not tell quarters of such angles apart
    square = x * x
    sine = x + x * square * (-1.6666654611e-1 + square * (8.3321608736e-3 + square * -1.9515295891e-4))
    fourth = 4.166664568298827e-2 + square * (-1.388731625493765e-3 + square * 2.443315711809948e-5)
    cosine = 1.0 - 0.5 * square + square * square * fourth
    quarter = quarters.to(tl.int32)
    odd = (quarter & 1) != 0
    cos, sin = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where(((quarter + 1) & 2) != 0, -cos, cos), tl.where((quarter & 2) != 0, -sin, sin)


@triton.jit(do_not_specialize=["N", "out_rows", "q_blocks", "k_blocks", "p_stride_b", "p_stride_n", "p_stride_c"])
def _prepare_kernel(
    Q, K, V, Order, Positions, QW, QB, KW, KB, QOut, KOut, VOut, QMean, KMean, VMean,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    p_stride_b, p_stride_n, p_stride_c,
    N, H, out_rows, q_blocks, k_blocks, log2_base, q_eps, k_eps,
    D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, ROPE: tl.constexpr, ORDERED: tl.constexpr, POOL: tl.constexpr, PART: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Norm, rotate, reorder and pool ROWS tokens of HEADS heads of q, k and v; programs [token blocks x groups of heads, B].

    Groups of heads come first, so that those of a token, which lie side by side in the host's tensors, are read at about the same time.

        Q, K, V                 [B, H, N, D] in host order, of strides q_stride_b, q_stride_h, q_stride_n and 1, and so on
        Order                   [N]: the host row of each token (ORDERED)
        Positions               [B, N, 2] of strides p_stride_b, p_stride_n, p_stride_c (ROPE)
        QW, QB, KW, KB          [D]: weight and bias of the norms (Q_NORM, K_NORM: 0 none, 1 layer, 2 RMS, which has no bias)
        QOut, KOut, VOut        [B * H, out_rows, D] contiguous, in token order; with POOL zeros after N tokens
        QMean                   [B * H, q_blocks, D] FP32 contiguous: means over ROWS tokens (POOL)
        KMean, VMean            [B * H, k_blocks, D] FP32 contiguous: means over BLOCK_K tokens (POOL)

    PART: 0 all, 1 Q alone, 2 K and V alone, where those are other tokens. Without POOL, V is left alone. `log2_base` is log2 of the base
    of the rotary frequencies; HALF is D / 2 up to a power of two.
    """
    groups = H // HEADS
    first_row = tl.program_id(0) // groups * ROWS
    batch = tl.program_id(1).to(tl.int64)
    rows = first_row + tl.arange(0, ROWS)
    live = rows < N
    source = rows
    if ORDERED:
        source = tl.load(Order + rows, mask=live, other=0)
    source = source.to(tl.int64)
    lane = tl.arange(0, HALF)
    live_lane = lane < D // 2
    lanes1 = (lane // (D // 4)) * (D // 2) + lane % (D // 4)
    lanes2 = lanes1 + D // 4
    inside = live[:, None] & live_lane[None, :]
    written = (rows < out_rows)[:, None] & live_lane[None, :]
    cos = tl.zeros([ROWS, HALF], tl.float32)
    sin = cos
    if ROPE:
        cos, sin = rotation(Positions + batch * p_stride_b + source * p_stride_n, p_stride_c, live, lane, log2_base, D)
    for i in tl.static_range(HEADS):
        head = (tl.program_id(0) % groups).to(tl.int64) * HEADS + i
        base = batch * H + head
        to = (base * out_rows + rows)[:, None] * D
        if PART != 2:
            at = Q + batch * q_stride_b + head * q_stride_h + source[:, None] * q_stride_n
            x1, x2 = _load_halves(at, lanes1, lanes2, inside)
            x1, x2 = _norm_rotate(x1, x2, QW, QB, lanes1, lanes2, live_lane, cos, sin, q_eps, D, Q_NORM, ROPE)
            _store_halves(
                x1, x2, QOut, QMean, base, to, lanes1, lanes2, live, live_lane, written, first_row, N, q_blocks, D, ROWS, ROWS, POOL
            )
        if PART != 1:
            at = K + batch * k_stride_b + head * k_stride_h + source[:, None] * k_stride_n
            x1, x2 = _load_halves(at, lanes1, lanes2, inside)
            x1, x2 = _norm_rotate(x1, x2, KW, KB, lanes1, lanes2, live_lane, cos, sin, k_eps, D, K_NORM, ROPE)
            _store_halves(
                x1, x2, KOut, KMean, base, to, lanes1, lanes2, live, live_lane, written, first_row, N, k_blocks, D, ROWS, BLOCK_K, POOL
            )
        if POOL and PART != 1:
            at = V + batch * v_stride_b + head * v_stride_h + source[:, None] * v_stride_n
            x1, x2 = _load_halves(at, lanes1, lanes2, inside)
            _store_halves(
                x1, x2, VOut, VMean, base, to, lanes1, lanes2, live, live_lane, written, first_row, N, k_blocks, D, ROWS, BLOCK_K, POOL
            )


def prepare_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    order: Tensor | None = None,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    positions: Tensor | None = None,
    rope_base: float | None = None,
    keys: Tokens | None = None,
    block_q: int = 128,
    block_k: int = 64,
) -> Prepared:
    """As `naive.prepare_qkv`, but q, k, v come back padded with zeros to a multiple of `block_q` tokens. One launch; two with `keys`."""
    batch, heads, _, dim = v.shape
    queries, tokens = q.shape[-2], v.shape[-2]
    rows = -(-tokens // block_q) * block_q
    padded = -(-queries // block_q) * block_q, rows, rows
    blocks = -(-queries // block_q), -(-tokens // block_k), -(-tokens // block_k)
    out = [torch.empty(batch, heads, rows, dim, device=v.device, dtype=v.dtype) for rows in padded]
    means = [torch.empty(batch, heads, count, dim, device=v.device, dtype=torch.float32) for count in blocks]
    if keys is None:
        _launch(q, k, v, order, q_norm, k_norm, positions, rope_base, out, means, block_q, block_k)
    else:
        _launch(q, k, v, order, q_norm, None, positions, rope_base, out, means, block_q, block_k, QUERIES)
        _launch(q, k, v, keys.order, None, k_norm, keys.positions, rope_base, out, means, block_q, block_k, KEYS)
    return Prepared(*out, *means)


def norm_rope(
    q: Tensor, k: Tensor, *, q_norm: HeadNorm | None, k_norm: HeadNorm | None, positions: Tensor | None, rope_base: float | None
) -> tuple[Tensor, Tensor]:
    """As `naive.norm_rope` on q and on k, in one launch, back in their own dtypes."""
    out = [torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k)]
    _launch(q, k, None, None, q_norm, k_norm, positions, rope_base, out, None, 64, 64)
    return out[0], out[1]


def _launch(q, k, v, order, q_norm, k_norm, positions, rope_base, out, means, rows, block_k, part=ALL) -> None:
    q, k, v = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    pool = means is not None
    v, v_out = (v, out[2]) if pool else (k, out[1])
    batch, heads, tokens, dim = q.shape if part != KEYS else k.shape
    blocks = -(-tokens // rows)
    rope = positions is not None and rope_base is not None
    nothing = out[0]
    q_norm, k_norm = q_norm or HeadNorm(None, None, None, 0.0), k_norm or HeadNorm(None, None, None, 0.0)
    weights = [w for norm in (q_norm, k_norm) for w in norm_affine(norm, dim, q.device)]
    options = launch_options(rows, dim, heads, rope, pool)
    launch(
        _prepare_kernel, (blocks * (heads // options["HEADS"]), batch),
        q, k, v, nothing if order is None else order, positions if rope else nothing,
        *(nothing if w is None else w for w in weights), out[0], out[1], v_out, *(means if pool else (nothing,) * 3),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *((broadcast_stride(positions, batch), *positions.stride()[1:]) if rope else (0, 0, 0)),
        tokens, heads, out[1 if part == KEYS else 0].shape[2],
        means[0].shape[2] if pool else 0, means[1].shape[2] if pool else 0,
        math.log2(rope_base) if rope else 0.0, q_norm.eps, k_norm.eps,
        D=dim, HALF=power_of_2(dim // 2), ROWS=rows, BLOCK_K=block_k,
        Q_NORM=NORMS[q_norm.kind], K_NORM=NORMS[k_norm.kind], ROPE=rope, ORDERED=order is not None, POOL=pool, PART=part,
        **options,
    )  # fmt: skip


def launch_options(rows: int, dim: int, heads: int, rope: bool, pool: bool) -> dict[str, int]:
    """Heads in turn of a program that holds `rows` tokens of a head, which share the angles of `rope`, and its warps."""
    return dict(HEADS=2 if rope and heads % 2 == 0 else 1, num_warps=8 if rows * dim > 8192 else 4)


def broadcast_stride(positions: Tensor, batch: int) -> int:
    """Stride of the batch of `positions` ``[B or 1, N, 2]``."""
    return 0 if positions.shape[0] == 1 and batch > 1 else positions.stride(0)


def norm_affine(norm: HeadNorm, dim: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a norm; ones and zeros where it has none."""
    if norm.kind is None:
        return None, None
    weight = torch.ones(dim, device=device) if norm.weight is None else norm.weight
    return weight, torch.zeros(dim, device=device) if norm.bias is None and norm.kind == "layer" else norm.bias
