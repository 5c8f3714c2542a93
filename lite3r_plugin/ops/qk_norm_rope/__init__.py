"""Norm, rotary embedding, token order and pooling of q, k, v in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import on_device_of, register
from . import naive
from .naive import HeadNorm, Prepared

NO_NORM = HeadNorm(None, None, None, 0.0)

__all__ = ["NO_NORM", "HeadNorm", "Prepared", "norm_rope", "prepare_qkv"]


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
    if not triton:  # a compiler fuses these operators itself
        return (
            naive.norm_rope(q, norm=q_norm, positions=positions, rope_base=rope_base).to(q.dtype),
            naive.norm_rope(k, norm=k_norm, positions=positions, rope_base=rope_base).to(k.dtype),
        )
    q_norm, k_norm = q_norm or NO_NORM, k_norm or NO_NORM
    arguments = (
        q, k, q_norm.weight, q_norm.bias, k_norm.weight, k_norm.bias, positions,
        q_norm.kind, q_norm.eps, k_norm.kind, k_norm.eps, rope_base,
    )  # fmt: skip
    return norm_rope_operator(*arguments) if torch.compiler.is_compiling() else _norm_rope(*arguments)


def _norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor | None, q_bias: Tensor | None, k_weight: Tensor | None, k_bias: Tensor | None,
    positions: Tensor | None, q_kind: Any, q_eps: float, k_kind: Any, k_eps: float, rope_base: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from . import kernels

    norms = dict(q_norm=HeadNorm(q_kind, q_weight, q_bias, q_eps), k_norm=HeadNorm(k_kind, k_weight, k_bias, k_eps))
    with on_device_of(q):
        return kernels.norm_rope(q, k, positions=positions, rope_base=rope_base, **norms)


norm_rope_operator = register(
    "norm_rope",
    "(Tensor q, Tensor k, Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, Tensor? k_bias, Tensor? positions, "
    "str? q_kind, float q_eps, str? k_kind, float k_eps, float? rope_base) -> (Tensor, Tensor)",
    _norm_rope,
    lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
)
