"""Whether the forward of a module may be passed by, and its parameters read instead."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def forward_parameters(module: nn.Module) -> Mapping[str, inspect.Parameter] | None:
    """The arguments of the forward of `module` by name, in order; None where they cannot be read.

    A forward that somebody has exchanged may be any object that can be called, with any `__signature__`.
    """
    try:
        return inspect.signature(module.forward).parameters
    except Exception:  # whatever that object raises
        return None


def argument_names(module: nn.Module) -> tuple[str, ...] | None:
    """The names of `forward_parameters`."""
    parameters = forward_parameters(module)
    return None if parameters is None else tuple(parameters)


def argument_defaults(module: nn.Module) -> dict[str, Any]:
    """What `forward_parameters` are where they are not given: those that are something then, which None and False are not.

    Whatever is no bool, number or text, nor a tuple of them, is an Ellipsis, so that this may be copied and pickled.
    """
    parameters = forward_parameters(module) or {}
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    return {name: x if _is_plain(x) else ... for name, x in defaults.items() if not _says_nothing(x, None)}


_PLAIN = (bool, int, float, str)


def asked_for(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments `given` by name with which a forward does something else than without, as far as can be told.

    Not those that are as `argument_defaults` are; where there is none, None, False and a list of None, as of tokens without positions,
    ask for nothing.
    """
    return {name: value for name, value in given.items() if not _says_nothing(value, defaults.get(name))}


def _is_plain(value: Any) -> bool:
    return type(value) in _PLAIN or (type(value) is tuple and all(item is None or type(item) in _PLAIN for item in value))


def _says_nothing(value: Any, default: Any) -> bool:
    if default is not None:
        return type(value) is type(default) and _is_plain(value) and value == default
    if isinstance(value, (list, tuple)):
        return all(item is None for item in value)
    return value is None or value is False


def by_name(names: Sequence[str], args: Sequence[Any]) -> dict[str, Any]:
    """Positional arguments by the `names` of a forward; what is more of either is left out."""
    return dict(zip(names, args))  # noqa: B905 (the compiler of torch 2.9 takes any value of `strict` for true)


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether somebody watches the calls of `module`, which then must be called.

    Hooks of an object that says of itself that it `reads_arguments_only` do not count: they see no result.
    """
    if not module._forward_hooks and not module._forward_pre_hooks:
        return False
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not getattr(getattr(hook, "__self__", None), "reads_arguments_only", False) for hook in hooks)


def calls_are_seen() -> bool:
    """Whether a hook for all modules sees every call, and may change what it returns."""
    return bool(nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks)


def must_be_called(module: nn.Module) -> bool:
    """Whether somebody watches the calls of `module`, or has put a forward of its own into this instance, as accelerate does."""
    return has_forward_hooks(module) or "forward" in module.__dict__


def is_plain_tensor(tensor: Tensor) -> bool:
    """Whether any operator may read it: no subclass with operators of its own, such as a DTensor or a quantised weight of torchao."""
    if torch.compiler.is_compiling():  # what is traced is of classes of the compiler
        return not hasattr(tensor, "__tensor_flatten__")
    return type(tensor) in (Tensor, nn.Parameter)


def may_be_read(module: nn.Module) -> bool:
    """Whether the parameters of `module` may be read instead of calling it.

    Not where its calls are hooked or wrapped, which may bring the weights in for a call alone (CPU offload, sharding), nor where a
    parameter is a tensor subclass that only its module knows to use.
    """
    return not must_be_called(module) and all(p is None or is_plain_tensor(p) for p in module._parameters.values())
