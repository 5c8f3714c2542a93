"""Modules that take the place of a host's module without taking it apart."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, nn

from ..errors import WeightsError
from .changes import Changes
from .holding import outside

if TYPE_CHECKING:
    from typing_extensions import Self

# The host is not set yet while unpickling. The others are accelerate's: it would take the forward that it wrapped of the host for ours.
_OWN = ("host", "_hf_hook", "_old_forward")

TABLES = tuple(vars(nn.Module()))


class HostWrapper(nn.Module):
    """Shares the host's tables of parameters, buffers, children and hooks.

    Whatever replaces a child or a parameter is seen by both, `state_dict` keys stay as they were, and the host itself is
    always there, whole, to run or to be put back.

    It is made without touching the host: until `join` it has copies of the tables, and in them what it adds.

    Args:
        host: The module to stand in for.

    Attributes:
        host: It. Not a child: its children are this module's own.
    """

    def __init__(self, host: nn.Module) -> None:
        nn.Module.__init__(self)
        for table in TABLES:
            object.__setattr__(self, table, copy.copy(getattr(host, table)))
        object.__setattr__(self, "host", host)
        self._version = host._version  # of what its class writes into state dicts
        self._added: dict[str, list[str]] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _OWN:
                raise
            return getattr(self.host, name)

    def __getstate__(self) -> dict[str, Any]:
        return outside(self)

    def join(self, changes: Changes) -> None:
        """Share the host's tables from now on, and add to them what this module has of its own."""
        for name in TABLES:
            own, shared = vars(self)[name], vars(self.host)[name]
            if not isinstance(shared, (dict, set)):
                continue
            object.__setattr__(self, name, shared)
            self._added[name] = [key for key in own if key not in shared]
            for key in self._added[name]:
                if isinstance(shared, set):
                    changes.make(functools.partial(shared.add, key), functools.partial(shared.discard, key))
                else:
                    changes.put(shared, key, own[key])

    def leave(self, changes: Changes) -> None:
        """Take out of the host's tables what this module has added."""
        for name, keys in self._added.items():
            shared = vars(self)[name]
            for key in keys:
                if isinstance(shared, set):
                    changes.make(functools.partial(shared.discard, key), functools.partial(shared.add, key))
                else:
                    changes.drop(shared, key)

    # What a class may do in its own way, with attributes that are in no table: the host does it, to the tables that both share.

    def train(self, mode: bool = True) -> Self:
        """As the host does."""
        self.host.train(mode)
        self.training = self.host.training
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if recurse:  # which torch leaves out, too, where a class may take one argument alone
            self.host._apply(fn)
        else:
            self.host._apply(fn, recurse=False)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.host._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        self.host._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def run_host(self, *args: Any, **kwargs: Any) -> Any:
        """The host's own forward, with the parameters as they are now."""
        self.host.training = self.training
        return self.host.forward(*args, **kwargs)

    def release(self) -> nn.Module:
        """The host, to be put back (`replace_modules`): trained or evaluated as this module was."""
        self.host.training = self.training
        self.host._is_full_backward_hook = self._is_full_backward_hook  # of the table of hooks that they share
        return self.host

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise WeightsError(
            "torch.nn.DataParallel copies the weights of a model for each GPU, but what Lite3R put in would run those of the first: use "
            "torch.nn.parallel.DistributedDataParallel, or call remove_lite3r(model) first"
        )


def host_of(module: nn.Module) -> nn.Module:
    """The module that `module` takes the place of, or itself."""
    while isinstance(module, HostWrapper):
        module = module.host
    return module


def share_hooks(made: nn.Module, host: nn.Module) -> None:
    """Let `made`, which takes the place of `host` for good, have its hooks."""
    for table in TABLES:
        if "hooks" in table:
            object.__setattr__(made, table, getattr(host, table))


def put_module(changes: Changes, modules: Mapping[str, nn.Module], name: str, module: nn.Module) -> None:
    """Put `module` where one of `modules`, those of a model by name, is; `modules` themselves stay."""
    outer, _, child = name.rpartition(".")
    parent = modules[outer]
    anew = getattr(parent, "_initialize", None) if child == "_orig_mod" else None
    if anew is not None:  # what `torch.compile` gives calls what it was made of, until it is told anew
        changes.make(lambda: None, anew)
    changes.put(parent._modules, child, module)
    if anew is not None:
        changes.make(anew, lambda: None)


def replace_modules(changes: Changes, modules: dict[str, nn.Module], made: Mapping[nn.Module, nn.Module]) -> None:
    """Put each value of `made` where its key is, at every name that it has; wrappers leave and join the tables of their hosts.

    A wrapper goes in before and comes out after anything that it adds: whoever finds none has nothing to clean up.

    Args:
        changes: Takes note of what is done.
        modules: All modules of a model by all their names; kept up to date.
        made: By the module to replace, the one in its place.
    """
    places: dict[nn.Module, list[str]] = {}
    for name, module in modules.items():
        if module in made:
            places.setdefault(module, []).append(name)
    for old, names in places.items():
        new = made[old]
        if isinstance(old, HostWrapper):
            old.leave(changes)
        for name in names:
            put_module(changes, modules, name, new)
            modules[name] = new
        if isinstance(new, HostWrapper):
            new.join(changes)
