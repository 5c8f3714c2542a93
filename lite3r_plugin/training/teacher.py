"""The teacher: the same model, with the same weights, as it was before Lite3R."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ..apply.verbs import run_dense
from ..wrapper import is_tuner_layer


@contextlib.contextmanager
def as_teacher(model: nn.Module) -> Iterator[None]:
    """Run `model`, or a part of it, as its own teacher inside the context: dense, without LoRA, evaluated, without gradients.

    Weights that autocast casts meanwhile are not kept: cast without gradients, they would have none for a student after it either.
    """
    device = next((p.device.type for p in model.parameters()), "cpu")
    with torch.no_grad(), run_dense(model.modules()), without_lora(model), evaluated(model), contextlib.ExitStack() as stack:
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
def evaluated(model: nn.Module) -> Iterator[None]:
    """Run `model` in eval mode inside the context; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
