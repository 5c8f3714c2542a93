"""Forwards that leave no trace: attributes, buffers and random states are put back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_CONTAINERS = (dict, list, set)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Let `model` be as it was after the context: modes, hooks, attributes of its modules, buffers; and random numbers too.

    Attributes are put back as they were bound, and plain containers with what they held; what an object that is no module keeps for
    itself stays its own matter.
    """
    modules = dict.fromkeys(model.modules())
    before = {module: _contents(vars(module)) for module in modules}
    buffers = {id(x): (x, x._version, x.detach().clone()) for x in model.buffers() if not x.is_inference()}
    devices = {x.device for x in (*model.parameters(), *model.buffers()) if x.is_cuda}
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, contents in before.items():
            _put_back(vars(module), contents)
        with torch.no_grad():
            for x, version, copy in buffers.values():
                if x._version != version:
                    x.copy_(copy)


def _contents(table: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Values by name, each with a copy of what it holds, where it is a container. Tables with an order of their own keep their class."""
    return {name: (value, value.copy() if isinstance(value, _CONTAINERS) else None) for name, value in table.items()}


def _put_back(table: dict[str, Any], contents: dict[str, tuple[Any, Any]]) -> None:
    for name in [name for name in table if name not in contents]:
        del table[name]
    for name, (value, copy) in contents.items():
        table[name] = value
        if copy is None:
            continue
        if isinstance(value, list):
            value[:] = copy
        else:
            value.clear()
            value.update(copy)


def tensors_changed(model: nn.Module, versions: dict[str, int]) -> list[str]:
    """Names of the parameters that something was written to since `parameter_versions`."""
    return [name for name, version in parameter_versions(model).items() if versions.get(name, version) != version]


def parameter_versions(model: nn.Module) -> dict[str, int]:
    """How often each parameter was written to."""
    return {name: x._version for name, x in model.named_parameters() if isinstance(x, Tensor) and not x.is_inference()}
