"""Gradients of the operator over ordered, padded tokens: the launches of the backward kernels.

The twin of what autograd makes of `naive.sparse_linear_attention`. Only what is asked for is computed, nothing waits for
the GPU, and no sum depends on the order in which programs run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..block_map.transpose_kernels import by_key_block
from .backward_kernels import _dkv_kernel, _dmeans_kernel, _dq_kernel
from .backward_options import dkv_options, dmeans_options, dq_options, rows_options
from .kernels import LINEAR, Residuals
from .linear_backward_kernels import _dproj_kernel, _rows_kernel
from .linear_kernels import LOG2_E, _precision
from .marginal_kernels import head_groups, marginal_states, marginal_sums
from .softmax_kernels import far_blocks

PROGRAMS = 512  # of kernels that add up over many query blocks: enough to fill a GPU, few enough for little memory


class Problem(NamedTuple):
    """One call of the operator, as its forward pass saw it.

    Attributes:
        q, k, v: ``[B, H, padded, D]`` contiguous, zeros after the first `tokens` tokens.
        kv_indices, critical: The critical key blocks, as indices and as a bit set.
        bits: A bit for each key block that is not marginal.
        negligible: Key blocks that are neither critical nor marginal for a query block that is not pinned.
        means: Mean keys and values ``[B, H, ceil(tokens / block_k), D]`` (`backward` pads them), or None without block means.
        proj: ``[D, D]``, or None without a linear branch.
        order: ``[N]`` int32, or None.
        tokens, pinned: N, and the number of query blocks that attend to all keys.
        scale, linear, feature_map, block_q, block_k: As in the naive twin.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    kv_indices: Tensor
    critical: Tensor
    bits: Tensor
    negligible: int
    means: tuple[Tensor, Tensor] | None
    proj: Tensor | None
    order: Tensor | None
    tokens: int
    pinned: int
    scale: float
    linear: str
    feature_map: str
    block_q: int
    block_k: int

    @property
    def columns(self) -> int:
        """Number of key blocks."""
        return -(-self.tokens // self.block_k)

    @property
    def marginal(self) -> int:
        """Key blocks that are marginal for a query block that is not pinned."""
        return self.columns - self.kv_indices.shape[-1] - self.negligible


class Gradients(NamedTuple):
    """Gradients of `Problem`'s tensors: q, k, v ``[B, H, padded, D]`` in v's dtype, those of block means included; proj FP32."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    proj: Tensor | None


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


def backward(problem: Problem, residuals: Residuals, out: Tensor, grad: Tensor, *, needs_q: bool, needs_kv: bool) -> Gradients:
    """Gradients of q, of k and v, and (if there is a linear branch) of Proj.

    Args:
        problem, residuals: The call, with `Residuals.lse`.
        out: Its output, ``[B, H, N, D]``, a view of contiguous ``[B, N, H, D]``, in host order.
        grad: The gradient of `out`, ``[B, H, N, D]``, any strides.
        needs_q, needs_kv: Whether the gradient of q, and those of k and v, are wanted.
    """
    rows = problem.kv_indices.shape[-2]
    problem = problem._replace(pinned=min(problem.pinned, rows))
    if problem.marginal == 0 or problem.pinned == rows:
        problem = problem._replace(means=None, linear="none" if problem.linear == "marginal" else problem.linear)
    if problem.means is not None:
        tile = max(options(problem)["TILE_K"] for options in (dq_options, dmeans_options))
        problem = problem._replace(means=far_blocks(*problem.means, tile, problem.v.dtype))
    shared = _by_rows(problem, residuals, out, _rows_contiguous(grad))
    dq = _query_gradient(problem, shared) if needs_q else None
    dk, dv = _key_gradients(problem, shared) if needs_kv else (None, None)
    dproj = torch.zeros_like(problem.proj, dtype=torch.float32) if shared.dproj is None and problem.proj is not None else shared.dproj
    return Gradients(dq, dk, dv, dproj)


class _Rows(NamedTuple):
    """What `_rows_kernel` makes of each query: dO in token order, the numbers of the softmax, and the gradients of the linear branch.

    `stats` FP32 holds lse of 64 queries, their delta, lse of the next 64, and so on.

    `dstate` and `dtotal` are of phi(k)^T v and phi(k) summed over all tokens, or over marginal blocks those of the states of each
    query block, divided by `block_q`; `mu` is the mean value.
    """

    do: Tensor
    stats: Tensor
    dq: Tensor
    dstate: Tensor
    dtotal: Tensor
    mu: Tensor
    dproj: Tensor | None


def _by_rows(p: Problem, residuals: Residuals, out: Tensor, grad: Tensor) -> _Rows:
    batch, heads, padded, dim = p.q.shape
    rows = p.kv_indices.shape[-2]
    branch, marginal = p.linear != "none", p.linear == "marginal"
    per_split = -(-rows // max(1, PROGRAMS // (batch * heads))) if branch else 1
    splits = -(-rows // per_split)

    def empty(*shape: int) -> Tensor:
        return torch.empty(batch * heads, *shape, device=p.q.device, dtype=torch.float32)

    do, dq = torch.empty_like(p.q), torch.empty_like(p.q)
    stats = torch.empty(-(-batch * heads * padded // 64) * 128, device=p.q.device, dtype=torch.float32)
    state = total = source = dstate = dtotal = dproj = mu = proj = mu_proj = p.q
    if branch:
        assert p.proj is not None
        proj = p.proj.double()  # Products of D x D matrices in FP64: they cost nothing, and TF32 may be on for FP32.
    if marginal:
        mu = p.v.sum(2, dtype=torch.float32).flatten(0, 1) / p.tokens  # padding is zero
        mu_proj = mu.double() @ proj.mT
        source, total = marginal_states(
            p.k, p.v, p.bits, tokens=p.tokens, marginal=p.marginal, feature_map=p.feature_map, block_k=p.block_k, mu=mu
        )
        dstate, dtotal = source, total  # overwritten, each by the program that has read it
        dproj = empty(splits, dim, dim)
    elif branch:
        assert residuals.state is not None
        assert residuals.total is not None
        state, total = residuals.state.double().flatten(0, 1), residuals.total.double().flatten(0, 1)
        mu = state.sum(-2) / total.sum(-1, keepdim=True)
        mu_proj = mu @ proj.mT
        source = ((state - total[..., None] * mu[..., None, :]) @ proj.mT).float()
        dstate, dtotal = empty(splits, dim, dim), empty(splits, dim)
    _rows_kernel[(splits, batch * heads)](
        p.q, out, grad, residuals.lse, p.q if p.order is None else p.order,
        source, *((x.float() for x in (total, mu, proj, mu_proj)) if branch else (p.q,) * 4), do, stats, dq, dstate, dtotal, dproj,
        p.tokens, padded, heads, rows, p.pinned, per_split, *grad.stride()[:3],
        D=dim, DP=triton.next_power_of_2(dim), BLOCK_Q=p.block_q, ORDERED=p.order is not None, **_branch(p), **rows_options(p),
    )  # fmt: skip
    if not branch:
        return _Rows(do, stats, dq, p.q, p.q, p.q, None)
    if marginal:
        return _Rows(do, stats, dq, dstate, dtotal, mu, dproj.sum((0, 1)))
    outer, dtotal = dstate.sum(1).double(), dtotal.sum(1)
    return _Rows(
        do, stats, dq, (outer @ proj / p.tokens).float(), dtotal / p.tokens, mu.float(), (outer.mT @ state).sum(0).float()
    )  # fmt: skip


def _query_gradient(p: Problem, shared: _Rows) -> Tensor:
    batch, heads, padded, dim = p.q.shape
    rows, kept = p.kv_indices.shape[-2:]
    columns = p.columns
    # A pinned query block attends to all keys: cut, lest its program runs on when all others are done.
    per_split = max(1, min(columns, 2 * kept))
    splits = -(-columns // per_split)
    partial = torch.empty(batch, heads, p.pinned, splits, p.block_q, dim, device=p.q.device, dtype=torch.float32)
    dq = shared.dq
    options = dq_options(p)
    far = p.means or (p.q, p.q)
    everything = torch.arange(columns, device=p.q.device, dtype=torch.int32) if p.pinned else p.kv_indices
    _dq_kernel[(batch * heads * (p.pinned * splits + rows - p.pinned) * (p.block_q // options["TILE_Q"]),)](
        p.q, p.k, p.v, shared.do, shared.stats, p.kv_indices, everything, p.bits, *far, dq, partial,
        p.tokens, padded, rows, columns, kept, far[0].shape[2], p.bits.shape[-1], p.pinned, splits, per_split,
        p.scale, p.scale * LOG2_E.value,
        **_sizes(p), MEANS=p.means is not None, ADD=p.linear != "none", PRECISION=_precision(p.q), **options,
    )  # fmt: skip
    if p.pinned:
        first = dq[:, :, : p.pinned * p.block_q]
        total = partial.sum(3).flatten(2, 3)
        first.copy_(total + first if p.linear != "none" else total)
    return dq


def _key_gradients(p: Problem, shared: _Rows) -> tuple[Tensor, Tensor]:
    batch, heads, padded, dim = p.q.shape
    columns, kept = p.columns, p.kv_indices.shape[-1]
    work = by_key_block(p.critical, columns=columns, kept=kept, pinned=p.pinned)
    slots = work.early_columns.shape[-1]
    mean_grads = _mean_gradients(p, shared) if p.means is not None else (p.q, p.q)
    early = torch.empty(2, batch, heads, slots, p.block_k, dim, device=p.q.device, dtype=torch.float32)
    dk, dv = torch.empty_like(p.k), torch.empty_like(p.v)

    def launch(is_early: bool, of_heads: range, dstate: Tensor, dtotal: Tensor) -> None:
        options = dkv_options(p)
        programs = len(of_heads) * (slots if is_early else columns) * (p.block_k // options["TILE_K"])
        _dkv_kernel[(programs,)](
            p.q, p.k, p.v, shared.do, shared.stats, work.rows, work.starts, work.early_starts, work.early_columns,
            *early, *mean_grads, dstate, dtotal, shared.mu, dk, dv,
            p.tokens, padded, columns, work.rows.shape[-1], slots, work.part, of_heads.start, p.scale, p.scale * LOG2_E.value,
            **_sizes(p), EARLY=is_early, MEANS=p.means is not None, **_branch(p), **options,
        )  # fmt: skip

    if slots:
        launch(True, range(batch * heads), shared.dstate, shared.dtotal)
    if p.linear == "marginal":
        for some in head_groups(batch * heads, columns, p.v):
            launch(False, range(some.start, some.stop), *_block_gradients(p, shared, some))
    else:
        launch(False, range(batch * heads), shared.dstate, shared.dtotal)
    if padded > columns * p.block_k:
        dk[:, :, columns * p.block_k :] = dv[:, :, columns * p.block_k :] = 0
    return dk, dv


def _block_gradients(p: Problem, shared: _Rows, heads: slice) -> tuple[Tensor, Tensor]:
    """Gradients of phi(k)^T v ``[heads, columns, D, D]`` and phi(k) ``[heads, columns, D]`` of each key block."""
    bits, dstate, dtotal = (x[heads] for x in (p.bits.flatten(0, 1), shared.dstate, shared.dtotal))
    into = dstate.new_empty(len(bits), p.columns, *dstate.shape[2:]), dtotal.new_empty(len(bits), p.columns, dtotal.shape[-1])
    marginal_sums(bits, dstate, dtotal, into, columns=p.columns, scale=p.block_q / (p.marginal * p.block_k), transposed=True)
    return into


def _mean_gradients(p: Problem, shared: _Rows) -> tuple[Tensor, Tensor]:
    """Gradients of the mean keys and values, ``[B * H, columns, D]`` FP32."""
    assert p.means is not None
    batch, heads, padded, dim = p.q.shape
    rows, columns = p.kv_indices.shape[-2], p.columns
    options = dmeans_options(p)
    tiles = -(-columns // options["TILE_K"])
    per_split = -(-(rows - p.pinned) // max(1, 4 * PROGRAMS // (tiles * batch * heads)))
    splits = -(-(rows - p.pinned) // per_split)
    dk, dv = torch.empty(2, batch * heads, splits, columns, dim, device=p.q.device, dtype=torch.float32)
    _dmeans_kernel[(tiles, splits, batch * heads)](
        p.q, *p.means, shared.do, shared.stats, p.bits, dk, dv,
        p.tokens, padded, rows, columns, p.means[0].shape[2], p.bits.shape[-1], p.pinned, per_split, p.scale * LOG2_E.value,
        **_sizes(p), PRECISION=_precision(p.q), **options,
    )  # fmt: skip
    return dk.sum(1).mul_(p.scale), dv.sum(1)


def _sizes(p: Problem) -> dict[str, int]:
    dim = p.q.shape[-1]
    return dict(D=dim, DP=triton.next_power_of_2(dim), BLOCK_Q=p.block_q, BLOCK_K=p.block_k)


def _branch(p: Problem) -> dict[str, object]:
    return dict(LINEAR=LINEAR[p.linear], SOFTMAX=p.feature_map == "softmax", PRECISION=_precision(p.q))


def _rows_contiguous(grad: Tensor) -> Tensor:
    return grad if grad.stride(-1) == 1 else grad.contiguous()
