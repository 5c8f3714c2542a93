"""What modules of a model give out in one forward, read by hooks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.outputs import tensors_of
from ..errors import AdapterError, ConfigError

Before = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], None]
"""Sees the name of a module, it, and its arguments."""
After = Callable[[str, nn.Module, Any], Any]
"""Sees the name of a module, it, and its output, and gives another output or None."""


@contextlib.contextmanager
def hooked(modules: Mapping[str, nn.Module], after: After, before: Before | None = None) -> Iterator[None]:
    """Call `before` and `after` around each call of each of `modules`, by name, while the context is open."""
    added: list[tuple[dict[int, Any], Any]] = []
    try:
        try:
            for name, module in modules.items():
                if before is not None:
                    hook = functools.partial(_before, before, name)
                    added.append((module._forward_pre_hooks, hook))
                    module.register_forward_pre_hook(hook, with_kwargs=True)
                hook = functools.partial(_after, after, name)
                added.append((module._forward_hooks, hook))
                module.register_forward_hook(hook)
            yield
        finally:
            _remove(modules, added)
    finally:
        _remove(modules, added)  # the rest, where an interruption came


def _before(call: Before, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    call(name, module, args, kwargs)


def _after(call: After, name: str, module: nn.Module, args: Any, output: Any) -> Any:
    return call(name, module, output)


def _remove(modules: Mapping[str, nn.Module], added: list[tuple[dict[int, Any], Any]]) -> None:
    """Hooks are looked for: where registering one was interrupted, nobody was given a handle of it."""
    while added:
        table, own = added[-1]
        for key in [key for key, hook in table.items() if hook is own]:
            for module in modules.values():
                module._forward_pre_hooks_with_kwargs.pop(key, None)
            del table[key]
        added.pop()


@dataclass
class Recording:
    """Outputs of modules in one forward.

    Attributes:
        wanted: Names of the modules to record; None: all from which gradients may come.
        found: By name, the outputs of each call, in order, with the version that it had; with `wanted` None also names of modules
            that ran and were not recorded.
    """

    wanted: Collection[str] | None
    found: dict[str, list[tuple[Tensor, int]]] = field(default_factory=dict)

    def features(self) -> dict[str, list[Tensor]]:
        """The outputs by name. Raises `AdapterError` where the model has changed one of them in place since."""
        for name, outputs in self.found.items():
            if any(tensor._version != version for tensor, version in outputs):
                raise AdapterError(f"the model changes the output of the {name} in place, so that it cannot be compared")
        return {name: [tensor for tensor, _ in outputs] for name, outputs in self.found.items() if outputs}


class Recorder:
    """Records outputs of modules while a `recording` is open, and does nothing else: in the recomputation of checkpointing neither.

    Args:
        modules: By the name under which outputs are recorded, what they are of.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = dict(modules)
        self._recording: Recording | None = None

    def attached(self) -> contextlib.AbstractContextManager[None]:
        """Watch the modules while the context is open."""
        return hooked(self.modules, self._see)

    @contextlib.contextmanager
    def recording(self, wanted: Collection[str] | None = None) -> Iterator[Recording]:
        """Record what is given out inside the context. Of several open ones, the last opened records."""
        outer, recording = self._recording, Recording(wanted)
        self._recording = recording
        try:
            yield recording
        finally:
            self._recording = outer

    def _see(self, name: str, module: nn.Module, output: Any) -> None:
        recording = self._recording
        if recording is None or (recording.wanted is not None and name not in recording.wanted):
            return
        tensors = _streams(output)
        if not tensors:
            raise AdapterError(f"the {name} gives out no floating-point tensor to compare")
        outputs = recording.found.setdefault(name, [])
        if recording.wanted is None and not any(tensor.requires_grad for tensor in tensors):
            if not torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
                raise ConfigError(f"the {name} is to learn, but runs without gradients; if it is checkpointed, pass use_reentrant=False")
            return  # nothing before it learns
        outputs += [(tensor, tensor._version) for tensor in tensors]


def _streams(output: Any) -> list[Tensor]:
    """The features in an output: its first floating-point tensor, and others of that width, as of a block that leads two images on.

    What else a block gives out, such as weights of attention, is none.
    """
    tensors = [x for x in tensors_of(output).values() if x.is_floating_point()]
    return [x for x in tensors if x.dim() == tensors[0].dim() and x.shape[-1:] == tensors[0].shape[-1:]]


def is_compiled(module: nn.Module) -> bool:
    """Whether `module` is run by `torch.compile`, by way of its method `compile` or of a module around it."""
    return getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules
