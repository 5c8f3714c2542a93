"""The whole operator with gradients, in Triton: what its forward pass keeps, and its backward pass.

Where only Proj learns, the linear branch before Proj is kept, one tensor of the size of the output. Where q, k, v (or the
norms before them) learn, the inputs and the output are kept, which the layers around the operator mostly keep as well,
and little more: the ordered tensors are made again.

Arguments are those of `operator.run`, flat; `needed` says which of the first eight, the tensors, need a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backend import on_device_of
from ..block_map.kernels import block_map_with_bits
from ..block_map.transpose_kernels import indices_of
from ..qk_norm_rope import Prepared
from ..qk_norm_rope.backward_kernels import input_gradient
from . import kernels
from .backward import Problem, backward, proj_backward
from .call import DIFFERENTIABLE, Call


def train_forward(needed: Sequence[bool], *arguments: Any) -> tuple[Tensor, list[Tensor]]:
    """The output ``[B, H, N, D]``, a view of ``[B, N, H, D]``, and what `train_backward` needs besides it and the arguments."""
    call = Call(*arguments)
    softmax = any(needed[:7])
    with torch.autocast(call.v.device.type, enabled=False), on_device_of(call.v), torch.no_grad():
        prepared = call.prepared(triton=True)
        kv_indices, bits, skipped = block_map_with_bits(prepared.q_mean, prepared.k_mean, **call.blocks)
        assert bits is not None
        assert skipped is not None
        problem = _problem(call, prepared, kv_indices, bits, skipped)
        out, residuals = kernels.forward(
            *problem[:4], save_lse=softmax, save_linear=not softmax, **{name: getattr(problem, name) for name in Problem._fields[5:]},
        )  # fmt: skip
    if not softmax:
        return out, [x for x in (residuals.linear,) if x is not None]
    others = None
    if call.leaves_out:
        others = skipped.clone() if skipped is bits else skipped  # an operator's results share no memory
    kept = (residuals.lse, bits, others, residuals.state, residuals.total)
    return out, [x for x in kept if x is not None]


def train_saved(needed: Sequence[bool], *arguments: Any) -> list[Tensor]:
    """Empty tensors like those that `train_forward` keeps, for tracing."""
    call = Call(*arguments)
    batch, heads, tokens, dim = call.v.shape
    if not any(needed[:7]):
        return [call.v.new_empty(batch, tokens, heads, dim)]
    rows, columns = -(-tokens // call.block_q), -(-tokens // call.block_k)
    words = -(-columns // 32)
    saved = [call.v.new_empty(batch, heads, rows * call.block_q, dtype=torch.float32)]
    saved += [call.v.new_empty(batch, heads, rows, words, dtype=torch.int32) for _ in range(1 + call.leaves_out)]
    if call.linear == "all":
        saved += [call.v.new_empty(batch, heads, *shape, dtype=torch.float32) for shape in ((dim, dim), (dim,))]
    return saved


def train_backward(
    grad: Tensor, out: Tensor | None, saved: Sequence[Tensor], needed: Sequence[bool], *arguments: Any
) -> list[Tensor | None]:
    """Gradients of the first eight arguments, None where not needed.

    Args:
        grad: Gradient of the output, ``[B, H, N, D]``, any strides.
        out: The output ``[B, H, N, D]``; not needed when only Proj learns.
        saved: What `train_forward` returned.
        needed, arguments: As there.
    """
    call = Call(*arguments)
    with torch.autocast(grad.device.type, enabled=False), on_device_of(grad), torch.no_grad():
        grads: list[Tensor | None] = [None] * DIFFERENTIABLE
        if not any(needed[:7]):
            grads[7] = proj_backward(grad, saved[0])
        else:
            assert out is not None
            lse, bits, *state = saved
            skipped = state.pop(0) if call.leaves_out else bits
            residuals = kernels.Residuals(lse, None, *state) if state else kernels.Residuals(lse, None, None, None)
            problem = _problem(call, call.prepared(triton=True), indices_of(bits, call.kept), bits, skipped)
            wanted = [any(needed[i] for i in group) for group in ((0, 3, 4), (1, 5, 6), (2,))]
            found = backward(problem, residuals, out, grad, needs_q=wanted[0], needs_kv=wanted[1] or wanted[2])
            grads[7] = found.proj
            for i, norm in enumerate((*call.norms.values(), None)):
                ordered = found[i]
                if not wanted[i] or ordered is None:
                    continue
                after: dict[str, Any] = call.turned if i < 2 else dict(order=call.order)
                weights = slice(3 + 2 * i, 5 + 2 * i)
                affine = i < 2 and any(needed[weights])
                result = input_gradient((call.q, call.k, call.v)[i], ordered, norm=norm, affine=affine, **after)
                grads[i] = result.x
                if i < 2:
                    grads[weights] = result.weight, result.bias
    return [
        x.to(like.dtype) if x is not None and need else None
        for x, need, like in zip(grads, needed, arguments, strict=False)
    ]  # fmt: skip


class SparseLinearAttention(torch.autograd.Function):
    """`train_forward` and `train_backward` for eager autograd."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        ctx.needed = [isinstance(x, Tensor) and need for x, need in zip(arguments[:DIFFERENTIABLE], ctx.needs_input_grad, strict=False)]
        out, saved = train_forward(ctx.needed, *arguments)
        full = any(ctx.needed[:7])
        # Where only Proj learns, the inputs are not kept alive.
        tensors = [x if isinstance(x, Tensor) and (full or i == 7) else None for i, x in enumerate(arguments)]
        ctx.save_for_backward(out if full else None, *tensors, *saved)
        ctx.others = [None if isinstance(x, Tensor) else x for x in arguments]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grad_outputs
        out, *rest = ctx.saved_tensors
        tensors, saved = rest[: len(ctx.others)], rest[len(ctx.others) :]
        arguments = [other if tensor is None else tensor for tensor, other in zip(tensors, ctx.others, strict=True)]
        grads = train_backward(grad, out, saved, ctx.needed, *arguments)
        return (*grads, *(None for _ in arguments[DIFFERENTIABLE:]))


def _problem(call: Call, prepared: Prepared, kv_indices: Tensor, bits: Tensor, skipped: Tensor) -> Problem:
    return Problem(
        *prepared[:3], kv_indices, bits, skipped, call.negligible, prepared[4:] if call.block_means else None, call.proj, call.order,
        call.v.shape[-2], call.pinned_queries, call.v.shape[-1] ** -0.5 if call.scale is None else call.scale,
        call.linear, call.feature_map, call.block_q, call.block_k,
    )  # fmt: skip
