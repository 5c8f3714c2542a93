"""The backward pass of the whole operator on Triton: from the gradient of the output to those of all inputs, by name.

Also `SparseLinearAttentionFunction`, which ties `forward.train` and `backward` together for eager autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..block_map.kernels import BlockMap
from ..block_map.transpose_kernels import indices_of
from ..dispatch import on_device_of
from ..qk_norm_rope import HeadNorm, Tokens
from ..qk_norm_rope.backward_kernels import InputGradient, input_gradient
from . import saved
from .forward import train
from .kernels.backward import backward as attention_backward
from .kernels.forward import Residuals
from .kernels.linear_backward import proj_backward
from .kernels.operands import Operands
from .saved import Saved
from .signature import INPUTS, Arguments, Gradients, Needed


def backward(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor | None, kept: Saved, needed: Needed, arguments: Arguments
) -> Gradients:  # fmt: skip
    """Gradients of the inputs that are needed, each in the dtype of its input.

    Args:
        grad: Gradient of the output, ``[B, H, M, D]``, any strides.
        grad_lse: That of the log-sum-exp ``[B, H, M]``, any strides, or None. It has none with respect to Proj.
        out: The output ``[B, H, M, D]``, any strides: hooks of saved tensors may change them. Not needed when only Proj learns.
        kept: What `forward.train` kept, with any strides.
        needed: Which inputs need a gradient.
        arguments: As there, with any strides; what `saved.keep` does not keep may be None.
    """
    arguments = arguments.contiguous()
    kept = Saved(*(None if x is None else x.contiguous() for x in kept))
    with torch.autocast(grad.device.type, enabled=False), on_device_of(grad), torch.no_grad():
        if kept.linear is not None:
            found = Gradients(proj=proj_backward(grad, kept.linear))
        else:
            assert out is not None
            grad_lse = None if grad_lse is None else grad_lse.contiguous()
            found = _of_attention(grad, grad_lse, out.transpose(1, 2).contiguous().transpose(1, 2), kept, needed, arguments)
    return Gradients(
        *(
            x.to(x.dtype if like is None else like.dtype) if x is not None and need else None
            for x, need, like in zip(found, needed, arguments.inputs, strict=True)
        )
    )


def _of_attention(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor, kept: Saved, needed: Needed, arguments: Arguments
) -> Gradients:  # fmt: skip
    """Gradients where more than Proj learns: all that come with those that are needed."""
    tokens = out.shape[-2]
    if kept.q is not None:
        q, k, v, k_mean, v_mean = kept.q, kept.k, kept.v, kept.k_mean, kept.v_mean
        assert k is not None
        assert v is not None
        assert k_mean is not None
        assert v_mean is not None
        arguments = arguments._replace(q=q[:, :, :tokens], k=k[:, :, :tokens], v=v[:, :, :tokens])
    else:
        q, k, v, _, k_mean, v_mean = arguments.prepared(triton=True)
    assert kept.bits is not None
    counts = arguments.block_counts()
    mask = arguments.kernel_mask()
    listed = indices_of(kept.bits, counts.kept if mask is None else arguments.columns)
    chosen = BlockMap(listed, kept.bits, kept.bits if kept.skipped is None else kept.skipped)
    operands = Operands.of(arguments, (q, k, v), (k_mean, v_mean), chosen, counts.negligible, mask)
    residuals = Residuals(lse=kept.lse, state=kept.state, total=kept.total, mu=kept.mu)
    changed = arguments.changes_qk
    found = attention_backward(
        operands, residuals, out, grad, grad_lse, in_token_order=changed, needs_q=needed.queries, needs_kv=needed.keys or needed.v
    )
    gradients = Gradients(q=found.q, k=found.k, v=found.v, proj=found.proj)
    if changed and found.q is not None:
        tokens = Tokens(arguments.order, arguments.positions)
        q = _undone(arguments, arguments.q, found.q, tokens, arguments.q_norm, needed.q_weight or needed.q_bias)
        gradients = gradients._replace(q=q.x, q_weight=q.weight, q_bias=q.bias)
    if changed and found.k is not None:
        k = _undone(arguments, arguments.k, found.k, arguments.keys, arguments.k_norm, needed.k_weight or needed.k_bias)
        gradients = gradients._replace(k=k.x, k_weight=k.weight, k_bias=k.bias)
    return gradients


def _undone(arguments: Arguments, x: Tensor, grad: Tensor, tokens: Tokens, norm: HeadNorm, affine: bool) -> InputGradient:
    """Gradients of queries or keys `x` as they came, and of their `norm`, from that of what attention took, in token order."""
    return input_gradient(x, grad, order=tokens.order, norm=norm, positions=tokens.positions, rope_base=arguments.rope_base, affine=affine)


class SparseLinearAttentionFunction(torch.autograd.Function):
    """`forward.train` and `backward` for eager autograd: ``apply(*Arguments(...))`` is what `forward.run` returns."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        flat = Arguments(*arguments)
        needed = Needed(*(need and x is not None for need, x in zip(ctx.needs_input_grad, flat.inputs, strict=False)))
        out, lse, kept = train(needed, flat)
        saved.keep(ctx, needed, flat, out, kept)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad, grad_lse = grad_outputs  # the latter None where no log-sum-exp was returned
        return (*backward(grad, grad_lse, *saved.kept(ctx)), *NO_GRADIENTS)


NO_GRADIENTS = (None,) * (len(Arguments._fields) - len(INPUTS))  # of what is no input
