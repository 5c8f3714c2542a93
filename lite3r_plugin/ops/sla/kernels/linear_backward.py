"""Gradients of the linear branch, and what the softmax's backward needs of each query.

With f = phi(q), N H and N Z the linear state, n = f Z, l = f H / n and O_linear = l Proj^T, per query:

    u = dO / n      E = sum f^T u      dH = E Proj      dProj = E^T H      dZ = -sum f (dO . O_linear) / n
    df = u (H Proj^T)^T - Z (dO . O_linear) / n
    delta = dO . O_sparse = dO . O - dO . O_linear      so O_sparse need not be kept

Over marginal blocks each query block has an H, Z, E, dH and dZ of its own. The output of the branch is nearly the same for all
queries, and gradients are small differences. Hence values are centred: H stands for H - Z mu and O_linear for O_linear - mu
Proj^T, mu the mean value, wherever that changes no result but rounding. What centring takes from E^T H is (sum dO)^T mu.
All that E Proj is needed for is linear in E, so Proj is applied last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backward_kernels import lse_place, phi_backward
from .linear_kernels import _phi
from .softmax_kernels import host_rows, places


@triton.jit(do_not_specialize=["N", "rows", "pinned", "per_split"])
def _rows_kernel(
    Q, Out, GradOut, Lse, Order, State, Total, Mu, Proj, DO, Stats, DQ, E, DTotal, DSum,
    N, padded, H, rows, pinned, per_split, stride_b, stride_h, stride_n,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_Q: tl.constexpr, TILE_Q: tl.constexpr,
    LINEAR: tl.constexpr, SOFTMAX: tl.constexpr, ORDERED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dO in token order, delta, and what the linear branch needs, of `per_split` query blocks of one head.

    Writes DO and Stats (lse and delta), and with the linear branch its share of DQ. Over all tokens State is the H of each head, and
    E and DTotal get partial sums for E and dZ. Over marginal blocks, where `per_split` is 1, State is the H of each query block, and
    E, DTotal and DSum get its E / BLOCK_Q, dZ / BLOCK_Q and sum of dO.
    """
    STEPS: tl.constexpr = BLOCK_Q // TILE_Q
    split = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, DP)
    live = d < D
    both = live[:, None] & live[None, :]
    lanes = tl.arange(0, TILE_Q)
    dtype: tl.constexpr = Q.dtype.element_ty
    square = d[:, None] * D + d[None, :]
    if LINEAR != 0:
        owner = head if LINEAR == 1 else head * rows + split
        proj = tl.load(Proj + square, mask=both, other=0.0).to(tl.float32)
        mu_proj = tl.sum(proj * tl.load(Mu + head * D + d, mask=live, other=0.0)[None, :], 1)
        state = tl.load(State + owner * D * D + square, mask=both, other=0.0).to(dtype)
        state = tl.dot(state, tl.trans(proj.to(dtype)), input_precision=PRECISION).to(dtype)
        total = tl.load(Total + owner * D + d, mask=live, other=0.0)
        outer = tl.zeros([DP, DP], tl.float32)
        dtotal = tl.zeros([DP], tl.float32)
        dsum = tl.zeros([DP], tl.float32)
    for i in range(split * per_split * STEPS, tl.minimum((split + 1) * per_split, rows) * STEPS):
        n = i * TILE_Q + lanes
        place = places(Order, n, N, ORDERED)
        mask = (n < N)[:, None] & live[None, :]
        at = head // H * stride_b + head % H * stride_h + place * stride_n
        do = tl.load(GradOut + at[:, None] + d[None, :], mask=mask, other=0.0).to(dtype)
        out = tl.load(Out + host_rows(place, head, H, N)[:, None] * D + d[None, :], mask=mask, other=0.0)
        own = head * padded + n
        at = own[:, None] * D + d[None, :]
        if LINEAR != 0:  # all loads come before the first store, which none may pass
            q = tl.load(Q + at, mask=live[None, :], other=0.0)
        lse = tl.load(Lse + own)
        tl.store(DO + at, do, mask=live[None, :])
        sparse = out.to(tl.float32)
        if LINEAR != 0:
            is_pinned = LINEAR == 2 and i // STEPS < pinned  # such a query block has no marginal blocks
            sparse -= tl.where(is_pinned, 0.0, mu_proj)[None, :]
        delta = tl.sum(do.to(tl.float32) * sparse, 1)
        if LINEAR != 0:
            do = tl.where(is_pinned, tl.zeros_like(do), do)
            dsum += tl.sum(do.to(tl.float32), 0)
            features = _phi(q.to(tl.float32), live[None, :], SOFTMAX, 1)
            rounded = features.to(dtype)
            inverse = 1.0 / tl.maximum(tl.sum(features * total[None, :], 1), 1e-37)
            u = (do.to(tl.float32) * inverse[:, None]).to(dtype)
            outer = tl.dot(tl.trans(rounded), u, outer, input_precision=PRECISION)
            along = tl.sum(u.to(tl.float32) * tl.dot(rounded, state, input_precision=PRECISION), 1)
            delta -= along
            dnorm = -along * inverse
            dtotal += tl.sum(features * dnorm[:, None], 0)
            grad = tl.dot(u, tl.trans(state), input_precision=PRECISION) + dnorm[:, None] * total[None, :]
            tl.store(DQ + at, phi_backward(features, grad, SOFTMAX).to(dtype), mask=live[None, :])
        tl.store(lse_place(Stats, own), lse)
        tl.store(lse_place(Stats, own) + 64, delta)
    if LINEAR != 0:
        scale: tl.constexpr = 1.0 if LINEAR == 1 else 1.0 / BLOCK_Q
        part = head * tl.num_programs(0) + split
        tl.store(E + part * D * D + square, (outer * scale).to(E.dtype.element_ty), mask=both)
        tl.store(DTotal + part * D + d, dtotal * scale, mask=live)
        tl.store(DSum + part * D + d, dsum, mask=live)


@triton.jit(do_not_specialize=["N", "per_split"])
def _dproj_kernel(
    GradOut, Linear, DProj, N, H, per_split, stride_b, stride_h, stride_n,
    D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums of dO^T l over `per_split` tiles of one head: all that is needed when only Proj learns."""
    split = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, DP)
    live = d < D
    dproj = tl.zeros([DP, DP], tl.float32)
    for i in range(0, per_split):
        n = ((split * per_split + i) * TILE + tl.arange(0, TILE)).to(tl.int64)
        mask = (n < N)[:, None] & live[None, :]
        at = head // H * stride_b + head % H * stride_h + n * stride_n
        do = tl.load(GradOut + at[:, None] + d[None, :], mask=mask, other=0.0)
        linear = tl.load(Linear + ((head // H * N + n) * H + head % H)[:, None] * D + d[None, :], mask=mask, other=0.0)
        dproj = tl.dot(tl.trans(do), linear, dproj, input_precision=PRECISION)
    part = head * tl.num_programs(0) + split
    tl.store(DProj + (part * D + d)[:, None] * D + d[None, :], dproj, mask=live[:, None] & live[None, :])
