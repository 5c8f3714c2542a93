"""The whole operator as operators of `torch.library`, which `torch.compile` and `torch.export` keep as they are.

A graph then holds one node for each site and serves any number of tokens:

    lite3r::sparse_linear_attention            no gradients
    lite3r::sparse_linear_attention_lse        no gradients; returns the log-sum-exp of queries too
    lite3r::sparse_linear_attention_train      returns what its backward needs as well
    lite3r::sparse_linear_attention_backward

Their arguments are those of `signature.Arguments`, flat, and their results ``[B, M, H, D]`` contiguous, a layout that a graph can
rely on. `infer`, `infer_lse` and `train` are the first three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import register
from . import forward, saved
from .saved import Saved
from .signature import INPUTS, Arguments, Gradients, Needed, schema


def _rows_first(x: Tensor) -> Tensor:
    """``[B, H, N, D] -> [B, N, H, D]`` contiguous; free for what the kernels return."""
    return x.transpose(1, 2).contiguous()


def _infer(*flat: Any) -> Tensor:
    return _rows_first(forward.run(Arguments(*flat))[0])


def _infer_lse(*flat: Any) -> tuple[Tensor, Tensor]:
    out, lse = forward.run(Arguments(*flat))
    assert lse is not None
    return _rows_first(out), lse


def _train(needed: list[bool], *flat: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    arguments = Arguments(*flat)
    if forward.on_triton(arguments, needs_grad=True):
        out, lse, kept = forward.train(Needed(*needed), arguments)
    else:
        (out, lse), kept = forward.run(arguments, needs_grad=True), Saved()
    return _rows_first(out), [] if lse is None else [lse], kept.tensors()


def _backward(grad: Tensor, grad_lse: Tensor | None, out: Tensor | None, needed: list[bool], *flat: Any) -> list[Tensor]:
    """Gradients of the inputs that are `needed`; on the torch path, which saved nothing, by autograd through it, run again."""
    kept, arguments = Saved(*flat[: len(Saved._fields)]), Arguments(*flat[len(Saved._fields) :])
    if kept.is_empty:
        grads = _by_autograd(grad, grad_lse, Needed(*needed), arguments)
    else:
        from .backward import backward

        out = None if out is None else out.transpose(1, 2)
        grads = [x for x in backward(grad.transpose(1, 2), grad_lse, out, kept, Needed(*needed), arguments) if x is not None]
    return [_rows_first(x).transpose(1, 2) if x.dim() == 4 else x.contiguous() for x in grads]


def _by_autograd(grad: Tensor, grad_lse: Tensor | None, needed: Needed, arguments: Arguments) -> list[Tensor]:
    with torch.enable_grad():
        inputs = zip(arguments.inputs, needed, strict=True)
        leaves: list[Any] = [None if x is None else x.detach().requires_grad_(need) for x, need in inputs]
        wanted = [x for x in leaves if x is not None and x.requires_grad]
        out, lse = forward.run(Arguments(*leaves, *arguments.options), needs_grad=True)
        results, grads = ([out], [grad.transpose(1, 2)]) if grad_lse is None else ([out, lse], [grad.transpose(1, 2), grad_lse])
        return list(torch.autograd.grad(results, wanted, grads, allow_unused=True, materialize_grads=True))


def _fake_infer(*flat: Any) -> Tensor:
    arguments = Arguments(*flat)
    batch, heads, queries, dim = arguments.q.shape
    return arguments.v.new_empty(batch, queries, heads, dim)


def _fake_infer_lse(*flat: Any) -> tuple[Tensor, Tensor]:
    arguments = Arguments(*flat)
    wide = torch.promote_types(arguments.v.dtype, torch.float32)
    return _fake_infer(*flat), arguments.v.new_empty(arguments.q.shape[:-1], dtype=wide)


def _fake_train(needed: list[bool], *flat: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    arguments = Arguments(*flat)
    kept = saved.empty(Needed(*needed), arguments).tensors() if forward.on_triton(arguments, needs_grad=True) else []
    return _fake_infer(*flat), [_fake_infer_lse(*flat)[1]] if arguments.return_lse else [], kept


def _fake_backward(grad: Tensor, grad_lse: Tensor | None, out: Tensor | None, needed: list[bool], *flat: Any) -> list[Tensor]:
    inputs = Gradients(*Arguments(*flat[len(Saved._fields) :]).inputs)
    found = []
    for name, x, need in zip(INPUTS, inputs, needed, strict=True):
        if need and name in ("q", "k", "v"):  # which may not have been kept: never of other keys than queries
            like, (batch, heads, tokens, dim) = (grad, grad.transpose(1, 2).shape) if x is None else (x, x.shape)
            found.append(like.new_empty(batch, tokens, heads, dim).transpose(1, 2))
        elif need:
            found.append(x.new_empty(x.shape))
    return found


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor], list[Tensor]]) -> None:
    needed, arguments = Needed(*inputs[0]), Arguments(*inputs[1:])
    out, _, tensors = output
    saved.keep(ctx, needed, arguments, out, Saved.of(tensors, needed, arguments))


def _differentiate(ctx: Any, grad: Tensor, grads_lse: list[Tensor | None], _: Any) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # create_graph=True: the backward operator has no derivative, and it would be taken for zero
        raise NotImplementedError("sparse-linear attention has no second derivatives: use dense attention (lite3r_disabled) for them")
    out, kept, needed, arguments = saved.kept(ctx)
    grads = iter(torch.ops.lite3r.sparse_linear_attention_backward(grad, *(grads_lse or [None]), out, list(needed), *kept, *arguments))
    return (None, *(next(grads) if need else None for need in needed), *(None for _ in arguments.options))


ARGUMENTS = schema(Arguments)
# Inputs that are not kept are None there.
KEPT_ARGUMENTS = ARGUMENTS.replace("Tensor ", "Tensor? ")

infer = register("sparse_linear_attention", f"({ARGUMENTS}) -> Tensor", _infer, _fake_infer)
infer_lse = register("sparse_linear_attention_lse", f"({ARGUMENTS}) -> (Tensor, Tensor)", _infer_lse, _fake_infer_lse)
# The log-sum-exp in a list, which is empty where it is not wanted.
train = register("sparse_linear_attention_train", f"(bool[] needed, {ARGUMENTS}) -> (Tensor, Tensor[], Tensor[])", _train, _fake_train)
register(
    "sparse_linear_attention_backward",
    f"(Tensor grad, Tensor? grad_lse, Tensor? out, bool[] needed, {schema(Saved, prefix='saved_')}, {KEPT_ARGUMENTS}) -> Tensor[]",
    _backward,
    _fake_backward,
)
torch.library.register_autograd("lite3r::sparse_linear_attention_train", _differentiate, setup_context=_keep)
