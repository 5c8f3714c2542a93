"""Norm, rotary embedding, token order and pooling of q, k, v in one pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backend import on_device_of
from . import naive
from .naive import HeadNorm, Prepared

__all__ = ["HeadNorm", "Prepared", "norm_rope", "prepare_qkv"]


def prepare_qkv(q: Tensor, k: Tensor, v: Tensor, *, triton: bool, **options: Any) -> Prepared:
    """`naive.prepare_qkv` (same options), in one Triton kernel if `triton`."""
    if triton:
        from . import kernels

        return kernels.prepare_qkv(q, k, v, **options)
    return naive.prepare_qkv(q, k, v, **options)


def norm_rope(
    q: Tensor,
    k: Tensor,
    *,
    q_norm: HeadNorm | None,
    k_norm: HeadNorm | None,
    positions: Tensor | None,
    rope_base: float | None,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """`naive.norm_rope` of queries and keys ``[B, H, N, D]``, back in their own dtype; one kernel if `triton`."""
    if triton:
        from . import kernels

        with on_device_of(q):
            return kernels.norm_rope(q, k, q_norm=q_norm, k_norm=k_norm, positions=positions, rope_base=rope_base)
    return (
        naive.norm_rope(q, norm=q_norm, positions=positions, rope_base=rope_base).to(q.dtype),
        naive.norm_rope(k, norm=k_norm, positions=positions, rope_base=rope_base).to(k.dtype),
    )
