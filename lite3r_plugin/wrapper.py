"""Modules that take the place of a host's module without taking it apart, and changes of a model that are all made or none."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, MutableMapping
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .errors import WeightsError

# The host is not set yet while unpickling. The others are accelerate's: it would take the forward that it wrapped of the host for ours.
_OWN = ("host", "_hf_hook", "_old_forward")

TABLES = tuple(vars(nn.Module()))


class Changes:
    """Changes of a model that belong together: an error or an interruption inside the context takes all of them back.

    What can fail is to be made before, so that only small steps are left to do inside. How a change is undone is written down
    before it is made, lest an interruption come in between; so undoing one that was not made must do no harm.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> Changes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            return
        try:
            self.undo()
        finally:
            self.undo()  # the rest, where a second interruption came

    def undo(self) -> None:
        """Take all changes back, the last one first."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    def make(self, do: Callable[[], object], undo: Callable[[], object]) -> None:
        """Make a change by calling `do`, which `undo` takes back."""
        self._undo.append(undo)
        do()

    def put(self, table: MutableMapping[str, Any], key: str, value: Any) -> None:
        """``table[key] = value``."""
        undo = functools.partial(table.__setitem__, key, table[key]) if key in table else functools.partial(table.pop, key, None)
        self.make(functools.partial(table.__setitem__, key, value), undo)

    def drop(self, table: MutableMapping[str, Any], key: str) -> None:
        """``del table[key]``, if it is there."""
        if key in table:
            self.make(functools.partial(table.pop, key, None), functools.partial(table.__setitem__, key, table[key]))


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
        self._added: dict[str, list[str]] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _OWN:
                raise
            return getattr(self.host, name)

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

    def run_host(self, *args: Any, **kwargs: Any) -> Any:
        """The host's own forward, with the parameters as they are now."""
        self.host.training = self.training
        return self.host.forward(*args, **kwargs)

    def release(self) -> nn.Module:
        """The host, to be put back (`replace_modules`): trained or evaluated as this module was."""
        self.host.training = self.training
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
    for table in TABLES:
        if "hooks" in table:
            object.__setattr__(made, table, getattr(host, table))


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
            parent, _, child = name.rpartition(".")
            changes.put(modules[parent]._modules, child, new)
            modules[name] = new
        if isinstance(new, HostWrapper):
            new.join(changes)
