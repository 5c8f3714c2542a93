"""A model as it was, whatever happens while it is changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Undo:
    """What a model is now: which modules, parameters, buffers and hooks it has, and what learns; of tensors, what `keep` is given.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        names = list(vars(nn.Module()))
        self._tables: list[tuple[Any, Any]] = []
        self._fields: list[tuple[nn.Module, str, Any]] = []
        for module in model.modules():
            for name in names:
                value = vars(module).get(name)
                if isinstance(value, (dict, set)):  # shared with who stands in for a host: the same object must hold the old content
                    self._tables.append((value, value.copy()))
                self._fields.append((module, name, value))
        self._learns = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._values: list[tuple[Tensor, Tensor]] = []

    def keep(self, tensor: Tensor) -> None:
        """Remember the values of `tensor`, which are about to change; takes its memory again."""
        self._values.append((tensor, tensor.detach().clone()))

    def restore(self) -> None:
        """Make the model what it was."""
        for module, name, value in self._fields:
            object.__setattr__(module, name, value)
        for table, before in self._tables:
            table.clear()
            table.update(before)
        for parameter, learns in self._learns:
            parameter.requires_grad_(learns)
        for tensor, before in reversed(self._values):
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.copy_(before)


@contextlib.contextmanager
def undone_on_error(model: nn.Module) -> Iterator[Undo]:
    """Leave `model` as it was when the block is left by an exception of whatever kind."""
    undo = Undo(model)
    try:
        yield undo
    except BaseException:
        undo.restore()
        raise
