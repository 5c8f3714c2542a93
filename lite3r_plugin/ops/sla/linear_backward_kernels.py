"""Gradients of the linear branch, and what the softmax's backward needs of each query.

With f = phi(q), N H and N Z the linear state, n = f Z, l = f H / n and O_linear = l Proj^T, per query:

    u = dO / n      E = sum f^T u      dH = E Proj      dProj = E^T H      dZ = -sum f (dO . O_linear) / n
    df = u (H Proj^T)^T - Z (dO . O_linear) / n
    delta = dO . O_sparse = dO . O - dO . O_linear      so O_sparse need not be kept

H and Z of a query block leave out its critical blocks when the branch is marginal; then H differs between the queries, and
dProj = sum dO^T l. The output of the branch is nearly the same for all queries, and gradients are small differences. Hence
values are centred: H stands for H - Z mu and O_linear for O_linear - mu Proj^T, mu the mean value, wherever that changes no
result but rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backward_kernels import _rows_of, phi_backward
from .linear_kernels import _phi


@triton.jit(do_not_specialize=["N", "rows", "kept", "pinned", "per_split"])
def _rows_kernel(
    Q, K, V, Out, GradOut, Order, Indices, State, Total, Mu, Proj, MuProj, DO, Delta, DQ, DNum, DNorm, E, DTotal, DProj,
    N, padded, H, rows, kept, pinned, per_split, stride_b, stride_h, stride_n,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    LINEAR: tl.constexpr, SOFTMAX: tl.constexpr, ORDERED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dO in token order, delta, and all gradients of the linear branch over `per_split` query blocks of one head.

    State is H Proj^T over all tokens, or H if the branch is marginal. Writes DO and Delta; with the linear branch its share of
    DQ and partial sums for E and DTotal; if it is marginal also those of DProj, DNum = dO Proj / n and DNorm = -(dO . O_linear) / n.
    """
    STEPS: tl.constexpr = BLOCK_K // TILE_K
    split = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, DP)
    live = d < D
    both = live[:, None] & live[None, :]
    lanes = tl.arange(0, TILE_Q)
    keys = tl.arange(0, TILE_K)
    dtype: tl.constexpr = Q.dtype.element_ty
    square = d[:, None] * D + d[None, :]
    if LINEAR != 0:
        outer = tl.zeros([DP, DP], tl.float32)
        dtotal = tl.zeros([DP], tl.float32)
        mu_proj = tl.load(MuProj + head * D + d, mask=live, other=0.0)
    if LINEAR == 2:
        dproj = tl.zeros([DP, DP], tl.float32)
        mu = tl.load(Mu + head * D + d, mask=live, other=0.0)
    for row in range(split * per_split, tl.minimum((split + 1) * per_split, rows)):
        if LINEAR != 0:
            state = tl.load(State + head * D * D + square, mask=both, other=0.0)
            total = tl.load(Total + head * D + d, mask=live, other=0.0)
        if LINEAR == 2:
            near_state = tl.zeros([DP, DP], tl.float32)
            near_total = tl.zeros([DP], tl.float32)
            for i in range(0, tl.where(row < pinned, 0, kept * STEPS)):
                key = tl.load(Indices + (head * rows + row) * kept + i // STEPS) * BLOCK_K + i % STEPS * TILE_K
                features = _phi(_rows_of(K, head * padded + key, keys, d, D).to(tl.float32), live[None, :], SOFTMAX, 1)
                features = tl.where((key + keys < N)[:, None], features, 0.0).to(dtype)
                v = _rows_of(V, head * padded + key, keys, d, D)
                near_state = tl.dot(tl.trans(features), v, near_state, input_precision=PRECISION)
                near_total += tl.sum(features.to(tl.float32), 0)
            own_state = (state - (near_state - near_total[:, None] * mu[None, :]) / N).to(dtype)
            total -= near_total / N
            proj = tl.load(Proj + square, mask=both, other=0.0).to(dtype)
            state = tl.dot(own_state, tl.trans(proj), input_precision=PRECISION)
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
            delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
            if LINEAR != 0:
                if LINEAR == 2:  # a pinned query block has no marginal blocks
                    do = tl.where(row < pinned, tl.zeros_like(do), do)
                q = tl.load(Q + at, mask=live[None, :], other=0.0)
                features = _phi(q.to(tl.float32), live[None, :], SOFTMAX, 1)
                rounded = features.to(dtype)
                norm = tl.maximum(tl.sum(features * total[None, :], 1), 1e-37)
                branch = tl.dot(rounded, state.to(dtype), input_precision=PRECISION) / norm[:, None]
                along = tl.sum(do.to(tl.float32) * branch, 1)
                delta -= along + tl.sum(do.to(tl.float32) * mu_proj[None, :], 1)
                dnorm = -along / norm
                dtotal += tl.sum(features * dnorm[:, None], 0)
                u = (do.to(tl.float32) / norm[:, None]).to(dtype)
                outer = tl.dot(tl.trans(rounded), u, outer, input_precision=PRECISION)
                grad = tl.dot(u, tl.trans(state.to(dtype)), input_precision=PRECISION) + dnorm[:, None] * total[None, :]
                tl.store(DQ + at, phi_backward(features, grad, SOFTMAX).to(dtype), mask=live[None, :])
                if LINEAR == 2:
                    linear = tl.dot(rounded, own_state, input_precision=PRECISION) / norm[:, None] + mu[None, :]
                    dproj = tl.dot(tl.trans(do), linear.to(dtype), dproj, input_precision=PRECISION)
                    dnum = tl.dot(u, proj, input_precision=PRECISION)
                    tl.store(DNum + at, dnum.to(dtype), mask=live[None, :])
                    tl.store(DNorm + head * padded + n, dnorm)
            tl.store(Delta + head * padded + n, delta)
    part = head * tl.num_programs(0) + split
    if LINEAR != 0:
        tl.store(E + part * D * D + square, outer, mask=both)
        tl.store(DTotal + part * D + d, dtotal, mask=live)
    if LINEAR == 2:
        tl.store(DProj + part * D * D + square, dproj, mask=both)


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
