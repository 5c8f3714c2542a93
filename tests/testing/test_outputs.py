"""Outputs of any structure as tensors by path, and how they differ."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from lite3r_plugin.errors import AdapterError
from lite3r_plugin.testing import expect_equal, largest_difference, named_tensors


@dataclasses.dataclass
class Output:
    depth: Tensor
    rest: object


def test_tensors_are_found_in_nested_structures() -> None:
    x = torch.arange(3.0, requires_grad=True)
    found = named_tensors({"a": [Output(x, ("text", x + 1))], "b": None})
    assert list(found) == ["['a'][0].depth", "['a'][0].rest[1]"]
    assert not found["['a'][0].depth"].requires_grad
    assert found["['a'][0].depth"].data_ptr() != x.data_ptr()
    assert list(named_tensors(x)) == [""]
    assert named_tensors("text") == {}


@pytest.mark.parametrize(
    ("one", "other", "difference"),
    [
        ([0.0, 0.5], [0.0, 0.25], 0.25),
        ([0.0, 100.0], [0.0, 99.0], 0.01),  # relative to the largest entry
        ([math.nan, math.inf], [math.nan, math.inf], 0.0),
        ([], [], 0.0),
    ],
)
def test_largest_difference(one: list[float], other: list[float], difference: float) -> None:
    zero = torch.zeros(2)
    found, path = largest_difference({"same": zero, "x": torch.tensor(one)}, {"same": zero, "x": torch.tensor(other)})
    assert found == pytest.approx(difference)
    assert path == ("x" if difference else "")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_differs_from_all_else(value: float) -> None:
    found, _ = largest_difference({"x": torch.tensor([value, 1.0])}, {"x": torch.ones(2)})
    assert found > 1e30


def test_other_structures_shapes_and_dtypes_raise() -> None:
    x = torch.zeros(2)
    for other, message in (({"y": x}, "changed its structure"), ({"x": x[:1]}, "outputx was"), ({"x": x.double()}, "float64")):
        with pytest.raises(AdapterError, match=message):
            largest_difference({"x": x}, other)


def test_equality_counts_integers() -> None:
    one, other = torch.tensor([1, 2]), torch.tensor([1, 3])
    expect_equal({"x": one}, {"x": one.clone()}, "not the same")
    with pytest.raises(AdapterError, match=r"not the same \(at outputx\)"):
        expect_equal({"x": one}, {"x": other}, "not the same")
    with pytest.raises(AdapterError, match=r"not the same \(difference 5.00e-01 at outputx\)"):
        expect_equal({"x": one.float()}, {"x": one.float() - 1}, "not the same")
