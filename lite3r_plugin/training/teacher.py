"""The teacher: the same model, with the same weights, as it was before Lite3R."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ..apply.verbs import lite3r_disabled
from ..wrapper import is_tuner_layer


@contextlib.contextmanager
def as_teacher(model: nn.Module) -> Iterator[None]:
    """Run `model`, or a part of it with Lite3R in it, as its own teacher inside the context: dense, evaluated, without gradients.

    Weights that autocast casts meanwhile are not kept: cast without gradients, they would have none for a student after it either.

    Raises:
        ConvertedError: weights are in FP8.
        NotAppliedError: there is no Lite3R in it.
    """
    device = next((p.device.type for p in model.parameters()), "cpu")
    training = [module for module in model.modules() if module.training]
    with torch.no_grad(), lite3r_disabled(model), contextlib.ExitStack() as stack:
        if any(map(is_tuner_layer, model.modules())):
            from ..peft import lora_disabled  # imports PEFT, as whatever is in the model has done

            stack.enter_context(lora_disabled(model))
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False))
        stack.callback(_set_training, training, True)
        _set_training(training, False)
        yield


def _set_training(modules: list[nn.Module], mode: bool) -> None:
    for module in modules:
        module.training = mode
