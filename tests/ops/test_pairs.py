"""The grids that tests of operators run on a CPU hold every pair of values."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from pairs import all_pairs, costly, each


@pytest.mark.parametrize("sizes", [(3,), (2, 3), (3, 2, 6), (5, 2, 2, 3, 2, 2), (2, 2, 2, 2, 2, 2, 2)], ids=str)
def test_every_two_values_of_two_parameters_meet(sizes: tuple[int, ...]) -> None:
    axes = [[f"{name}{i}" for i in range(size)] for name, size in zip("abcdefg", sizes, strict=False)]
    rows = all_pairs(*axes)
    assert {row[0] for row in rows} == set(axes[0])
    for (i, one), (j, other) in itertools.combinations(enumerate(axes), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(one, other))
    assert len(rows) == len(set(rows)) <= math.prod(sorted(sizes)[-2:]) + len(sizes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs every combination")
def test_each_value_has_its_turn() -> None:
    rows = each("abc", "xy", [1])
    assert rows == [("a", "x", 1), ("b", "y", 1), ("c", "x", 1)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes all combinations")
def test_costly_pairs_are_slow_but_for_each_value() -> None:
    axes = ((1, 2, 3), "ab", (True, False))
    rows = costly(*axes)
    few, rest = rows[:3], rows[3:]
    assert few == each(*axes)
    assert set(all_pairs(*axes)) <= {*few, *(row.values for row in rest)}
    assert {mark.name for row in rest for mark in row.marks} == {"slow"}
