"""Gradients of the linear branch, and what the softmax's backward needs of each query.

With f = phi(q), N H and N Z the linear state, n = f Z, l = f H / n and O_linear = l Proj^T, per query:

    u = dO / n      E = sum f^T u      dH = E Proj      dProj = E^T H      dZ = -sum f (dO . O_linear) / n
    df = u (H Proj^T)^T - Z (dO . O_linear) / n
    delta = dO . O_sparse = dO . O - dO . O_linear      so O_sparse need not be kept

Over marginal blocks each query block has an H, Z, E, dH and dZ of its own. The output of the branch is nearly the same for all
queries, and gradients are small differences. Hence values are centred: H stands for H - Z mu and O_linear for O_linear - mu
Proj^T, mu the mean value, wherever that changes no result but rounding. What centring takes from E^T H is (sum dO)^T mu.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backward_kernels import lse_place, phi_backward
from .linear_kernels import _phi


@triton.jit(do_not_specialize=["N", "rows", "pinned", "per_split"])
def _rows_kernel(
    Q, Out, GradOut, Lse, Order, State, Total, Mu, Proj, MuProj, DO, Stats, DQ, DState, DTotal, DProj,
    N, padded, H, rows, pinned, per_split, stride_b, stride_h, stride_n,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_Q: tl.constexpr, TILE_Q: tl.constexpr,
    LINEAR: tl.constexpr, SOFTMAX: tl.constexpr, ORDERED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dO in token order, delta, and all gradients of the linear branch over `per_split` query blocks of one head.

    Writes DO and Stats (lse and delta), and with the linear branch its share of DQ. Over all tokens State is H Proj^T, DState gets
    partial sums for E and DTotal those of dZ. Over marginal blocks State is the H of each query block, DState gets its dH / BLOCK_Q,
    DTotal its dZ / BLOCK_Q, which keeps them in the range of FP16, and DProj partial sums; DState may be State and DTotal Total.
    """
    split = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, DP)
    live = d < D
    both = live[:, None] & live[None, :]
    lanes = tl.arange(0, TILE_Q)
    dtype: tl.constexpr = Q.dtype.element_ty
    square = d[:, None] * D + d[None, :]
    if LINEAR == 1:
        state = tl.load(State + head * D * D + square, mask=both, other=0.0).to(dtype)
        total = tl.load(Total + head * D + d, mask=live, other=0.0)
        outer = tl.zeros([DP, DP], tl.float32)
        dtotal = tl.zeros([DP], tl.float32)
    if LINEAR != 0:
        mu_proj = tl.load(MuProj + head * D + d, mask=live, other=0.0)
    if LINEAR == 2:
        dproj = tl.zeros([DP, DP], tl.float32)
        dsum = tl.zeros([DP], tl.float32)
    for row in range(split * per_split, tl.minimum((split + 1) * per_split, rows)):
        if LINEAR == 2:
            block = head * rows + row
            own_state = tl.load(State + block * D * D + square, mask=both, other=0.0)
            total = tl.load(Total + block * D + d, mask=live, other=0.0)
            proj = tl.load(Proj + square, mask=both, other=0.0).to(dtype)
            state = tl.dot(own_state, tl.trans(proj), input_precision=PRECISION).to(dtype)
            outer = tl.zeros([DP, DP], tl.float32)
            dtotal = tl.zeros([DP], tl.float32)
        for tile in range(0, BLOCK_Q // TILE_Q):
            n = row * BLOCK_Q + tile * TILE_Q + lanes
            inside = n < N
            to = n
            if ORDERED:
                to = tl.load(Order + n, mask=inside, other=0)
            to = to.to(tl.int64)
            mask = inside[:, None] & live[None, :]
            at = head // H * stride_b + head % H * stride_h + to * stride_n
            do = tl.load(GradOut + at[:, None] + d[None, :], mask=mask, other=0.0).to(dtype)
            out = tl.load(Out + ((head // H * N + to) * H + head % H)[:, None] * D + d[None, :], mask=mask, other=0.0)
            at = (head * padded + n)[:, None] * D + d[None, :]
            tl.store(DO + at, do, mask=live[None, :])
            sparse = out.to(tl.float32)
            if LINEAR != 0:
                sparse -= tl.where(LINEAR == 2 and row < pinned, 0.0, mu_proj)[None, :]
            delta = tl.sum(do.to(tl.float32) * sparse, 1)
            if LINEAR != 0:
                if LINEAR == 2:  # a pinned query block has no marginal blocks
                    do = tl.where(row < pinned, tl.zeros_like(do), do)
                q = tl.load(Q + at, mask=live[None, :], other=0.0)
                features = _phi(q.to(tl.float32), live[None, :], SOFTMAX, 1)
                rounded = features.to(dtype)
                inverse = 1.0 / tl.maximum(tl.sum(features * total[None, :], 1), 1e-37)
                u = do.to(tl.float32) * inverse[:, None]
                along = tl.sum(u * tl.dot(rounded, state, input_precision=PRECISION), 1)
                delta -= along
                dnorm = -along * inverse
                dtotal += tl.sum(features * dnorm[:, None], 0)
                u = u.to(dtype)
                outer = tl.dot(tl.trans(rounded), u, outer, input_precision=PRECISION)
                grad = tl.dot(u, tl.trans(state), input_precision=PRECISION) + dnorm[:, None] * total[None, :]
                tl.store(DQ + at, phi_backward(features, grad, SOFTMAX).to(dtype), mask=live[None, :])
                if LINEAR == 2:
                    dsum += tl.sum(do.to(tl.float32), 0)
            place = lse_place(Stats, head * padded + n)
            tl.store(place, tl.load(Lse + head * padded + n))
            tl.store(place + 64, delta)
        if LINEAR == 2:
            e = outer.to(dtype)
            # Loaded again: kept in registers through the loop, they would push others out.
            own_state = tl.load(State + block * D * D + square, mask=both, other=0.0)
            proj = tl.load(Proj + square, mask=both, other=0.0).to(dtype)
            dproj = tl.dot(tl.trans(e), own_state, dproj, input_precision=PRECISION)
            dstate = tl.dot(e, proj, input_precision=PRECISION) / BLOCK_Q
            tl.store(DState + block * D * D + square, dstate.to(dtype), mask=both)
            tl.store(DTotal + block * D + d, dtotal / BLOCK_Q, mask=live)
    part = head * tl.num_programs(0) + split
    if LINEAR == 1:
        tl.store(DState + part * D * D + square, outer, mask=both)
        tl.store(DTotal + part * D + d, dtotal, mask=live)
    if LINEAR == 2:
        mu = tl.load(Mu + head * D + d, mask=live, other=0.0)
        tl.store(DProj + part * D * D + square, dproj + dsum[:, None] * mu[None, :], mask=both)


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
