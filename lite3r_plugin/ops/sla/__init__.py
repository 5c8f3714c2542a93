"""Sparse-linear attention: the whole operator, from q, k, v in host order to the output in host order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backend import on_device_of, use_triton
from ..block_map import block_map, kept_blocks
from ..qk_norm_rope import HeadNorm, prepare_qkv
from . import naive

__all__ = ["linear_attention", "sparse_linear_attention"]


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, proj: Tensor, feature_map: str) -> Tensor:
    """`naive.linear_attention` (same arguments), untouched by autocast."""
    with torch.autocast(v.device.type, enabled=False):
        return naive.linear_attention(q, k, v, proj=proj, feature_map=feature_map)


def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keep_ratio: float,
    order: Tensor | None = None,
    pinned_tokens: int = 0,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    positions: Tensor | None = None,
    rope_base: float | None = None,
    scale: float | None = None,
    linear: str = "none",
    feature_map: str = "softmax",
    proj: Tensor | None = None,
    block_means: bool = False,
    block_q: int = 128,
    block_k: int = 64,
    backend: str = "auto",
) -> Tensor:
    """Sparse-linear attention (SLA, arXiv 2509.24006; Lite3R, arXiv 2605.11354).

    Args:
        q, k, v: ``[B, H, N, D]``, any strides.
        keep_ratio: Share of the key blocks that are not pinned to keep for each query block, in (0, 1].
        order: ``[N]`` int permutation that makes blocks of consecutive tokens compact, or None.
        pinned_tokens: The blocks that hold the first `pinned_tokens` tokens (in `order`) attend to all keys, and all
            queries attend to them.
        q_norm, k_norm, positions, rope_base: Norm and rotary embedding to apply first; see `prepare_qkv`.
        scale, linear, feature_map, proj, block_means, block_q, block_k: See `naive.sparse_linear_attention`.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``[B, H, N, D]`` in v's dtype, in the order of the input tokens.

    Raises:
        BackendError: `backend` is ``"triton"`` and the kernels cannot take these tensors.
        ConfigError: `linear` needs a `proj` that was not given.
    """
    # Autocast would run the pooled scores and the linear state in half precision.
    with torch.autocast(v.device.type, enabled=False), on_device_of(v):
        return _sparse_linear_attention(
            q, k, v, order=order, pinned_tokens=pinned_tokens, keep_ratio=keep_ratio,
            proj=naive.needed_proj(linear, proj), block_means=block_means,
            block_q=block_q, block_k=block_k, backend=backend,
            prepare=dict(q_norm=q_norm, k_norm=k_norm, positions=positions, rope_base=rope_base),
            branch=dict(scale=scale, linear=linear, feature_map=feature_map),
        )  # fmt: skip


def _sparse_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, order: Tensor | None, pinned_tokens: int, keep_ratio: float, proj: Tensor | None,
    block_means: bool, block_q: int, block_k: int, backend: str, prepare: dict[str, Any], branch: dict[str, Any],
) -> Tensor:  # fmt: skip
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, proj))
    triton = use_triton(backend, v, needs_grad)
    tokens = v.shape[-2]
    prepared = prepare_qkv(q, k, v, order=order, block_q=block_q, block_k=block_k, triton=triton, **prepare)
    pinned_keys = -(-pinned_tokens // block_k)
    maps: dict[str, Any] = dict(kept=kept_blocks(-(-tokens // block_k), keep_ratio, pinned_keys), pinned=pinned_keys)
    options: dict[str, Any] = dict(pinned=-(-pinned_tokens // block_q), proj=proj, block_q=block_q, block_k=block_k, **branch)
    if triton:
        from ..block_map.kernels import block_map_with_bits
        from . import kernels

        kv_indices, bits = block_map_with_bits(prepared.q_mean, prepared.k_mean, **maps)
        means = (prepared.k_mean, prepared.v_mean) if block_means else None
        return kernels.sparse_linear_attention(*prepared[:3], kv_indices, tokens=tokens, bits=bits, means=means, order=order, **options)
    kv_indices = block_map(prepared.q_mean.detach(), prepared.k_mean.detach(), **maps)
    out = naive.sparse_linear_attention(*prepared[:3], kv_indices, block_means=block_means, **options)
    return out if order is None else torch.empty_like(out).index_copy(-2, order.long(), out)
