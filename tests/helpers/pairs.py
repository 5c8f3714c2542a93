"""Grids of parameters: every pair of values, or every value, on a CPU, where kernels are interpreted and slow; all on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch


def grid(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """What to give `pytest.mark.parametrize` for these parameters."""
    return list(itertools.product(*axes)) if torch.cuda.is_available() else all_pairs(*axes)


def each(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """As `grid`, for parameters that do not act on each other: on a CPU every value of each axis, side by side."""
    if torch.cuda.is_available():
        return list(itertools.product(*axes))
    return [tuple(axis[i % len(axis)] for axis in axes) for i in range(max(map(len, axes)))]


def costly(*axes: Sequence[Any]) -> list[Any]:
    """As `grid`, for what takes a second each: on a CPU `each`, and marked slow what it leaves of all pairs."""
    if torch.cuda.is_available():
        return grid(*axes)
    few = each(*axes)
    return [*few, *(pytest.param(*row, marks=pytest.mark.slow) for row in all_pairs(*axes) if row not in few)]


def all_pairs(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Few combinations of one value of each axis, in which every two values of two axes meet: greedily, the same on every run."""
    rows = list(itertools.product(*(range(len(axis)) for axis in axes)))

    def pairs_of(row: tuple[int, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(row), 2)) if len(row) > 1 else {row}

    missing = set().union(*map(pairs_of, rows))
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(pairs_of(row) & missing))
        missing -= pairs_of(best)
        chosen.append(best)
    return [tuple(axis[i] for axis, i in zip(axes, row, strict=True)) for row in sorted(chosen)]
