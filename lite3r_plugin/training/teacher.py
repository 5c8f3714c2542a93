"""The teacher: the same model, with the same weights, as it was before Lite3R."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from ..apply.verbs import run_dense
from ..wrapper import Changes, is_tuner_layer

Originals = Mapping[nn.Parameter, nn.Parameter]
"""What parameters were that the teacher shares with the student and that learn, by what they are now."""


@contextlib.contextmanager
def as_teacher(model: nn.Module, originals: Originals | None = None) -> Iterator[None]:
    """Run `model`, or a part of it, as its own teacher inside the context: dense, without LoRA, evaluated, without gradients.

    Weights of the model itself that learn are exchanged for what they were, lest the teacher follow its student. They are not written
    to: the student's graph needs them as they are.

    Weights that autocast casts meanwhile are not kept: cast without gradients, they would have none for a student after it either.
    """
    device = next((p.device.type for p in model.parameters()), "cpu")
    with contextlib.ExitStack() as stack:
        for context in (
            torch.no_grad(), run_dense(model.modules()), without_lora(model), as_they_were(model, originals), evaluated(model)
        ):  # fmt: skip
            stack.enter_context(context)
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False))
        yield


def without_lora(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Run `model` without adapters inside the context, where it has any."""
    if not any(map(is_tuner_layer, model.modules())):
        return contextlib.nullcontext()
    from ..peft import lora_disabled  # imports PEFT, as whatever is in the model has done

    return lora_disabled(model)


@contextlib.contextmanager
def as_they_were(model: nn.Module, originals: Originals | None) -> Iterator[None]:
    """Let the modules of `model` have `originals` in place of the parameters that learn, inside the context."""
    changes = Changes()
    try:
        try:
            for module in model.modules() if originals else ():
                for name, parameter in list(module._parameters.items()):
                    if parameter is not None and (original := (originals or {}).get(parameter)) is not None:
                        changes.put(module._parameters, name, original)
            yield
        finally:
            changes.undo()
    finally:
        changes.undo()  # an interruption may come before the first


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Run `model` in eval mode inside the context; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    try:
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True
    finally:
        for module in training:  # an interruption may come into the first
            module.training = True
