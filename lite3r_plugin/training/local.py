"""Training block by block: each block against its own teacher on its own input, without a backward pass through the model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.outputs import tensors_of
from ..errors import AdapterError, ConfigError
from .draws import drawing, new_seed
from .features import Recorder, hooked, is_compiled
from .record import run_on
from .teacher import Originals, as_teacher, evaluated
from .watched import Watched


class LocalPass:
    """One forward in which every block that learns is compared with the dense block on the same input, and learns from that alone.

    What a block gives out is detached before the next one gets it, and the backward pass of a block runs as soon as its loss is known:
    no more than one block is kept in memory.

    Args:
        watched: The blocks, and sites in them.
        recorder: Which watches them.
        weights: By the name of the loss.
        originals: As for `as_teacher`.

    Attributes:
        parts: The losses by name, weighted and detached, once it has run.

    Raises:
        ConfigError: no block learns, or one that does is compiled.
    """

    def __init__(self, watched: Watched, recorder: Recorder, weights: Mapping[str, float], originals: Originals | None = None) -> None:
        learning = {name: block.module for name, block in watched.blocks.items() if any(p.requires_grad for p in block.module.parameters())}
        if not learning:
            raise ConfigError("no transformer block has anything that learns, so there is nothing to train block by block")
        if compiled := [name for name, block in learning.items() if any(map(is_compiled, block.modules()))]:
            raise ConfigError(f"the {compiled[0]} is compiled, and mode='local' has to stop between blocks: compile after training")
        self.parts: dict[str, Tensor] = {}
        self._watched, self._recorder, self._originals = watched, recorder, originals
        self._weights = {name: weight for name, weight in weights.items() if weight}
        self._blocks = learning
        self._names = {name: watched.within(name) for name in learning}
        self._sites = len({name for names in self._names.values() for name in names[1:]})
        self._learns = torch.is_grad_enabled()
        self._teaching = False
        self._running: str | None = None
        self._student = contextlib.ExitStack()

    def run(self, model: nn.Module, inputs: Any) -> None:
        """Run `model`, bare, on `inputs`, in eval mode. Afterwards there are `parts`, and gradients where they are enabled.

        Raises:
            AdapterError: a block changes its input, or student and teacher do not run the same.
        """
        with torch.no_grad(), evaluated(model), hooked(self._blocks, self._after, self._before), self._student:
            run_on(model, inputs)

    def _before(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._running is not None:  # the teacher's run of it, or a block inside a block
            return
        self._running, self._teaching = name, True
        given = [(x, x._version) for x in tensors_of((args, kwargs)).values()]
        seed, device = new_seed(), given[0][0].device
        with as_teacher(module, self._originals), drawing(seed, device), self._recorder.recording(self._names[name]) as recording:
            module(*args, **kwargs)
        if any(x._version != version for x, version in given):
            raise AdapterError(f"the {name} changes its input in place, so that it cannot run twice on it: use mode='end_to_end'")
        self._teaching, self._true = False, recording.features()
        self._mine = self._student.enter_context(self._recorder.recording(self._names[name]))
        self._student.enter_context(drawing(seed, device))
        self._student.enter_context(torch.set_grad_enabled(self._learns))

    def _after(self, name: str, module: nn.Module, output: Any) -> Any:
        if self._teaching or name != self._running:
            return None
        errors = self._watched.compare(self._mine.features(), self._true, self._weights)
        counts = {"attention": self._sites, "blocks": len(self._blocks), "cameras": len(self._blocks)}
        losses = {loss: self._weights[loss] * torch.stack(values).sum() / counts[loss] for loss, values in errors.items()}
        if losses and self._learns:
            total = torch.stack([loss.float() for loss in losses.values()]).sum()
            with torch.autocast(total.device.type, enabled=False):
                total.backward()
        self._student.close()
        self._running = None
        for loss, value in losses.items():
            self.parts[loss] = self.parts.get(loss, 0) + value.detach()
        return _detached(output)


def _detached(output: Any) -> Any:
    """`output` with its tensors detached, in nested lists, tuples and mappings."""
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, tuple):
        parts = [_detached(x) for x in output]
        return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)
    if isinstance(output, list):
        return [_detached(x) for x in output]
    if isinstance(output, Mapping):
        made: Any = copy.copy(output)
        for key, value in output.items():
            made[key] = _detached(value)
        return made
    return output
