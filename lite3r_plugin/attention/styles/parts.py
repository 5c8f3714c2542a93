"""Linears that make q, k and v, of some heads at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...fp8.linear import Fp8Linear
from ...ops.fp8 import Quantized
from ...wrapper import calls_are_seen, may_be_read


def splits(linear: nn.Module, outputs: int) -> bool:
    """Whether `part_of` it can be made, of so many outputs and multiples of these: nobody has to see it called, its weight is all there is
    to it, and what runs it takes parts of that size."""
    if calls_are_seen():
        return False
    return linear.splits(outputs) if isinstance(linear, Fp8Linear) else type(linear) is nn.Linear and may_be_read(linear)


def rows_of_heads(heads: slice, dim: int, all_heads: int, times: int = 1) -> list[slice]:
    """The outputs of a Linear that are of those `heads`, where it makes `times` times all heads, each of `dim`, one after another."""
    return [slice((at + heads.start) * dim, (at + heads.stop) * dim) for at in range(0, times * all_heads, all_heads)]


def part_of(linear: Any, x: Tensor | Quantized, rows: Sequence[slice]) -> Tensor:
    """The outputs `rows` of a Linear that `splits`, of ``[..., C]``."""
    if isinstance(linear, Fp8Linear):
        return linear.part(rows)(x)
    weight, bias = (None if p is None else torch.cat([p[row] for row in rows]) for p in (linear.weight, linear.bias))
    return F.linear(x, weight, bias)  # type: ignore[arg-type]
