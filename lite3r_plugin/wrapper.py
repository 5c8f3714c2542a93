"""Modules that take the place of a host's module without taking it apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


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
            if name == "host":  # not set yet, while unpickling
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


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether somebody watches the calls of `module`, which then must be called."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


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
