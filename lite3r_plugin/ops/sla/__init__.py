"""Sparse-linear attention: the whole operator, from q, k, v in host order to the output in host order."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import use_triton, without_autocast
from ..qk_norm_rope import NO_NORM, HeadNorm
from . import naive, operator
from .check import check

__all__ = ["linear_attention", "sparse_linear_attention"]


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, proj: Tensor, feature_map: str) -> Tensor:
    """`naive.linear_attention` (same arguments), untouched by autocast."""
    with without_autocast(v):
        return naive.linear_attention(q, k, v, proj=proj, feature_map=feature_map)


def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keep_ratio: float,
    negligible_ratio: float = 0.0,
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
        negligible_ratio: Share of them to leave out, without a mean or a part in the branch over marginal blocks, in [0, 1].
        order: ``[N]`` int permutation that makes blocks of consecutive tokens compact, or None.
        pinned_tokens: The blocks that hold the first `pinned_tokens` tokens (in `order`) attend to all keys, and all
            queries attend to them.
        q_norm, k_norm, positions, rope_base: Norm and rotary embedding to apply first; see `prepare_qkv`.
        scale, linear, feature_map, proj, block_means, block_q, block_k: See `naive.sparse_linear_attention`.
        backend: ``"auto"``, ``"triton"`` or ``"naive"``.

    Returns:
        ``[B, H, N, D]`` in v's dtype, in the order of the input tokens.

    Raises:
        BackendError: `backend` is ``"triton"`` and the kernels cannot take these tensors.
        ConfigError: tensors do not fit each other; an option is out of its range; `linear` needs a `proj` that was not given.
    """
    check(
        q, k, v, keep_ratio=keep_ratio, negligible_ratio=negligible_ratio, order=order, pinned_tokens=pinned_tokens, positions=positions,
        scale=scale, linear=linear, feature_map=feature_map, proj=proj, backend=backend,
    )  # fmt: skip
    proj = naive.needed_proj(linear, proj)
    if not torch.compiler.is_compiling() and v.numel() == 0:
        return v.clone()
    q_norm, k_norm = q_norm or NO_NORM, k_norm or NO_NORM
    tensors = (q, k, v, q_norm.weight, q_norm.bias, k_norm.weight, k_norm.bias, proj)
    options = (
        order, positions, pinned_tokens, keep_ratio, negligible_ratio, q_norm.kind, q_norm.eps, k_norm.kind, k_norm.eps,
        rope_base, scale, linear, feature_map, block_means, block_q, block_k, backend,
    )  # fmt: skip
    needed = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors]
    if torch.compiler.is_compiling():
        out = operator.train(needed, *tensors, *options)[0] if any(needed) else operator.infer(*tensors, *options)
        return out.transpose(1, 2)
    if any(needed) and use_triton(backend, v, needs_grad=True):
        from .training import SparseLinearAttention

        return SparseLinearAttention.apply(*tensors, *options[:-1])
    return operator.run(*tensors, *options, needs_grad=any(needed))
