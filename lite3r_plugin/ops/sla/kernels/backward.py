"""Gradients of the operator over ordered, padded tokens: the launches of the backward kernels.

The twin of what autograd makes of `naive.sparse_linear_attention`. Only what is asked for is computed, nothing waits for
the GPU, and no sum depends on the order in which programs run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...block_map.transpose_kernels import by_key_block
from ...dispatch import side_stream
from .backward_options import dkv_options, dmeans_options, dq_options, uses_tma
from .forward import Residuals
from .linear import LOG2_E, precision
from .linear_backward import PROGRAMS, Rows, by_rows, proj_gradient
from .linear_pairs import add_query_gradient, key_gradients
from .marginal import head_groups, marginal_sums
from .operands import Operands
from .softmax import padded_means
from .softmax_backward import MEAN_PARTS, _dkv_kernel, _dmeans_kernel, _dq_kernel


class OperandGradients(NamedTuple):
    """Gradients of `Operands`'s tensors in v's dtype, those of block means included; proj FP32.

    That of v is ``[B, H, N, D]`` in host order, a view of ``[B, N, H, D]``. Those of q and k are likewise, unless the norm or the
    rotation before attention is to be undone: then they are ``[B, H, padded, D]`` in token order, undefined after the last token.
    """

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    proj: Tensor | None


def backward(
    operands: Operands, residuals: Residuals, out: Tensor, grad: Tensor, grad_lse: Tensor | None = None, *,
    in_token_order: bool, needs_q: bool, needs_kv: bool,
) -> OperandGradients:  # fmt: skip
    """Gradients of q, of k and v, and (if there is a linear branch) of Proj.

    Args:
        operands, residuals: The call, with all of `Residuals` but `linear`.
        out: Its output, ``[B, H, M, D]``, a view of contiguous ``[B, M, H, D]``, in host order.
        grad: The gradient of `out`, ``[B, H, M, D]``, any strides.
        grad_lse: That of the log-sum-exp of queries, ``[B, H, M]`` FP32 contiguous in host order, or None.
        in_token_order: Whether the gradients of q and k are wanted in token order.
        needs_q, needs_kv: Whether the gradient of q, and those of k and v, are wanted.
    """
    rows = operands.kv_indices.shape[-2]
    operands = operands._replace(pinned=min(operands.pinned, rows))
    if operands.marginal == 0 or operands.pinned == rows:
        operands = operands._replace(means=None, linear="none" if operands.linear == "marginal" else operands.linear)
    if operands.means is not None:
        tile = max(options(operands)["TILE_K"] for options in (dq_options, dmeans_options))
        operands = operands._replace(means=padded_means(*operands.means, tile, operands.v.dtype))
    shared = by_rows(operands, residuals, out, grad, grad_lse)
    if shared.pair_grads is not None and needs_q:
        add_query_gradient(operands, shared.mu, shared.pair_grads, shared.dq)
    new_proj = torch.zeros_like if operands.linear == "none" else torch.empty_like
    found = OperandGradients(
        _empty(operands.q, operands.queries, in_token_order) if needs_q else None,
        _empty(operands.k, operands.tokens, in_token_order) if needs_kv else None,
        _empty(operands.v, operands.tokens, False) if needs_kv else None,
        None if operands.proj is None else new_proj(operands.proj, dtype=torch.float32),
    )
    # Beside the gradient of q, the small launches of the rest, and the ends of large ones, leave nothing idle.
    with side_stream(operands.q.device, operands.is_large) as on_side_stream:
        if found.q is not None:
            _query_gradient(operands, shared, found.q, in_token_order)
        with on_side_stream:
            if found.proj is not None and operands.linear != "none":
                found.proj.copy_(proj_gradient(operands, shared))
            if found.k is not None and found.v is not None:
                _key_gradients(operands, shared, found.k, found.v, in_token_order)

    def heads_first(x: Tensor | None, in_token_order: bool = False) -> Tensor | None:
        return x if x is None or in_token_order else x.transpose(1, 2)

    return OperandGradients(heads_first(found.q, in_token_order), heads_first(found.k, in_token_order), heads_first(found.v), found.proj)


def _query_gradient(operands: Operands, shared: Rows, dq: Tensor, in_token_order: bool) -> None:
    batch, heads, _, dim = operands.q.shape
    rows, kept = operands.kv_indices.shape[-2:]
    columns = operands.columns
    # A pinned query block attends to all keys: cut, lest its program runs on when all others are done.
    per_split = max(1, min(columns, 2 * operands.typical))
    splits = -(-columns // per_split)
    partial = torch.empty(batch, heads, operands.pinned, splits, operands.block_q, dim, device=operands.q.device, dtype=torch.float32)
    options = dq_options(operands)
    means = operands.means or (operands.q, operands.q)
    own_lists = operands.mask is not None or not operands.pinned
    everything = operands.kv_indices if own_lists else torch.arange(columns, device=operands.q.device, dtype=torch.int32)
    _dq_kernel[(batch * heads * (operands.pinned * splits + rows - operands.pinned) * (operands.block_q // options["TILE_Q"]),)](
        operands.q, shared.do, *_tiles(operands, options["TILE_K"], operands.k, operands.v), shared.stats, operands.kv_indices, everything,
        operands.skipped, *means, shared.dq,
        dq if operands.order is None else operands.order, dq, partial, operands.mask,
        operands.queries, operands.tokens, operands.k.shape[2], heads, rows, columns, kept, means[0].shape[2],
        operands.skipped.shape[-1], operands.pinned, splits, per_split, operands.scale, operands.scale * LOG2_E.value,
        **operands.sizes, MEANS=operands.means is not None, ADD=operands.linear != "none", HOST=not in_token_order,
        ORDERED=operands.order is not None, TMA=uses_tma(operands), PRECISION=precision(operands.q), **options,
    )  # fmt: skip
    if operands.pinned:
        count = min(operands.pinned * operands.block_q, operands.queries)
        first = partial.sum(3).flatten(2, 3)[:, :, :count]
        if operands.linear != "none":
            first += shared.dq[:, :, :count]
        if in_token_order or operands.order is None:
            (dq if in_token_order else dq.transpose(1, 2))[:, :, :count] = first
        else:
            dq.index_copy_(1, operands.order[:count].long(), first.transpose(1, 2).to(dq.dtype))


def _key_gradients(operands: Operands, shared: Rows, dk: Tensor, dv: Tensor, in_token_order: bool) -> None:
    batch, heads, padded, dim = operands.k.shape
    columns, (rows, kept) = operands.columns, operands.kv_indices.shape[-2:]
    work = by_key_block(operands.bits, columns=columns, kept=kept, pinned=operands.pinned, mask=operands.mask)
    slots = work.early_columns.shape[-1]
    mean_grads = _mean_gradients(operands, shared) if operands.means is not None else (operands.q, operands.q)
    early = torch.empty(2, batch, heads, slots, operands.block_k, dim, device=operands.q.device, dtype=torch.float32)
    nothing = operands.q

    def launch(is_early: bool, of_heads: range, e: Tensor, dtotal: Tensor) -> None:
        options = dkv_options(operands)
        q, do = _tiles(operands, options["TILE_Q"], operands.q, shared.do)
        programs = len(of_heads) * (slots if is_early else columns) * (operands.block_k // options["TILE_K"])
        _dkv_kernel[(programs,)](
            q, operands.k, operands.v, do, shared.stats, work.rows, work.starts, work.early_starts, work.early_columns, *early, *mean_grads,
            e, dtotal, shared.mu, *(nothing if x is None else x for x in (operands.proj, operands.key_order)), dk, dv, operands.mask,
            work.masked_part, *pairs,
            operands.tokens, rows, padded, heads, columns, work.rows.shape[-1], slots, work.part, mean_grads[0].shape[1],
            of_heads.start, operands.scale, operands.scale * LOG2_E.value,
            **operands.sizes, EARLY=is_early, MEANS=operands.means is not None, HOST=not in_token_order,
            ORDERED=operands.key_order is not None, TMA=uses_tma(operands), **operands.branch, **options,
        )  # fmt: skip

    pairs = (None, None) if shared.pair_grads is None else key_gradients(operands, shared.mu, shared.pair_grads)
    if slots:
        launch(True, range(batch * heads), shared.e, shared.dtotal)
    if operands.per_row:
        for some in head_groups(batch * heads, columns, operands.v):
            launch(False, range(some.start, some.stop), *_block_gradients(operands, shared, some))
    else:
        launch(False, range(batch * heads), shared.e, shared.dtotal)


def _block_gradients(operands: Operands, shared: Rows, heads: slice) -> tuple[Tensor, Tensor]:
    """`Rows.e` and `Rows.dtotal` of each key block: those of query blocks for which it is marginal, summed; of key `heads`."""
    bits, e, dtotal = (x[heads] for x in (operands.state_bits().flatten(0, 1), shared.e, shared.dtotal))
    into = e.new_empty(len(bits), operands.columns, *e.shape[2:]), dtotal.new_empty(len(bits), operands.columns, dtotal.shape[-1])
    scales = None if operands.mask is None else operands.mask.scales
    scale = operands.block_q / ((operands.marginal if scales is None else 1) * operands.block_k)
    marginal_sums(bits, e, dtotal, into, columns=operands.columns, scale=scale, transposed=True, scales=scales)
    return into


def _mean_gradients(operands: Operands, shared: Rows) -> tuple[Tensor, Tensor]:
    """Gradients of the mean keys, before the scale, and of the mean values: ``[B * H, splits, columns, D]`` FP32, to be summed."""
    assert operands.means is not None
    batch, heads, _, dim = operands.q.shape
    rows, columns = operands.kv_indices.shape[-2], operands.columns
    options = dmeans_options(operands)
    tiles = -(-columns // options["TILE_K"])
    per_split = -(-(rows - operands.pinned) // min(MEAN_PARTS.value, max(1, 4 * PROGRAMS // (tiles * batch * heads))))
    splits = -(-(rows - operands.pinned) // per_split)
    dk, dv = torch.empty(2, batch * heads, splits, columns, dim, device=operands.q.device, dtype=torch.float32)
    q, do = _tiles(operands, options["TILE_Q"], operands.q, shared.do)
    _dmeans_kernel[(tiles, splits, batch * heads)](
        q, *operands.means, do, shared.stats, operands.skipped, dk, dv,
        operands.tokens, rows, columns, operands.means[0].shape[2], operands.skipped.shape[-1], operands.pinned, per_split,
        operands.scale * LOG2_E.value,
        **operands.sizes, TMA=uses_tma(operands), PRECISION=precision(operands.q), **options,
    )  # fmt: skip
    return dk, dv


def _tiles(operands: Operands, rows: int, *tensors: Tensor) -> list[Any]:
    """Tensors in token order as the kernels' loops take them, `rows` rows at a time: by TMA, or by address."""
    if not uses_tma(operands):
        return list(tensors)
    dim = operands.q.shape[-1]
    return [TensorDescriptor(x, [x.numel() // dim, dim], [dim, 1], [rows, dim]) for x in tensors]


def _empty(x: Tensor, tokens: int, in_token_order: bool) -> Tensor:
    """For the gradient of x ``[B, H, padded, D]``, in token order like it, or in host order ``[B, tokens, H, D]``."""
    if in_token_order:
        return torch.empty_like(x)
    batch, heads, _, dim = x.shape
    return torch.empty(batch, tokens, heads, dim, device=x.device, dtype=x.dtype)
