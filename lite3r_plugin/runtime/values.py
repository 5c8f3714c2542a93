"""What a forward takes and gives: tensors inside of lists, mappings and dataclasses, looked at and exchanged."""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, shown
from ..wrapper import is_plain_tensor

_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, torch.layout, enum.Enum)


def exchanged(value: Any, exchange: Callable[[Tensor], Any], opaque: Callable[[Any], Any] = lambda value: value) -> Any:
    """`value` with what `exchange` gives in the place of each tensor inside; containers become new ones of the same classes.

    Args:
        value: Tensors, constants, and tuples, lists, mappings and dataclasses of them.
        exchange: From a tensor to what takes its place.
        opaque: The same for what is none of these, in which tensors may hide. It may raise.
    """
    if isinstance(value, Tensor):
        return exchange(value)
    if isinstance(value, _CONSTANTS):
        return value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(exchanged(item, exchange, opaque) for item in value))
    if type(value) in (list, tuple):
        return type(value)(exchanged(item, exchange, opaque) for item in value)
    if isinstance(value, Mapping):
        items = {key: exchanged(item, exchange, opaque) for key, item in value.items()}
        if type(value) is dict:
            return items
        made: Any = copy.copy(value)
        for key, item in items.items():
            made[key] = item
        return made
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(made, field.name, exchanged(getattr(value, field.name), exchange, opaque))
        return made
    return opaque(value)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors inside of `value`, in order; one that is there twice, twice."""
    found: list[Tensor] = []

    def take(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    exchanged(value, take)
    return found


def images_in(value: Any) -> Tensor | None:
    """The images inside of `value`: the first tensor ``[B, S, 3, H, W]`` or ``[S, 3, H, W]``; None where there is none."""
    return next((x for x in tensors_in(value) if x.dim() in (4, 5) and x.is_floating_point() and x.shape[-3] == 3), None)


def views_in(value: Any) -> int | None:
    """How many views `value` holds, in its images or in a list of mappings, each with the images ``[B, 3, H, W]`` of one; None: none."""
    if (listed := _listed(value)) is not None:
        return len(listed)
    images = images_in(value)
    return None if images is None else images.shape[images.dim() - 4]


def with_views(value: Any, views: int) -> Any:
    """`value` with the first `views` views of its images, and of every tensor that has as many in the same place, or of its list."""
    if (listed := _listed(value)) is not None:
        return _replaced(value, listed, listed[:views])
    images = images_in(value)
    assert images is not None
    place = images.dim() - 4
    count = images.shape[place]
    return exchanged(value, lambda x: x.narrow(place, 0, views) if x.dim() > place and x.shape[place] == count else x)


def _listed(value: Any) -> list[Any] | None:
    """The list of views inside of `value`, if there is one."""
    if isinstance(value, list) and value and all(isinstance(item, Mapping) and images_in(item) is not None for item in value):
        return value
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return next((found for item in items if (found := _listed(item)) is not None), None)


def _replaced(value: Any, old: list[Any], new: list[Any]) -> Any:
    """`value` with `new` in the place of `old`."""
    if value is old:
        return new
    if type(value) in (list, tuple):
        return type(value)(_replaced(item, old, new) for item in value)
    return {key: _replaced(item, old, new) for key, item in value.items()} if isinstance(value, Mapping) else value


def layout_of(value: Any) -> Hashable:
    """What of `value` decides which kernels a forward launches: shapes, strides, dtypes and devices of tensors; all else by itself.

    Raises:
        InputError: something in it cannot be told from another by its value.
    """
    if isinstance(value, Tensor):
        if not is_plain_tensor(value):
            raise InputError(f"an argument is a {type(value).__name__}")
        return Tensor, value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, _CONSTANTS):
        return type(value), value
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(layout_of, value))
    if isinstance(value, Mapping):
        return type(value), tuple((layout_of(key), layout_of(item)) for key, item in value.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), tuple(layout_of(getattr(value, field.name)) for field in dataclasses.fields(value))
    raise InputError(f"an argument is a {type(value).__name__}, {shown(value, 40)}")
