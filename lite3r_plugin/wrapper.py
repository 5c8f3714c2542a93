"""Modules that take the place of a host's module without taking it apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .errors import WeightsError

# The host is not set yet while unpickling. The others are accelerate's: it would take the forward that it wrapped of the host for ours.
_OWN = ("host", "_hf_hook", "_old_forward")


class HostWrapper(nn.Module):
    """Shares the host's tables of parameters, buffers, children and hooks.

    Whatever replaces a child or a parameter is seen by both, `state_dict` keys stay as they were, and the host itself is
    always there, whole, to run or to be put back.

    Args:
        host: The module to stand in for.

    Attributes:
        host: It. Not a child: its children are this module's own.
    """

    def __init__(self, host: nn.Module) -> None:
        nn.Module.__init__(self)
        for table in vars(nn.Module()):
            object.__setattr__(self, table, getattr(host, table))
        object.__setattr__(self, "host", host)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _OWN:
                raise
            return getattr(self.host, name)

    def run_host(self, *args: Any, **kwargs: Any) -> Any:
        """The host's own forward, with the parameters as they are now."""
        self.host.training = self.training
        return self.host.forward(*args, **kwargs)

    def release(self) -> nn.Module:
        """Give back the host, as it was before."""
        self.host.training = self.training
        return self.host

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise WeightsError(
            "torch.nn.DataParallel copies the weights of a model for each GPU, but what Lite3R put in would run those of the first: use "
            "torch.nn.parallel.DistributedDataParallel, or call remove_lite3r(model) first"
        )


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether somebody watches the calls of `module`, which then must be called."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


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


def share_hooks(made: nn.Module, host: nn.Module) -> None:
    """Let `made`, which takes the place of `host` for good, have its hooks."""
    for table in vars(nn.Module()):
        if "hooks" in table:
            object.__setattr__(made, table, getattr(host, table))


def replace_modules(modules: dict[str, nn.Module], replacements: Mapping[nn.Module, Callable[[], nn.Module]]) -> None:
    """Put what each value makes where its key is, at every name that it has; one after the other, made just before.

    Args:
        modules: All modules of a model by all their names; kept up to date.
        replacements: By the module to replace, what makes the one in its place.
    """
    places: dict[nn.Module, list[str]] = {}
    for name, module in modules.items():
        if module in replacements:
            places.setdefault(module, []).append(name)
    for module, names in places.items():
        made = replacements[module]()
        for name in names:
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, made)
            modules[name] = made
