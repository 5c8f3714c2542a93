"""Gradients of the linear branch, and what the softmax's backward needs of each query.

With f = phi(q), N H and N Z the linear state, n = f Z, l = f H / n and O_linear = l Proj^T, per query:

    u = dO / n      E = sum f^T u      dH = E Proj      dProj = E^T H      dZ = -sum f (dO . O_linear) / n
    df = u (H Proj^T)^T - Z (dO . O_linear) / n
    delta = dO . O_sparse = dO . O - dO . O_linear      so O_sparse need not be kept

The gradient of a score is p (dO . v - delta), and by way of the log-sum-exp p dlse: kernels take dlse from delta.

Over marginal blocks each query block has an H, Z, E, dH and dZ of its own. The output of the branch is nearly the same for all
queries, and gradients are small differences. Hence values are centred: H stands for H - Z mu and O_linear for O_linear - mu
Proj^T, mu the mean value, wherever that changes no result but rounding. What centring takes from E^T H is (sum dO)^T mu.
All that E Proj is needed for is linear in E, so Proj is applied last.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...sizes import power_of_2
from .backward_options import rows_options
from .forward import Residuals
from .linear import phi, precision
from .linear_pairs import PairGradients, Pairs, pairs_of
from .operands import Operands
from .softmax import host_rows, places
from .softmax_backward import lse_place, phi_backward

PROGRAMS = 512  # of kernels that add up over many query blocks: enough to fill a GPU, few enough for little memory


@triton.jit(do_not_specialize=["M", "rows", "pinned", "per_split"])
def _rows_kernel(
    Q, Out, GradOut, GradLse, Lse, Order, State, Total, Mu, Proj, DO, Stats, DQ, E, DTotal, DSum, Mask, Pairs, PairGrads,
    M, padded, H, rows, pinned, per_split, stride_b, stride_h, stride_n,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_Q: tl.constexpr, TILE_Q: tl.constexpr,
    LINEAR: tl.constexpr, SOFTMAX: tl.constexpr, ORDERED: tl.constexpr, OF_LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dO in token order, delta, and what the linear branch needs, of `per_split` query blocks of one head; programs [splits, B * H].

    Reads, with D numbers in a row:

        Q                [B * H, padded, D] in token order
        Out              [B, M, H, D] in host order
        GradOut          [B, H, M, D] in host order, of strides stride_b, stride_h, stride_n and 1
        GradLse          [B, H, M] FP32 in host order, of the natural logarithm (OF_LSE)
        Lse              [B * H, padded] FP32
        Order            [M]: the host row of each query (ORDERED)
        State, Total     H and Z, [owners, D, D] and [owners, D]; owners are heads, over marginal blocks query blocks of heads
        Mu, Proj         [B * H, D] FP32 and [D, D]

    Writes:

        DO               [B * H, padded, D]: dO in token order, zeros after M tokens
        Stats            FP32: lse of 64 queries, their delta (less the gradient of lse), lse of the next 64, and so on
        DQ               [B * H, padded, D]: the share of the linear branch
        E, DTotal        [B * H, splits, D, D] and [B * H, splits, D]: partial sums of E and dZ; over marginal blocks, where `per_split`
                         is 1, those of each query block, divided by BLOCK_Q
        DSum             [B * H, splits, D] FP32: sums of dO

    All but GradOut are contiguous; Mask is a `KernelMask`, or None; Pairs and PairGrads are those of `linear_pairs.py`, or None. What
    follows Order is used with a linear branch alone (LINEAR as in `_sparse_linear_kernel`), but for DO, Stats and Mask. `rows` query
    blocks, of which the first `pinned` have no marginal blocks.
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
        place = places(Order, n, M, ORDERED)
        mask = (n < M)[:, None] & live[None, :]
        at = head // H * stride_b + head % H * stride_h + place * stride_n
        do = tl.load(GradOut + at[:, None] + d[None, :], mask=mask, other=0.0).to(dtype)
        out = tl.load(Out + host_rows(place, head, H, M)[:, None] * D + d[None, :], mask=mask, other=0.0)
        own = head * padded + n
        at = own[:, None] * D + d[None, :]
        if LINEAR != 0:  # all loads come before the first store, which none may pass
            q = tl.load(Q + at, mask=live[None, :], other=0.0)
        lse = tl.load(Lse + own)
        if OF_LSE:
            grad_lse = tl.load(GradLse + head * M + place, mask=n < M, other=0.0)
        tl.store(DO + at, do, mask=live[None, :])
        sparse = out.to(tl.float32)
        if LINEAR != 0:
            is_pinned = LINEAR == 2 and i // STEPS < pinned  # such a query block has no marginal blocks
            if Pairs is not None:  # of single queries
                pair_norm = tl.load(Pairs.norm + own)
                is_pinned = (tl.sum(phi(q.to(tl.float32), live[None, :], SOFTMAX, 1) * total[None, :], 1) + pair_norm == 0.0)[:, None]
                sparse -= tl.where(is_pinned, 0.0, mu_proj[None, :])
            else:
                if Mask is not None:
                    is_pinned = tl.load(Mask.means + i // STEPS) == 0
                sparse -= tl.where(is_pinned, 0.0, mu_proj)[None, :]
        delta = tl.sum(do.to(tl.float32) * sparse, 1)
        if LINEAR != 0:
            do = tl.where(is_pinned, tl.zeros_like(do), do)
            dsum += tl.sum(do.to(tl.float32), 0)
            features = phi(q.to(tl.float32), live[None, :], SOFTMAX, 1)
            rounded = features.to(dtype)
            norm = tl.sum(features * total[None, :], 1)
            if Pairs is not None:
                norm += pair_norm
            inverse = 1.0 / tl.maximum(norm, 1e-37)
            u = (do.to(tl.float32) * inverse[:, None]).to(dtype)
            outer = tl.dot(tl.trans(rounded), u, outer, input_precision=PRECISION)
            along = tl.sum(u.to(tl.float32) * tl.dot(rounded, state, input_precision=PRECISION), 1)
            if Pairs is not None:
                pairs = tl.load(Pairs.numerator + at, mask=live[None, :], other=0.0)
                a = tl.dot(u, proj.to(dtype), input_precision=PRECISION)
                along += tl.sum(a * pairs.to(tl.float32), 1)
            delta -= along
            dnorm = -along * inverse
            dtotal += tl.sum(features * dnorm[:, None], 0)
            grad = tl.dot(u, tl.trans(state), input_precision=PRECISION) + dnorm[:, None] * total[None, :]
            tl.store(DQ + at, phi_backward(features, grad, SOFTMAX).to(dtype), mask=live[None, :])
        if Mask is not None:
            lse = tl.where(lse == float("-inf"), 0.0, lse)  # of a query that sees nothing, whose scores are all hidden
            if Pairs is not None:
                scale_of_pairs = tl.load(PairGrads.scales + split)
                tl.store(PairGrads.u + at, u, mask=live[None, :])
                tl.store(PairGrads.a + at, (a * scale_of_pairs).to(dtype), mask=live[None, :])
                tl.store(PairGrads.b + own, dnorm * scale_of_pairs)
        tl.store(lse_place(Stats, own), lse)
        if OF_LSE:
            delta -= grad_lse
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
    """Partial sums of dO^T l over `per_split` tiles of one head: all that is needed when only Proj learns; programs [splits, B * H].

    GradOut ``[B, H, N, D]`` has strides stride_b, stride_h, stride_n and 1; Linear ``[B, N, H, D]`` (l) and DProj
    ``[B * H, splits, D, D]`` FP32 are contiguous. Both are in host order.
    """
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


def proj_backward(grad: Tensor, linear: Tensor) -> Tensor:
    """Gradient ``[D, D]`` FP32 of Proj alone, from that of the output ``[B, H, N, D]`` and `Residuals.linear`: one pass."""
    grad = _rows_contiguous(grad)
    batch, heads, tokens, dim = grad.shape
    tile = 64
    tiles = -(-tokens // tile)
    per_split = -(-tiles // min(tiles, max(1, PROGRAMS // (batch * heads))))
    splits = -(-tiles // per_split)
    out = torch.empty(batch * heads * splits, dim, dim, device=grad.device, dtype=torch.float32)
    _dproj_kernel[(splits, batch * heads)](
        grad, linear, out, tokens, heads, per_split, *grad.stride()[:3],
        D=dim, DP=power_of_2(dim), TILE=tile, PRECISION=precision(grad),
        num_warps=4 if dim <= 64 else 8, num_stages=1 if grad.dtype == torch.float32 else 3,
    )  # fmt: skip
    return out.sum(0)


class Rows(NamedTuple):
    """What `_rows_kernel` makes of each query: dO in token order, the numbers of the softmax, and the gradients of the linear branch.

    `stats` FP32 holds lse of 64 queries, their delta, lse of the next 64, and so on. `dq` is the share of the linear branch.

    `e` and `dtotal` lead to the gradients of phi(k)^T v and phi(k) summed over all tokens, or over marginal blocks of the states
    of each query block, divided by `block_q`. `state` is what `e` belongs to, `dsum` sums of dO, `mu` the mean value. `pairs` and
    `pair_grads` are those of a branch over all tokens with a mask.
    """

    do: Tensor
    stats: Tensor
    dq: Tensor
    e: Tensor
    dtotal: Tensor
    state: Tensor
    dsum: Tensor
    mu: Tensor
    pairs: Pairs | None
    pair_grads: PairGradients | None


def by_rows(operands: Operands, residuals: Residuals, out: Tensor, grad: Tensor, grad_lse: Tensor | None) -> Rows:
    """One pass over the queries. Arguments as those of `backward.backward`."""
    batch, heads, padded, dim = operands.q.shape
    rows = operands.kv_indices.shape[-2]
    branch, marginal, pairs = operands.linear != "none", operands.per_row, None
    pair_grads = None
    per_split = -(-rows // max(1, PROGRAMS // (batch * heads))) if branch and not marginal else 1
    splits = -(-rows // per_split)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(batch * heads, *shape, device=operands.q.device, dtype=dtype)

    grad = _rows_contiguous(grad)
    do = torch.empty_like(operands.q)
    stats = torch.empty(-(-batch * heads * padded // 64) * 128, device=operands.q.device, dtype=torch.float32)
    dq = state = total = mu = e = dtotal = dsum = do
    if branch:
        assert residuals.state is not None
        assert residuals.total is not None
        state, total = residuals.state.flatten(0, -3), residuals.total.flatten(0, -2)
        dq, dtotal, dsum = torch.empty_like(operands.q), empty(splits, dim), empty(splits, dim)
        # In BF16 the sums of each query block take half the memory. FP16 would lose those of small gradients.
        e = empty(splits, dim, dim, dtype=torch.bfloat16 if marginal and operands.v.dtype == torch.bfloat16 else torch.float32)
        if marginal:
            assert residuals.mu is not None
            mu = residuals.mu
            if operands.linear == "all":
                pairs, pair_grads = pairs_of(operands, mu), PairGradients.empty(operands)
        else:
            mu = state.sum(-2) / total.sum(-1, keepdim=True)
            state = state - total[..., None] * mu[..., None, :]
    _rows_kernel[(splits, batch * heads)](
        operands.q, out, grad, do if grad_lse is None else grad_lse, residuals.lse, do if operands.order is None else operands.order,
        state, total, mu, operands.proj if branch else do,
        do, stats, dq, e, dtotal, dsum, operands.mask, pairs, pair_grads,
        operands.queries, padded, heads, rows, operands.pinned, per_split, *grad.stride()[:3],
        D=dim, DP=power_of_2(dim), BLOCK_Q=operands.block_q, ORDERED=operands.order is not None,
        OF_LSE=grad_lse is not None, **operands.branch,
        **rows_options(operands),
    )  # fmt: skip
    if branch and not marginal:
        e, dtotal = e.sum(1) / operands.tokens, dtotal.sum(1) / operands.tokens
    return Rows(do, stats, dq, e, dtotal, state, dsum, mu, pairs, pair_grads)


def proj_gradient(operands: Operands, shared: Rows) -> Tensor:
    """Gradient ``[D, D]`` FP64 of Proj, of a call with a linear branch."""
    e, state = (x.flatten(0, -2) for x in (shared.e, shared.state))
    if operands.per_row:
        dproj = operands.block_q * proj_backward(e[None, None], state[None, None].to(e.dtype))
    else:
        # Products of D x D matrices in FP64: they cost nothing, and TF32 may be on for FP32.
        dproj = (e.double().mT @ state.double()) * operands.tokens
    if shared.pairs is not None and shared.pair_grads is not None:
        dproj = dproj + proj_backward(shared.pair_grads.u[:, None], shared.pairs.numerator[:, :, None])
    return dproj + shared.dsum.sum(1).double().mT @ shared.mu.double()


def _rows_contiguous(grad: Tensor) -> Tensor:
    return grad if grad.stride(-1) == 1 else grad.contiguous()
