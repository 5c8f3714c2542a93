"""Whether a model is still the one whose forward was recorded: a recording reads the memory that was there, whatever is there now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn

from ..wrapper import RewrittenMethod

_TABLES = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
_DEPTH = 3  # of containers in attributes of modules, in which hosts keep tensors


class Watch:
    """A model as it was when this was made: its modules, their code, tensors and hooks, where tensors lie, what is trained and what not.

    It is asked in every replay, a thousand modules in half a millisecond, so everything is compared by addresses and by the identity of
    objects, which this keeps alive. Values that are written into a tensor are read by a replay as they are.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._modules = modules
        self._tables: list[dict[str, Any]] = [vars(module)[name] for module in modules for name in _TABLES]
        self._sizes = list(map(len, self._tables))
        self._filled = [table for table in self._tables if table]
        self._contents = list(chain.from_iterable(map(dict.values, self._filled)))  # kept, so that no identity is another's
        self._identities = list(map(id, self._contents))
        self._tensors = [item for item in self._contents if isinstance(item, Tensor)]
        self._addresses = list(map(Tensor.data_ptr, self._tensors))
        self._trained = list(map(attrgetter("training"), modules))
        self._forwards = self._code()
        self._kept = list(_tensors_in_attributes(modules))

    def in_place(self) -> bool:
        """Whether the memory that its tensors had is still theirs, so that it may be read: of a tensor that was replaced, this keeps it."""
        return list(map(Tensor.data_ptr, self._tensors)) == self._addresses

    def unchanged(self) -> bool:
        """Whether the model holds the same modules, tensors, hooks and forwards, and is trained and evaluated as it was."""
        return (
            list(map(len, self._tables)) == self._sizes
            and list(map(id, chain.from_iterable(map(dict.values, self._filled)))) == self._identities
            and list(map(attrgetter("training"), self._modules)) == self._trained
            and all(map(is_, self._code(), self._forwards))
        )

    def _code(self) -> list[Any]:
        """What runs: the classes of the modules, and the forwards that were laid on them."""
        return [*map(type, self._modules), *(vars(module).get("forward") for module in self._modules)]


def watched_by_others(model: nn.Module, own: Iterable[Any]) -> str | None:
    """Why the forward of `model` must run in Python: somebody sees or exchanges calls inside of it. None where nobody does.

    Args:
        model: The model; hooks on itself run around its forward, so they do not count.
        own: Hooks that need not run.
    """
    known = list(own)
    for fqn, module in model.named_modules():
        if fqn and any(hook not in known for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())):
            return f"{fqn} has forward hooks, which would not run"
        if fqn and not isinstance(vars(module).get("forward"), (RewrittenMethod, type(None))):
            return f"the forward of {fqn} was exchanged by somebody else, such as for CPU offload"
    return None


def _tensors_in_attributes(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """What hosts keep of earlier calls, such as rotary tables: a recording may read it after its host has let it go."""
    for module in modules:
        for name, value in vars(module).items():
            if name not in _TABLES:
                yield from _tensors(value, _DEPTH)


def _tensors(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item, depth - 1)
