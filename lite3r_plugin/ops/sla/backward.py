"""Gradients of the operator over ordered, padded tokens: the launches of the backward kernels.

The twin of what autograd makes of `naive.sparse_linear_attention`. Only what is asked for is computed, nothing waits for
the GPU, and no sum depends on the order in which programs run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..backend import forked
from ..block_map.transpose_kernels import by_key_block
from .backward_kernels import MEAN_PARTS, _dkv_kernel, _dmeans_kernel, _dq_kernel
from .backward_options import dkv_options, dmeans_options, dq_options, rows_options
from .kernels import LINEAR, Residuals
from .linear_backward_kernels import _dproj_kernel, _rows_kernel
from .linear_kernels import LOG2_E, _precision
from .marginal_kernels import head_groups, marginal_sums
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
    """Gradients of `Problem`'s tensors in v's dtype, those of block means included; proj FP32.

    That of v is ``[B, H, N, D]`` in host order, a view of ``[B, N, H, D]``. Those of q and k are too, unless the norm or the
    rotation before attention is to be undone: then they are ``[B, H, padded, D]`` in token order, undefined after N tokens.
    """

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


def backward(
    problem: Problem, residuals: Residuals, out: Tensor, grad: Tensor, *, turned: bool, needs_q: bool, needs_kv: bool
) -> Gradients:
    """Gradients of q, of k and v, and (if there is a linear branch) of Proj.

    Args:
        problem, residuals: The call, with all of `Residuals` but `linear`.
        out: Its output, ``[B, H, N, D]``, a view of contiguous ``[B, N, H, D]``, in host order.
        grad: The gradient of `out`, ``[B, H, N, D]``, any strides.
        turned: Whether the gradients of q and k are wanted in token order.
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
    found = Gradients(
        _empty(problem, turned) if needs_q else None,
        _empty(problem, turned) if needs_kv else None,
        _empty(problem, False) if needs_kv else None,
        None if problem.proj is None else torch.zeros_like(problem.proj, dtype=torch.float32),
    )
    # Beside the gradient of q, the small launches of the rest, and the ends of large ones, leave nothing idle.
    with forked(problem.q.device) as aside:
        if found.q is not None:
            _query_gradient(problem, shared, found.q, turned)
        with aside:
            if found.proj is not None and problem.linear != "none":
                found.proj.copy_(_proj_gradient(problem, shared))
            if found.k is not None and found.v is not None:
                _key_gradients(problem, shared, found.k, found.v, turned)
    in_order = [x if x is None or turned else x.transpose(1, 2) for x in found[:2]]
    return Gradients(*in_order, None if found.v is None else found.v.transpose(1, 2), found.proj)


class _Rows(NamedTuple):
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


