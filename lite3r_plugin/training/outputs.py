"""Outputs of a model in a form that can be compared: by what they mean where that is known, else tensor by tensor."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.outputs import ModelOutputs, OutputsFunction, tensors_of
from ..adapter.plugins import find_outputs
from ..errors import AdapterError, short
from .losses import prediction_losses, tensor_losses

Outputs = ModelOutputs | dict[str, Tensor]


@dataclass(frozen=True)
class OutputReader:
    """Reads what a model returns.

    Attributes:
        function: From that to `ModelOutputs`; None: nobody says what it means, and all floating-point tensors count alike.
    """

    function: OutputsFunction | None

    @classmethod
    def of(cls, model: nn.Module, function: OutputsFunction | None) -> OutputReader:
        """By `function`, else as the adapter of `model` says (the hook ``lite3r_outputs``)."""
        return cls(function if function is not None else find_outputs(model))

    def read(self, output: Any) -> Outputs:
        """`output` with its gradients. Raises `AdapterError` where it cannot be mapped."""
        tensors = tensors_of(output)
        if self.function is None:
            return {path: tensor for path, tensor in tensors.items() if tensor.is_floating_point()}
        device = next((tensor.device.type for tensor in tensors.values()), "cpu")
        try:
            with torch.autocast(device, enabled=False):
                mapped = self.function(output)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise AdapterError(
                f"what the model returned ({type(output).__name__}) could not be mapped to depth, points and poses ({short(error)}); "
                "pass outputs=, a function from it to ModelOutputs"
            ) from error
        if not isinstance(mapped, ModelOutputs):
            raise AdapterError(f"the function from what the model returns to ModelOutputs returned {type(mapped).__name__}")
        return mapped


def compare(student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
    """Differences by name, scalars. Raises `AdapterError` where there is nothing that could be compared."""
    if isinstance(student, ModelOutputs) and isinstance(teacher, ModelOutputs):
        return prediction_losses(student, teacher)
    assert isinstance(student, dict)
    assert isinstance(teacher, dict)
    return tensor_losses(student, teacher)


def tensors_in(outputs: Outputs) -> list[Tensor]:
    """All tensors of `outputs`."""
    return list(tensors_of(outputs).values())


def moved(outputs: Outputs, device: torch.device | str) -> Outputs:
    """`outputs`, detached, on another device."""
    if isinstance(outputs, dict):
        return {path: tensor.detach().to(device) for path, tensor in outputs.items()}
    fields = {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
    other = tuple(x.detach().to(device) for x in fields.pop("other"))
    return ModelOutputs(**{name: None if x is None else x.detach().to(device) for name, x in fields.items()}, other=other)
