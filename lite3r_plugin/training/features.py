"""What modules of a model give out in one forward, gathered by hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.outputs import tensors_of
from ..errors import AdapterError, ConfigError


@dataclass
class Recording:
    """Outputs of modules in one forward.

    Attributes:
        wanted: Names of the modules to record, or None for all from which a gradient may come.
        found: By name, the outputs of each call, in order, with the version that they had.
    """

    wanted: Collection[str] | None
    found: dict[str, list[tuple[Tensor, int]]] = field(default_factory=dict)

    def features(self) -> dict[str, list[Tensor]]:
        """The outputs by name. Raises `AdapterError` where the model has changed one of them in place since."""
        for name, outputs in self.found.items():
            if any(tensor._version != version for tensor, version in outputs):
                raise AdapterError(
                    f"the output of {name!r} was changed in place after it, so it cannot be compared; take a loss of another kind"
                )
        return {name: [tensor for tensor, _ in outputs] for name, outputs in self.found.items()}


class FeatureHooks:
    """Forward hooks that record outputs of modules while `recording`, and do nothing else: in the recomputation of checkpointing neither.

    Args:
        modules: By the name under which their outputs are recorded.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = dict(modules)
        self._recording: Recording | None = None
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Watch the modules."""
        for name, module in self.modules.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))

    def detach(self) -> None:
        """Stop watching."""
        while self._handles:
            self._handles[-1].remove()
            self._handles.pop()

    @contextlib.contextmanager
    def recording(self, wanted: Collection[str] | None = None) -> Iterator[Recording]:
        """Record what is given out inside the context."""
        self._recording = recording = Recording(wanted)
        try:
            yield recording
        finally:
            self._recording = None

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            recording = self._recording
            if recording is None or (recording.wanted is not None and name not in recording.wanted):
                return
            tensor = next((x for x in tensors_of(output).values() if x.is_floating_point()), None)
            if tensor is None:
                raise AdapterError(f"{name!r} gives out no floating-point tensor to compare")
            if recording.wanted is None and not tensor.requires_grad:
                if not torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
                    raise ConfigError(
                        f"the {name} is to learn, but runs without gradients; if it is checkpointed, pass use_reentrant=False to that"
                    )
                return  # nothing before it learns
            recording.found.setdefault(name, []).append((tensor, tensor._version))

        return hook