def _by_rows(p: Problem, residuals: Residuals, out: Tensor, grad: Tensor) -> _Rows:
    batch, heads, padded, dim = p.q.shape
    rows = p.kv_indices.shape[-2]
    branch, marginal = p.linear != "none", p.linear == "marginal"
    per_split = -(-rows // max(1, PROGRAMS // (batch * heads))) if p.linear == "all" else 1
    splits = -(-rows // per_split)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(batch * heads, *shape, device=p.q.device, dtype=dtype)

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
        D=dim, DP=triton.next_power_of_2(dim), BLOCK_Q=p.block_q, ORDERED=p.order is not None, **_branch(p), **rows_options(p),
    )  # fmt: skip
    if p.linear == "all":
        e, dtotal = e.sum(1) / p.tokens, dtotal.sum(1) / p.tokens
    return _Rows(do, stats, dq, e, dtotal, state, dsum, mu)


def _proj_gradient(p: Problem, shared: _Rows) -> Tensor:
    e, state = (x.flatten(0, -2) for x in (shared.e, shared.state))
    if p.linear == "marginal":
        dproj = p.block_q * proj_backward(e[None, None], state[None, None].to(e.dtype))
    else:
        # Products of D x D matrices in FP64: they cost nothing, and TF32 may be on for FP32.
        dproj = (e.double().mT @ state.double()) * p.tokens
    return dproj + shared.dsum.sum(1).double().mT @ shared.mu.double()


def _query_gradient(p: Problem, shared: _Rows, dq: Tensor, turned: bool) -> None:
    batch, heads, padded, dim = p.q.shape
    rows, kept = p.kv_indices.shape[-2:]
    columns = p.columns
    # A pinned query block attends to all keys: cut, lest its program runs on when all others are done.
    per_split = max(1, min(columns, 2 * kept))
    splits = -(-columns // per_split)
    partial = torch.empty(batch, heads, p.pinned, splits, p.block_q, dim, device=p.q.device, dtype=torch.float32)
    options = dq_options(p)
    far = p.means or (p.q, p.q)
    everything = torch.arange(columns, device=p.q.device, dtype=torch.int32) if p.pinned else p.kv_indices
    _dq_kernel[(batch * heads * (p.pinned * splits + rows - p.pinned) * (p.block_q // options["TILE_Q"]),)](
        p.q, p.k, p.v, shared.do, shared.stats, p.kv_indices, everything, p.bits, *far, shared.dq, dq if p.order is None else p.order,
        dq, partial,
        p.tokens, padded, heads, rows, columns, kept, far[0].shape[2], p.bits.shape[-1], p.pinned, splits, per_split,
        p.scale, p.scale * LOG2_E.value,
        **_sizes(p), MEANS=p.means is not None, ADD=p.linear != "none", HOST=not turned, ORDERED=p.order is not None,
        PRECISION=_precision(p.q), **options,
    )  # fmt: skip
    if p.pinned:
        count = min(p.pinned * p.block_q, p.tokens)
        first = partial.sum(3).flatten(2, 3)[:, :, :count]
        if p.linear != "none":
            first += shared.dq[:, :, :count]
        if turned or p.order is None:
            (dq if turned else dq.transpose(1, 2))[:, :, :count] = first
        else:
            dq.index_copy_(1, p.order[:count].long(), first.transpose(1, 2).to(dq.dtype))


def _key_gradients(p: Problem, shared: _Rows, dk: Tensor, dv: Tensor, turned: bool) -> None:
    batch, heads, padded, dim = p.q.shape
    columns, kept = p.columns, p.kv_indices.shape[-1]
    work = by_key_block(p.critical, columns=columns, kept=kept, pinned=p.pinned)
    slots = work.early_columns.shape[-1]
    mean_grads = _mean_gradients(p, shared) if p.means is not None else (p.q, p.q)
    early = torch.empty(2, batch, heads, slots, p.block_k, dim, device=p.q.device, dtype=torch.float32)
    nothing = p.q

    def launch(is_early: bool, of_heads: range, e: Tensor, dtotal: Tensor) -> None:
        options = dkv_options(p)
        programs = len(of_heads) * (slots if is_early else columns) * (p.block_k // options["TILE_K"])
        _dkv_kernel[(programs,)](
            p.q, p.k, p.v, shared.do, shared.stats, work.rows, work.starts, work.early_starts, work.early_columns, *early, *mean_grads,
            e, dtotal, shared.mu, *(nothing if x is None else x for x in (p.proj, p.order)), dk, dv,
            p.tokens, padded, heads, columns, work.rows.shape[-1], slots, work.part, mean_grads[0].shape[1], of_heads.start,
            p.scale, p.scale * LOG2_E.value,
            **_sizes(p), EARLY=is_early, MEANS=p.means is not None, HOST=not turned, ORDERED=p.order is not None, **_branch(p), **options,
        )  # fmt: skip

    if slots:
        launch(True, range(batch * heads), shared.e, shared.dtotal)
    if p.linear == "marginal":
        for some in head_groups(batch * heads, columns, p.v):
            launch(False, range(some.start, some.stop), *_block_gradients(p, shared, some))
    else:
        launch(False, range(batch * heads), shared.e, shared.dtotal)


def _block_gradients(p: Problem, shared: _Rows, heads: slice) -> tuple[Tensor, Tensor]:
    """`_Rows.e` and `_Rows.dtotal` of each key block: those of query blocks for which it is marginal, summed; of key `heads`."""
    bits, e, dtotal = (x[heads] for x in (p.bits.flatten(0, 1), shared.e, shared.dtotal))
    into = e.new_empty(len(bits), p.columns, *e.shape[2:]), dtotal.new_empty(len(bits), p.columns, dtotal.shape[-1])
    marginal_sums(bits, e, dtotal, into, columns=p.columns, scale=p.block_q / (p.marginal * p.block_k), transposed=True)
    return into


def _mean_gradients(p: Problem, shared: _Rows) -> tuple[Tensor, Tensor]:
    """Gradients of the mean keys, before the scale, and of the mean values: ``[B * H, splits, columns, D]`` FP32, to be summed."""
    assert p.means is not None
    batch, heads, padded, dim = p.q.shape
    rows, columns = p.kv_indices.shape[-2], p.columns
    options = dmeans_options(p)
    tiles = -(-columns // options["TILE_K"])
    per_split = -(-(rows - p.pinned) // min(MEAN_PARTS.value, max(1, 4 * PROGRAMS // (tiles * batch * heads))))
    splits = -(-(rows - p.pinned) // per_split)
    dk, dv = torch.empty(2, batch * heads, splits, columns, dim, device=p.q.device, dtype=torch.float32)
    _dmeans_kernel[(tiles, splits, batch * heads)](
        p.q, *p.means, shared.do, shared.stats, p.bits, dk, dv,
        p.tokens, padded, rows, columns, p.means[0].shape[2], p.bits.shape[-1], p.pinned, per_split, p.scale * LOG2_E.value,
        **_sizes(p), PRECISION=_precision(p.q), **options,
    )  # fmt: skip
    return dk, dv


def _empty(p: Problem, turned: bool) -> Tensor:
    """For a gradient in token order ``[B, H, padded, D]``, or in host order ``[B, N, H, D]``."""
    batch, heads, _, dim = p.v.shape
    return torch.empty_like(p.q) if turned else torch.empty(batch, p.tokens, heads, dim, device=p.v.device, dtype=p.v.dtype)


def _sizes(p: Problem) -> dict[str, int]:
    dim = p.q.shape[-1]
    return dict(D=dim, DP=triton.next_power_of_2(dim), BLOCK_Q=p.block_q, BLOCK_K=p.block_k)


def _branch(p: Problem) -> dict[str, object]:
    return dict(LINEAR=LINEAR[p.linear], SOFTMAX=p.feature_map == "softmax", PRECISION=_precision(p.q))


def _rows_contiguous(grad: Tensor) -> Tensor:
    return grad if grad.stride(-1) == 1 else grad.contiguous()
