"""The whole operator with gradients, in Triton: what its forward pass keeps, and its backward pass.

Where only Proj learns, the linear branch before Proj is kept, one tensor of the size of the output. Where q, k, v (or the
norms before them) learn, the inputs and the output are kept, which the layers around the operator mostly keep as well,
and over marginal blocks the states; the ordered tensors are made again. Without a norm they are kept in place of the inputs.

Arguments are those of `operator.run`, flat; `needed` says which of the first eight, the tensors, need a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..block_map.kernels import block_map_with_bits
from ..block_map.transpose_kernels import indices_of
from ..dispatch import on_device_of
from ..qk_norm_rope.backward_kernels import input_gradient
from . import kernels
from .backward import backward
from .call import DIFFERENTIABLE, Call
from .linear_backward import proj_backward
from .problem import Problem


def train_forward(needed: Sequence[bool], *arguments: Any) -> tuple[Tensor, list[Tensor]]:
    """The output ``[B, H, N, D]``, a view of ``[B, N, H, D]``, and what `train_backward` needs besides it and the arguments."""
    call = Call.of(*arguments)
    softmax = any(needed[:7])
    with torch.autocast(call.v.device.type, enabled=False), on_device_of(call.v), torch.no_grad():
        prepared = call.prepared(triton=True)
        kv_indices, bits, skipped = block_map_with_bits(prepared.q_mean, prepared.k_mean, **call.blocks)
        assert bits is not None
        assert skipped is not None
        problem = _problem(call, prepared[:3], prepared[4:], kv_indices, bits, skipped)
        mu = _mean_value(call, prepared.v_mean) if softmax and call.linear == "marginal" else None
        out, residuals = kernels.forward(
            *problem[:4], save_lse=softmax, save_linear=not softmax, mu=mu,
            **{name: getattr(problem, name) for name in Problem._fields[5:]},
        )  # fmt: skip
    if not softmax:
        return out, [x for x in (residuals.linear,) if x is not None]
    made = prepared._asdict() | residuals._asdict() | dict(bits=bits)
    if call.leaves_out:
        made["skipped"] = skipped.clone() if skipped is bits else skipped  # an operator's results share no memory
    if call.linear == "marginal" and residuals.state is None:  # no block is marginal, but the number of results is fixed
        spare = dict(zip(_kept(call), train_saved(needed, *arguments), strict=True))
        made |= {name: spare[name].zero_() for name in ("state", "total")}
    return out, [made[name] for name in _kept(call)]


def _mean_value(call: Call, v_mean: Tensor) -> Tensor:
    """Mean value of each head ``[B * H, D]``, from those of key blocks; the last may be short."""
    last = call.v.shape[-2] - (v_mean.shape[2] - 1) * call.block_k
    return ((v_mean.sum(2) * call.block_k - v_mean[:, :, -1] * (call.block_k - last)) / call.v.shape[-2]).flatten(0, 1)


def _kept(call: Call) -> list[str]:
    """Names of what is kept besides arguments and output where more than Proj learns; q, k, v are those in order."""
    names = ["lse", "bits"]
    if call.leaves_out:
        names.append("skipped")
    if call.linear != "none":
        names += ["state", "total"]
    if call.linear == "marginal":
        names.append("mu")
    if keeps_ordered(call):
        names += ["q", "k", "v", "k_mean", "v_mean"]
    return names


def keeps_ordered(call: Call) -> bool:
    """Whether q, k, v are kept in order and not as they came. With a norm both would be needed."""
    if call.v is None:  # in a backward pass for which they were kept so
        return True
    return call.q_kind is None and call.k_kind is None and call.q.dtype == call.k.dtype == call.v.dtype


def keeps(needed: Sequence[bool], call: Call) -> list[bool]:
    """Which arguments the backward pass needs, of all those that are tensors."""
    if not any(needed[:7]):
        return [name == "proj" for name in Call._fields]
    return [name not in ("q", "k", "v") or not keeps_ordered(call) for name in Call._fields]


def train_saved(needed: Sequence[bool], *arguments: Any) -> list[Tensor]:
    """Empty tensors like those that `train_forward` keeps, for tracing."""
    call = Call(*arguments)
    batch, heads, tokens, dim = call.v.shape
    if not any(needed[:7]):
        return [call.v.new_empty(batch, tokens, heads, dim)]
    rows, columns = -(-tokens // call.block_q), -(-tokens // call.block_k)
    owners = (batch * heads, rows) if call.linear == "marginal" else (batch, heads)
    number, own = torch.float32, call.v.dtype
    words = (batch, heads, rows, -(-columns // 32)), torch.int32
    ordered, means = ((batch, heads, rows * call.block_q, dim), own), ((batch, heads, columns, dim), number)
    kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] = dict(
        lse=((batch, heads, rows * call.block_q), number), bits=words, skipped=words,
        state=((*owners, dim, dim), own if call.linear == "marginal" else number), total=((*owners, dim), number),
        mu=((batch * heads, dim), number), q=ordered, k=ordered, v=ordered, k_mean=means, v_mean=means,
    )  # fmt: skip
    return [call.v.new_empty(shape, dtype=dtype) for shape, dtype in (kinds[name] for name in _kept(call))]


def train_backward(
    grad: Tensor, out: Tensor | None, saved: Sequence[Tensor], needed: Sequence[bool], *arguments: Any
) -> list[Tensor | None]:
    """Gradients of the first eight arguments, None where not needed.

    Args:
        grad: Gradient of the output, ``[B, H, N, D]``, any strides.
        out: The output ``[B, H, N, D]``, any strides: hooks of saved tensors may change them. Not needed when only Proj learns.
        saved: What `train_forward` returned, with any strides.
        needed, arguments: As there, with any strides; what `keeps` says is not needed may be None.
    """
    call, saved = Call.of(*arguments), [x.contiguous() for x in saved]
    with torch.autocast(grad.device.type, enabled=False), on_device_of(grad), torch.no_grad():
        grads: list[Tensor | None] = [None] * DIFFERENTIABLE
        if not any(needed[:7]):
            grads[7] = proj_backward(grad, saved[0])
        else:
            assert out is not None
            out = out.transpose(1, 2).contiguous().transpose(1, 2)
            kept = dict(zip(_kept(call), saved, strict=True))
            if keeps_ordered(call):
                q, k, v = (kept[name] for name in ("q", "k", "v"))
                means = kept["k_mean"], kept["v_mean"]
                call = call._replace(**{name: kept[name][:, :, : out.shape[-2]] for name in ("q", "k", "v")})
            else:
                q, k, v, _, *means = call.prepared(triton=True)
            residuals = kernels.Residuals(**{name: kept.get(name) for name in kernels.Residuals._fields})
            bits = kept["bits"]
            problem = _problem(call, (q, k, v), (means[0], means[1]), indices_of(bits, call.kept), bits, kept.get("skipped", bits))
            wanted = [any(needed[i] for i in group) for group in ((0, 3, 4), (1, 5, 6), (2,))]
            found = backward(
                problem, residuals, out, grad, turned=call.is_turned, needs_q=wanted[0], needs_kv=wanted[1] or wanted[2]
            )  # fmt: skip
            grads[:3], grads[7] = found[:3], found.proj
            if call.is_turned:
                for i, (norm, turned) in enumerate(zip(call.norms.values(), found[:2], strict=True)):
                    if turned is not None:
                        weights = slice(3 + 2 * i, 5 + 2 * i)
                        result = input_gradient((call.q, call.k)[i], turned, norm=norm, affine=any(needed[weights]), **call.turned)
                        grads[i] = result.x
                        grads[weights] = result.weight, result.bias
    return [
        x.to(x.dtype if like is None else like.dtype) if x is not None and need else None
        for x, need, like in zip(grads, needed, arguments, strict=False)
    ]  # fmt: skip


class SparseLinearAttention(torch.autograd.Function):
    """`train_forward` and `train_backward` for eager autograd."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        ctx.needed = [isinstance(x, Tensor) and need for x, need in zip(arguments[:DIFFERENTIABLE], ctx.needs_input_grad, strict=False)]
        out, saved = train_forward(ctx.needed, *arguments)
        kept = keeps(ctx.needed, Call(*arguments))
        tensors = [x if isinstance(x, Tensor) and keep else None for x, keep in zip(arguments, kept, strict=True)]
        ctx.save_for_backward(out if any(ctx.needed[:7]) else None, *tensors, *saved)
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


def _problem(
    call: Call, qkv: tuple[Tensor, Tensor, Tensor], means: tuple[Tensor, Tensor], kv_indices: Tensor, bits: Tensor, skipped: Tensor
) -> Problem:
    return Problem(
        *qkv, kv_indices, bits, skipped, call.negligible, means if call.block_means else None, call.proj, call.order,
        call.v.shape[-2], call.pinned_queries, call.v.shape[-1] ** -0.5 if call.scale is None else call.scale,
        call.linear, call.feature_map, call.block_q, call.block_k,
    )  # fmt: skip
