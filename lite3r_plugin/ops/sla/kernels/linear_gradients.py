"""Gradients of the linear branch, and what the softmax's backward needs of each query: launches of `linear_backward_kernels`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .backward_options import rows_options
from .kernels import Residuals
from .linear_backward_kernels import _dproj_kernel, _rows_kernel
from .linear_kernels import _precision
from .problem import Problem

PROGRAMS = 512  # of kernels that add up over many query blocks: enough to fill a GPU, few enough for little memory


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
        D=dim, DP=triton.next_power_of_2(dim), TILE=tile, PRECISION=_precision(grad),
        num_warps=4 if dim <= 64 else 8, num_stages=1 if grad.dtype == torch.float32 else 3,
    )  # fmt: skip
    return out.sum(0)


class Rows(NamedTuple):
    """What `_rows_kernel` makes of each query: dO in token order, the numbers of the softmax, and the gradients of the linear branch.

    `stats` FP32 holds lse of 64 queries, their delta, lse of the next 64, and so on. `dq` is the share of the linear branch.

    `e` and `dtotal` lead to the gradients of phi(k)^T v and phi(k) summed over all tokens, or over marginal blocks of the states
    of each query block, divided by `block_q`. `state` is what `e` belongs to, `dsum` sums of dO, `mu` the mean value.
    """

    do: Tensor
    stats: Tensor
    dq: Tensor
    e: Tensor
    dtotal: Tensor
    state: Tensor
    dsum: Tensor
    mu: Tensor


def by_rows(p: Problem, residuals: Residuals, out: Tensor, grad: Tensor) -> Rows:
    """One pass over the queries. Arguments as those of `backward.backward`."""
    batch, heads, padded, dim = p.q.shape
    rows = p.kv_indices.shape[-2]
    branch, marginal = p.linear != "none", p.linear == "marginal"
    per_split = -(-rows // max(1, PROGRAMS // (batch * heads))) if p.linear == "all" else 1
    splits = -(-rows // per_split)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(batch * heads, *shape, device=p.q.device, dtype=dtype)

    grad = _rows_contiguous(grad)
    do = torch.empty_like(p.q)
    stats = torch.empty(-(-batch * heads * padded // 64) * 128, device=p.q.device, dtype=torch.float32)
    dq = state = total = mu = e = dtotal = dsum = do
    if branch:
        assert residuals.state is not None
        assert residuals.total is not None
        state, total = residuals.state.flatten(0, -3), residuals.total.flatten(0, -2)
        dq, dtotal, dsum = torch.empty_like(p.q), empty(splits, dim), empty(splits, dim)
        # In BF16 the sums of each query block take half the memory. FP16 would lose those of small gradients.
        e = empty(splits, dim, dim, dtype=torch.bfloat16 if marginal and p.v.dtype == torch.bfloat16 else torch.float32)
        if marginal:
            assert residuals.mu is not None
            mu = residuals.mu
        else:
            mu = state.sum(-2) / total.sum(-1, keepdim=True)
            state = state - total[..., None] * mu[..., None, :]
    _rows_kernel[(splits, batch * heads)](
        p.q, out, grad, residuals.lse, do if p.order is None else p.order, state, total, mu, p.proj if branch else do,
        do, stats, dq, e, dtotal, dsum,
        p.tokens, padded, heads, rows, p.pinned, per_split, *grad.stride()[:3],
        D=dim, DP=triton.next_power_of_2(dim), BLOCK_Q=p.block_q, ORDERED=p.order is not None, **p.branch, **rows_options(p),
    )  # fmt: skip
    if p.linear == "all":
        e, dtotal = e.sum(1) / p.tokens, dtotal.sum(1) / p.tokens
    return Rows(do, stats, dq, e, dtotal, state, dsum, mu)


def proj_gradient(p: Problem, shared: Rows) -> Tensor:
    """Gradient ``[D, D]`` FP64 of Proj, of a call with a linear branch."""
    e, state = (x.flatten(0, -2) for x in (shared.e, shared.state))
    if p.linear == "marginal":
        dproj = p.block_q * proj_backward(e[None, None], state[None, None].to(e.dtype))
    else:
        # Products of D x D matrices in FP64: they cost nothing, and TF32 may be on for FP32.
        dproj = (e.double().mT @ state.double()) * p.tokens
    return dproj + shared.dsum.sum(1).double().mT @ shared.mu.double()


def _rows_contiguous(grad: Tensor) -> Tensor:
    return grad if grad.stride(-1) == 1 else grad.contiguous()
