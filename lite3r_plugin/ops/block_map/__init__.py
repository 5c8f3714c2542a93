"""Which key blocks each query block attends to exactly."""

from __future__ import annotations

from torch import Tensor

from . import naive
from .naive import density, kept_blocks

__all__ = ["block_map", "density", "kept_blocks"]


def block_map(q_mean: Tensor, k_mean: Tensor, *, kept: int, pinned: int = 0, triton: bool = False) -> Tensor:
    """`naive.block_map` (same arguments), selected by a Triton kernel if `triton`."""
    if triton:
        from . import kernels

        return kernels.block_map(q_mean, k_mean, kept=kept, pinned=pinned)
    return naive.block_map(q_mean, k_mean, kept=kept, pinned=pinned)
