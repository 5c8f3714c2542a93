"""The whole operator with flat arguments, and the same as operators of `torch.library`.

`run` is what an eager call runs: the torch path there has gradients by autograd. `torch.compile` and `torch.export` see
three opaque operators instead, so that a graph holds one node for each site and serves any number of tokens:

    lite3r::sparse_linear_attention            no gradients
    lite3r::sparse_linear_attention_train      returns what its backward needs as well
    lite3r::sparse_linear_attention_backward
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..block_map import block_map
from ..dispatch import on_device_of, register, use_triton, without_autocast
from . import naive
from .call import DIFFERENTIABLE, Call

TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, Tensor? k_bias, Tensor? proj"
OPTIONS = (
    "Tensor? order, Tensor? positions, SymInt pinned_tokens, float keep_ratio, float negligible_ratio, str? q_kind, float q_eps, "
    "str? k_kind, float k_eps, float? rope_base, float? scale, str linear, str feature_map, bool block_means, int block_q, int block_k, "
    "str backend"
)


def run(*arguments: Any, needs_grad: bool = False) -> Tensor:
    """`sparse_linear_attention` of the package above, from a flat `Call` and the backend. Returns ``[B, H, N, D]`` in v's dtype."""
    *flat, backend = arguments
    call = Call.of(*flat)
    # Autocast would run the pooled scores and the linear state in half precision.
    with without_autocast(call.v), on_device_of(call.v):
        triton = use_triton(backend, call.v, needs_grad)
        prepared = call.prepared(triton)
        options: dict[str, Any] = dict(
            pinned=call.pinned_queries,
            scale=call.scale,
            linear=call.linear,
            feature_map=call.feature_map,
            proj=call.proj,
            block_q=call.block_q,
            block_k=call.block_k,
        )
        if triton:
            from ..block_map.kernels import block_map_with_bits
            from . import kernels

            wanted = call.block_means or call.linear == "marginal"
            found = block_map_with_bits(prepared.q_mean, prepared.k_mean, **call.blocks, bits=wanted)
            means = (prepared.k_mean, prepared.v_mean) if call.block_means else None
            return kernels.sparse_linear_attention(
                *prepared[:3], found.kv_indices, tokens=call.v.shape[-2], bits=found.skipped, negligible=call.negligible,
                means=means, order=call.order, **options,
            )  # fmt: skip
        kv_indices, negligible = block_map(prepared.q_mean.detach(), prepared.k_mean.detach(), **call.blocks)
        out = naive.sparse_linear_attention(*prepared[:3], kv_indices, negligible=negligible, block_means=call.block_means, **options)
        return out if call.order is None else torch.empty_like(out).index_copy(-2, call.order.long(), out)


def _rows_first(x: Tensor) -> Tensor:
    """``[B, H, N, D] -> [B, N, H, D]`` contiguous, the layout that a graph can rely on; free for what the kernels return."""
    return x.transpose(1, 2).contiguous()


def _trains_on_triton(arguments: tuple[Any, ...]) -> bool:
    return use_triton(arguments[-1], arguments[2], needs_grad=True)


def _infer(*arguments: Any) -> Tensor:
    return _rows_first(run(*arguments))


def _train(needed: list[bool], *arguments: Any) -> tuple[Tensor, list[Tensor]]:
    if not _trains_on_triton(arguments):
        return _rows_first(run(*arguments, needs_grad=True)), []
    from . import training

    out, saved = training.train_forward(needed, *arguments[:-1])
    return _rows_first(out), saved


def _backward(grad: Tensor, out: Tensor | None, saved: list[Tensor], needed: list[bool], *arguments: Any) -> list[Tensor]:
    """Gradients of the tensors that are `needed`; on the torch path, which saved nothing, by autograd through it, run again."""
    if saved:
        from . import training

        out = None if out is None else out.transpose(1, 2)
        found = training.train_backward(grad.transpose(1, 2), out, saved, needed, *arguments[:-1])
        grads = [x for x in found if x is not None]
    else:
        tensors = zip(arguments[:DIFFERENTIABLE], needed, strict=True)
        with torch.enable_grad():
            leaves: list[Any] = [None if x is None else x.detach().requires_grad_(need) for x, need in tensors]
            wanted = [x for x in leaves if x is not None and x.requires_grad]
            result = run(*leaves, *arguments[DIFFERENTIABLE:], needs_grad=True).transpose(1, 2)
            grads = torch.autograd.grad(result, wanted, grad, allow_unused=True, materialize_grads=True)
    return [_rows_first(x).transpose(1, 2) if x.dim() == 4 else x.contiguous() for x in grads]


def _fake_out(*arguments: Any) -> Tensor:
    v = arguments[2]
    batch, heads, tokens, dim = v.shape
    return v.new_empty(batch, tokens, heads, dim)


def _fake_train(needed: list[bool], *arguments: Any) -> tuple[Tensor, list[Tensor]]:
    if not _trains_on_triton(arguments):
        return _fake_out(*arguments), []
    from . import training

    return _fake_out(*arguments), training.train_saved(needed, *arguments[:-1])


def _fake_backward(grad: Tensor, out: Tensor | None, saved: list[Tensor], needed: list[bool], *arguments: Any) -> list[Tensor]:
    found = []
    for i, (x, need) in enumerate(zip(arguments, needed, strict=False)):
        if need and i < 3:
            found.append(grad.new_empty(grad.shape, dtype=grad.dtype if x is None else x.dtype).transpose(1, 2))
        elif need:
            found.append(x.new_empty(x.shape))
    return found


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    """Keep what the backward pass needs: all inputs; with Triton the output too, and what it says of the inputs."""
    needed, *arguments = inputs
    out, saved = output
    kept = [True] * len(arguments)
    if saved:
        from . import training

        kept = [*training.keeps(needed, Call(*arguments[:-1])), False]
    tensors = [x if isinstance(x, Tensor) and keep else None for x, keep in zip(arguments, kept, strict=True)]
    ctx.save_for_backward(out if saved and any(needed[:-1]) else None, *tensors, *saved)
    ctx.others = [None if isinstance(x, Tensor) else x for x in arguments]
    ctx.needed = needed


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # create_graph=True: the backward operator has no derivative, and it would be taken for zero
        raise NotImplementedError("sparse-linear attention has no second derivatives: use dense attention (lite3r_disabled) for them")
    out, *rest = ctx.saved_tensors
    count = len(ctx.others)
    arguments = [other if x is None else x for x, other in zip(rest[:count], ctx.others, strict=True)]
    grads = iter(torch.ops.lite3r.sparse_linear_attention_backward(grad, out, rest[count:], ctx.needed, *arguments))
    return (None, *(next(grads) if need else None for need in ctx.needed), *(None for _ in arguments[DIFFERENTIABLE:]))


infer = register("sparse_linear_attention", f"({TENSORS}, {OPTIONS}) -> Tensor", _infer, _fake_out)
train = register("sparse_linear_attention_train", f"(bool[] needed, {TENSORS}, {OPTIONS}) -> (Tensor, Tensor[])", _train, _fake_train)
register(
    "sparse_linear_attention_backward",
    # q, k and v are None where they are not kept: where only Proj learns, or where they are saved in order.
    f"(Tensor grad, Tensor? out, Tensor[] saved, bool[] needed, {TENSORS.replace('Tensor ', 'Tensor? ')}, {OPTIONS}) -> Tensor[]",
    _backward,
    _fake_backward,
)

torch.library.register_autograd("lite3r::sparse_linear_attention_train", _differentiate, setup_context=_keep)
