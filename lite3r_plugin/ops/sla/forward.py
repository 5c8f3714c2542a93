"""The forward pass of the whole operator: prepare q, k, v, choose blocks, attend; in torch operators or in Triton.

`run` is what an eager call runs that needs no gradient, or gets it from autograd through torch operators. `train` keeps what
the Triton backward pass needs (`backward.py`). Work on ordered, padded tokens is in `kernels/`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..block_map import block_map, masked_block_map
from ..dispatch import on_device_of, use_triton, without_autocast
from ..qk_norm_rope import Prepared
from . import naive, saved
from .saved import Saved
from .signature import Arguments, Needed

if TYPE_CHECKING:
    from .kernels.operands import Operands


def run(arguments: Arguments, *, needs_grad: bool = False, prepared: Prepared | None = None) -> tuple[Tensor, Tensor | None]:
    """The whole operator.

    Args:
        arguments: See `api.sparse_linear_attention`, which checks them.
        needs_grad: Whether autograd follows what is done here, which needs more of a GPU.
        prepared: What `Arguments.prepared` would give, where it was made before; keys may be padded by more.

    Returns:
        ``[B, H, M, D]`` in v's dtype, in host order; and the log-sum-exp ``[B, H, M]`` FP32 (FP64 for FP64 input) of each query, if
        that is wanted, else None.

    Raises:
        BackendError: the backend is ``"triton"`` and the kernels cannot take these tensors.
    """
    if arguments.is_empty:
        return empty(arguments)
    arguments = arguments.contiguous()
    # Autocast would run the pooled scores and the linear state in half precision.
    with without_autocast(arguments.v), on_device_of(arguments.v):
        triton = on_triton(arguments, needs_grad)
        prepared = arguments.prepared(triton) if prepared is None else prepared
        return _on_triton(arguments, prepared) if triton else _on_torch(arguments, prepared)


def on_triton(arguments: Arguments, needs_grad: bool = False) -> bool:
    """Whether the kernels run for this call; else torch operators do, which warns on a GPU.

    Raises:
        BackendError: the backend is ``"triton"`` and the kernels cannot take the call.
    """
    return use_triton(arguments.backend, arguments.v, needs_grad)


def empty(arguments: Arguments) -> tuple[Tensor, Tensor | None]:
    """The output and log-sum-exp of an empty batch or of no tokens, with gradients of zero: of no keys, zeros and -inf."""
    v = arguments.v
    out = v.new_zeros(arguments.q.shape) + 0 * v.sum()
    for x in arguments.inputs:
        if x is not None and x is not v and x.requires_grad:
            out = out + 0 * x.sum().to(out.dtype)
    if not arguments.return_lse:
        return out, None
    return out, out.sum(-1, dtype=torch.promote_types(out.dtype, torch.float32)) - torch.inf


def in_host_order(x: Tensor, order: Tensor | None, dim: int) -> Tensor:
    """`x` with tokens along `dim` put back from token order to host order."""
    return x if order is None else torch.empty_like(x).index_copy(dim, order.long(), x)


def _on_torch(arguments: Arguments, prepared: Prepared) -> tuple[Tensor, Tensor | None]:
    means = prepared.q_mean.detach(), prepared.k_mean.detach()
    by_error = arguments.by_error(prepared, triton=False)
    mask = None if arguments.mask is None else arguments.mask.ordered(arguments.order, arguments.keys.order)
    if mask is None:
        kv_indices, negligible = block_map(*means, **arguments.block_counts()._asdict(), by_error=by_error)
    else:
        kv_indices, negligible = masked_block_map(
            *means, keep_ratio=arguments.keep_ratio, mask=mask.in_blocks(arguments.block_q, arguments.block_k),
            pinned=arguments.pinned_keys, negligible_ratio=arguments.negligible_ratio if arguments.leaves_out else 0.0,
            by_error=by_error,
        )  # fmt: skip
    out, lse = naive.sparse_linear_attention(
        prepared.q, prepared.k, prepared.v, kv_indices, negligible=negligible, mask=mask, pinned=arguments.pinned_queries,
        scale=arguments.scale, linear=arguments.linear, feature_map=arguments.feature_map, proj=arguments.proj,
        block_means=arguments.block_means, block_q=arguments.block_q, block_k=arguments.block_k, return_lse=arguments.return_lse,
    )  # fmt: skip
    return in_host_order(out, arguments.order, -2), None if lse is None else in_host_order(lse, arguments.order, -1)


def _on_triton(arguments: Arguments, prepared: Prepared) -> tuple[Tensor, Tensor | None]:
    from .kernels.forward import forward

    operands = _operands(arguments, prepared, bits=arguments.block_means or arguments.linear == "marginal")
    out, made = forward(operands, save_lse=arguments.return_lse, infers=True)
    return out, natural_lse(arguments, made.lse) if arguments.return_lse else None


def _operands(arguments: Arguments, prepared: Prepared, bits: bool) -> Operands:
    """The call as kernels take it, with its block map."""
    from ..block_map.kernels import block_map_with_bits, masked_block_map_with_bits
    from .kernels.operands import Operands

    counts, mask, by_error = arguments.block_counts(), arguments.kernel_mask(), arguments.by_error(prepared, triton=True)
    if mask is None:
        chosen = block_map_with_bits(prepared.q_mean, prepared.k_mean, **counts._asdict(), bits=bits, by_error=by_error)
    else:
        chosen = masked_block_map_with_bits(prepared.q_mean, prepared.k_mean, mask, by_error)
    return Operands.of(arguments, prepared[:3], prepared[4:], chosen, counts.negligible, mask)


def natural_lse(arguments: Arguments, lse: Tensor | None) -> Tensor:
    """The log-sum-exp that is returned, ``[B, H, M]`` FP32 in host order, from that of `kernels.forward.Residuals`."""
    assert lse is not None
    return in_host_order(lse[..., : arguments.q.shape[-2]] * math.log(2), arguments.order, -1)


def train(needed: Needed, arguments: Arguments) -> tuple[Tensor, Tensor | None, Saved]:
    """The whole operator on Triton, for a backward pass.

    Args:
        needed: Which inputs need a gradient.
        arguments: As `run` takes them.

    Returns:
        The output ``[B, H, M, D]``, a view of contiguous ``[B, M, H, D]``; the log-sum-exp as `run` returns it; and what
        `backward.backward` needs besides the output and the arguments, in tensors that share no memory with each other: `saved.names`
        says what.
    """
    from .kernels.forward import forward

    arguments = arguments.contiguous()
    with torch.autocast(arguments.v.device.type, enabled=False), on_device_of(arguments.v), torch.no_grad():
        prepared = arguments.prepared(triton=True)
        operands = _operands(arguments, prepared, bits=True)
        centred = needed.attention and arguments.per_row
        mu = _mean_value(arguments, prepared.v_mean) if centred else None
        out, made = forward(operands, save_lse=needed.attention or arguments.return_lse, save_linear=not needed.attention, mu=mu)
        lse = natural_lse(arguments, made.lse) if arguments.return_lse else None
    if not needed.attention:
        return out, lse, Saved(linear=made.linear)
    skipped = None
    if arguments.skips:
        assert operands.skipped is not None
        skipped = operands.skipped.clone() if operands.skipped is operands.bits else operands.skipped
    kept = Saved(lse=made.lse, bits=operands.bits, skipped=skipped, state=made.state, total=made.total, mu=made.mu)
    if centred and made.state is None:  # no block is marginal, but what is kept is fixed
        spare = saved.empty(needed, arguments)
        assert spare.state is not None
        assert spare.total is not None
        kept = kept._replace(state=spare.state.zero_(), total=spare.total.zero_())
    if saved.keeps_ordered(arguments):
        kept = kept._replace(q=prepared.q, k=prepared.k, v=prepared.v, k_mean=prepared.k_mean, v_mean=prepared.v_mean)
    return out, lse, kept


def _mean_value(arguments: Arguments, v_mean: Tensor) -> Tensor:
    """Mean value of each head ``[B * H, D]``, from those of key blocks; the last may be short."""
    tokens, block = arguments.tokens, arguments.block_k
    last = tokens - (v_mean.shape[2] - 1) * block
    return ((v_mean.sum(2) * block - v_mean[:, :, -1] * (block - last)) / tokens).flatten(0, 1)
