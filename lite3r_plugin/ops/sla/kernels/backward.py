"""Gradients of the operator over ordered, padded tokens: the launches of the backward kernels.

The twin of what autograd makes of `naive.sparse_linear_attention`. Only what is asked for is computed, nothing waits for
the GPU, and no sum depends on the order in which programs run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..block_map.transpose_kernels import by_key_block
from ..dispatch import forked
from .backward_kernels import MEAN_PARTS, _dkv_kernel, _dmeans_kernel, _dq_kernel
from .backward_options import dkv_options, dmeans_options, dq_options, uses_tma
from .kernels import Residuals
from .linear_backward import PROGRAMS, Rows, by_rows, proj_gradient
from .linear_kernels import LOG2_E, _precision
from .marginal_kernels import head_groups, marginal_sums
from .problem import Problem
from .softmax_kernels import far_blocks


class Gradients(NamedTuple):
    """Gradients of `Problem`'s tensors in v's dtype, those of block means included; proj FP32.

    That of v is ``[B, H, N, D]`` in host order, a view of ``[B, N, H, D]``. Those of q and k are too, unless the norm or the
    rotation before attention is to be undone: then they are ``[B, H, padded, D]`` in token order, undefined after N tokens.
    """

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    proj: Tensor | None


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
    shared = by_rows(problem, residuals, out, grad)
    new_proj = torch.zeros_like if problem.linear == "none" else torch.empty_like
    found = Gradients(
        _empty(problem, turned) if needs_q else None,
        _empty(problem, turned) if needs_kv else None,
        _empty(problem, False) if needs_kv else None,
        None if problem.proj is None else new_proj(problem.proj, dtype=torch.float32),
    )
    # Beside the gradient of q, the small launches of the rest, and the ends of large ones, leave nothing idle.
    with forked(problem.q.device, problem.is_large) as aside:
        if found.q is not None:
            _query_gradient(problem, shared, found.q, turned)
        with aside:
            if found.proj is not None and problem.linear != "none":
                found.proj.copy_(proj_gradient(problem, shared))
            if found.k is not None and found.v is not None:
                _key_gradients(problem, shared, found.k, found.v, turned)
    in_order = [x if x is None or turned else x.transpose(1, 2) for x in found[:2]]
    return Gradients(*in_order, None if found.v is None else found.v.transpose(1, 2), found.proj)


def _query_gradient(p: Problem, shared: Rows, dq: Tensor, turned: bool) -> None:
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
        p.q, shared.do, *_tiles(p, options["TILE_K"], p.k, p.v), shared.stats, p.kv_indices, everything, p.bits, *far, shared.dq,
        dq if p.order is None else p.order, dq, partial,
        p.tokens, padded, heads, rows, columns, kept, far[0].shape[2], p.bits.shape[-1], p.pinned, splits, per_split,
        p.scale, p.scale * LOG2_E.value,
        **p.sizes, MEANS=p.means is not None, ADD=p.linear != "none", HOST=not turned, ORDERED=p.order is not None,
        TMA=uses_tma(p), PRECISION=_precision(p.q), **options,
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


def _key_gradients(p: Problem, shared: Rows, dk: Tensor, dv: Tensor, turned: bool) -> None:
    batch, heads, padded, dim = p.q.shape
    columns, kept = p.columns, p.kv_indices.shape[-1]
    work = by_key_block(p.critical, columns=columns, kept=kept, pinned=p.pinned)
    slots = work.early_columns.shape[-1]
    mean_grads = _mean_gradients(p, shared) if p.means is not None else (p.q, p.q)
    early = torch.empty(2, batch, heads, slots, p.block_k, dim, device=p.q.device, dtype=torch.float32)
    nothing = p.q

    def launch(is_early: bool, of_heads: range, e: Tensor, dtotal: Tensor) -> None:
        options = dkv_options(p)
        q, do = _tiles(p, options["TILE_Q"], p.q, shared.do)
        programs = len(of_heads) * (slots if is_early else columns) * (p.block_k // options["TILE_K"])
        _dkv_kernel[(programs,)](
            q, p.k, p.v, do, shared.stats, work.rows, work.starts, work.early_starts, work.early_columns, *early, *mean_grads,
            e, dtotal, shared.mu, *(nothing if x is None else x for x in (p.proj, p.order)), dk, dv,
            p.tokens, padded, heads, columns, work.rows.shape[-1], slots, work.part, mean_grads[0].shape[1], of_heads.start,
            p.scale, p.scale * LOG2_E.value,
            **p.sizes, EARLY=is_early, MEANS=p.means is not None, HOST=not turned, ORDERED=p.order is not None, TMA=uses_tma(p), **p.branch,
            **options,
        )  # fmt: skip

    if slots:
        launch(True, range(batch * heads), shared.e, shared.dtotal)
    if p.linear == "marginal":
        for some in head_groups(batch * heads, columns, p.v):
            launch(False, range(some.start, some.stop), *_block_gradients(p, shared, some))
    else:
        launch(False, range(batch * heads), shared.e, shared.dtotal)


def _block_gradients(p: Problem, shared: Rows, heads: slice) -> tuple[Tensor, Tensor]:
    """`Rows.e` and `Rows.dtotal` of each key block: those of query blocks for which it is marginal, summed; of key `heads`."""
    bits, e, dtotal = (x[heads] for x in (p.bits.flatten(0, 1), shared.e, shared.dtotal))
    into = e.new_empty(len(bits), p.columns, *e.shape[2:]), dtotal.new_empty(len(bits), p.columns, dtotal.shape[-1])
    marginal_sums(bits, e, dtotal, into, columns=p.columns, scale=p.block_q / (p.marginal * p.block_k), transposed=True)
    return into


def _mean_gradients(p: Problem, shared: Rows) -> tuple[Tensor, Tensor]:
    """Gradients of the mean keys, before the scale, and of the mean values: ``[B * H, splits, columns, D]`` FP32, to be summed."""
    assert p.means is not None
    batch, heads, padded, dim = p.q.shape
    rows, columns = p.kv_indices.shape[-2], p.columns
    options = dmeans_options(p)
    tiles = -(-columns // options["TILE_K"])
    per_split = -(-(rows - p.pinned) // min(MEAN_PARTS.value, max(1, 4 * PROGRAMS // (tiles * batch * heads))))
    splits = -(-(rows - p.pinned) // per_split)
    dk, dv = torch.empty(2, batch * heads, splits, columns, dim, device=p.q.device, dtype=torch.float32)
    q, do = _tiles(p, options["TILE_Q"], p.q, shared.do)
    _dmeans_kernel[(tiles, splits, batch * heads)](
        q, *p.means, do, shared.stats, p.bits, dk, dv,
        p.tokens, padded, rows, columns, p.means[0].shape[2], p.bits.shape[-1], p.pinned, per_split, p.scale * LOG2_E.value,
        **p.sizes, TMA=uses_tma(p), PRECISION=_precision(p.q), **options,
    )  # fmt: skip
    return dk, dv


def _tiles(p: Problem, rows: int, *tensors: Tensor) -> list[Any]:
    """Tensors in token order as the kernels' loops take them, `rows` rows at a time: by TMA, or by address."""
    if not uses_tma(p):
        return list(tensors)
    dim = p.q.shape[-1]
    return [TensorDescriptor(x, [x.numel() // dim, dim], [dim, 1], [rows, dim]) for x in tensors]


def _empty(p: Problem, turned: bool) -> Tensor:
    """For a gradient in token order ``[B, H, padded, D]``, or in host order ``[B, N, H, D]``."""
    batch, heads, _, dim = p.v.shape
    return torch.empty_like(p.q) if turned else torch.empty(batch, p.tokens, heads, dim, device=p.v.device, dtype=p.v.dtype)
