"""Norm, rotary embedding, token order and pooling of q, k, v in one pass.

`naive` is the definition, `kernels` its Triton twin, `backward_kernels` the gradient of the twin's inputs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..dispatch import register, require_one_device, under_trace
from ..options import check_rope_base
from . import naive
from .naive import HeadNorm, Prepared, Tokens

NO_NORM = HeadNorm(None, None, None, 0.0)
"""The norm that leaves queries or keys as they are."""

__all__ = ["NO_NORM", "HeadNorm", "Prepared", "Tokens", "norm_rope", "norm_tensors", "prepare_qkv"]


def prepare_qkv(q: Tensor, k: Tensor, v: Tensor, *, triton: bool, **options: Any) -> Prepared:
    """q, k, v normed, rotated, in token order, and their means over blocks: the pass before attention.

    Args:
        q: ``[B, H, M, D]``, any strides.
        k, v: ``[B, H, N, D]``, any strides.
        triton: Whether a Triton kernel does it, which takes what `dispatch.why_not_triton` lets through, or torch operators.
        options: `order`, `q_norm`, `k_norm`, `positions`, `rope_base`, `keys`, `block_q`, `block_k` of `naive.prepare_qkv`, the
            definition.

    Returns:
        `Prepared`; if `triton`, q, k, v are padded with zeros to a multiple of `block_q` tokens.
    """
    if triton:
        from . import kernels

        return kernels.prepare_qkv(q, k, v, **options)
    return naive.prepare_qkv(q, k, v, **options)


def norm_tensors(q_norm: HeadNorm | None, k_norm: HeadNorm | None) -> dict[str, Tensor | None]:
    """The weights and biases of two norms, by what they are called in messages."""
    q_norm, k_norm = q_norm or NO_NORM, k_norm or NO_NORM
    return {
        "the weight of the norm of queries": q_norm.weight,
        "the bias of the norm of queries": q_norm.bias,
        "the weight of the norm of keys": k_norm.weight,
        "the bias of the norm of keys": k_norm.bias,
    }


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
    """Norm and rotate queries and keys ahead of dense attention; `naive.norm_rope` is the definition.

    Args:
        q, k: ``[B, H, N, D]``, any strides.
        q_norm, k_norm: Norms over the head dimension, or None.
        positions: ``[B or 1, N, 2]`` token coordinates of the rotary embedding, which is skipped without `rope_base`.
        rope_base: Base of the rotary frequencies.
        triton: Whether one Triton kernel does it, which has no gradient, or torch operators.

    Returns:
        Both ``[B, H, N, D]`` in their own dtypes; arithmetic is FP32 (FP64 for FP64 input without `triton`).

    Raises:
        ConfigError, WeightsError: the tensors are on several devices, or some on the meta device; `rope_base` is no positive number.
    """
    check_rope_base(rope_base)
    require_one_device(q, keys=k, positions=positions, **norm_tensors(q_norm, k_norm))
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
    return norm_rope_operator(*arguments) if under_trace() else _norm_rope(*arguments)


def _norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor | None, q_bias: Tensor | None, k_weight: Tensor | None, k_bias: Tensor | None,
    positions: Tensor | None, q_kind: Any, q_eps: float, k_kind: Any, k_eps: float, rope_base: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from . import kernels

    norms = dict(q_norm=HeadNorm(q_kind, q_weight, q_bias, q_eps), k_norm=HeadNorm(k_kind, k_weight, k_bias, k_eps))
    return kernels.norm_rope(q, k, positions=positions, rope_base=rope_base, **norms)


norm_rope_operator = register(
    "norm_rope",
    "(Tensor q, Tensor k, Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, Tensor? k_bias, Tensor? positions, "
    "str? q_kind, float q_eps, str? k_kind, float k_eps, float? rope_base) -> (Tensor, Tensor)",
    _norm_rope,
    lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
)
