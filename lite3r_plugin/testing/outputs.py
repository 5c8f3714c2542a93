"""A model's output, whatever it is made of, as tensors by path; and how two of them differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..adapter.outputs import tensors_of
from ..errors import AdapterError


def named_tensors(output: Any) -> dict[str, Tensor]:
    """Every tensor in nested mappings, sequences and dataclasses, detached copies, by its path, such as ``['depth'][0]``.

    The path of an output that is a tensor itself is "". What is neither is left out.
    """
    return {path: tensor.detach().clone() for path, tensor in tensors_of(output).items()}


def largest_difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest difference of floating-point tensors in `named_tensors`, and the path of that tensor.

    Absolute, but relative to the largest entry of a tensor whose entries exceed 1, such as a camera matrix in pixels.
    NaN equals NaN, and infinity itself; anything else differs from them by more than any tolerance.

    Raises:
        AdapterError: paths, shapes or dtypes are not the same.
    """
    if expected.keys() != found.keys():
        raise AdapterError(f"the output changed its structure: {sorted(expected.keys() ^ found.keys())[:3]} are in one of the two only")
    largest, where = 0.0, ""
    for path, x in expected.items():
        y = found[path]
        if x.shape != y.shape or x.dtype != y.dtype:
            raise AdapterError(f"output{path} was {x.dtype} {tuple(x.shape)} and is now {y.dtype} {tuple(y.shape)}")
        if not x.is_floating_point() or not x.numel():
            continue
        same = (x == y) | (x.isnan() & y.isnan())
        size = x.double().abs().masked_fill(~x.isfinite(), 0).max().clamp_min(1)
        error = ((x.double() - y.double()).abs().masked_fill(same, 0).nan_to_num(nan=torch.inf).max() / size).item()
        if error > largest:
            largest, where = error, path
    return largest, where


def expect_equal(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], message: str) -> None:
    """Raise `AdapterError` with `message` and the path unless all tensors are equal, integers and booleans too."""
    difference, where = largest_difference(expected, found)
    if difference:
        raise AdapterError(f"{message} (difference {difference:.2e} at output{where})")
    for path, x in expected.items():
        if not x.is_floating_point() and not torch.equal(x, found[path]):
            raise AdapterError(f"{message} (at output{path})")
