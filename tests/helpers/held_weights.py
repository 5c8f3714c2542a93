"""Weights that only their module can use: lent for the time of a call, or of a class of their own."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def lend(owner: nn.Module, *, whole: bool = False) -> nn.Module:
    """Put the parameters of `owner` and of all inside on the meta device; each module brings its own in for a call of its forward.

    Args:
        owner: Changed in place, and returned.
        whole: `owner` brings in all of them, and no module inside does anything.
    """
    for module in [owner] if whole else list(owner.modules()):
        inside = list(module.modules()) if whole else [module]
        tables = [(m._parameters, name, p) for m in inside for name, p in m._parameters.items() if p is not None]
        if not tables:
            continue
        module.forward = functools.partial(_lent, module.forward, tables)  # type: ignore[method-assign]
        _put_away(tables)
    return owner


def _lent(forward: Any, tables: list[tuple[dict[str, Any], str, nn.Parameter]], *args: Any, **kwargs: Any) -> Any:
    for table, name, parameter in tables:
        table[name] = parameter
    try:
        return forward(*args, **kwargs)
    finally:
        _put_away(tables)


def _put_away(tables: list[tuple[dict[str, Any], str, nn.Parameter]]) -> None:
    for table, name, parameter in tables:
        table[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)


class OnlyLinear(Tensor):
    """A weight that `F.linear` takes and nothing else does, as of libraries that quantise."""

    @staticmethod
    def __new__(cls, weight: Tensor) -> OnlyLinear:
        made = Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device, requires_grad=False)  # type: ignore[attr-defined]
        made.held = weight
        return made

    def __init__(self, weight: Tensor) -> None:
        self.held: Tensor

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: Any) -> OnlyLinear:
        return cls(inner["held"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return F.linear(args[0], args[1].held, *args[2:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].held)
        raise NotImplementedError(f"OnlyLinear has no {func}")


def hold(model: nn.Module) -> nn.Module:
    """Let every Linear inside `model` have an `OnlyLinear` as its weight."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(OnlyLinear(module.weight.detach()), requires_grad=False)
    return model
