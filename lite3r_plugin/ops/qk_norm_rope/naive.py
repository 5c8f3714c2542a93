"""Definition of the pass between the qkv Linear and attention: norm, rotate, reorder, pool.

For every token n and head h, with x one of q, k:

    x <- norm(x)                         over the head dimension (LayerNorm or RMSNorm), if given
    x <- rotate(x, positions[n])         axial rotary embedding in two dimensions, if given
    x_ordered[i] = x[order[i]]           for q, k and v: the order that makes blocks compact image tiles
    x_mean[b]    = mean of x_ordered over block b (the last block may be short), in FP32

Keys and values may be other tokens than queries (cross-attention, a cache of keys), with positions and an order of their own.
Arithmetic is FP32 (FP64 for FP64 input); the ordered tensors come back in v's dtype.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class HeadNorm(NamedTuple):
    """A norm over the head dimension.

    Attributes:
        kind: ``"layer"``, ``"rms"`` (no bias is added) or None: no norm.
        weight, bias: ``[D]`` in any dtype, or None.
        eps: Added to the variance, or to the mean square.
    """

    kind: Literal["layer", "rms"] | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Tokens(NamedTuple):
    """What is known of the tokens of queries, or of keys.

    Attributes:
        order: ``[N]`` a permutation, int, that makes blocks of consecutive tokens compact; None keeps the order.
        positions: ``[B or 1, N, 2]`` coordinates for the rotary embedding, or None.
    """

    order: Tensor | None
    positions: Tensor | None


class Prepared(NamedTuple):
    """Result of `prepare_qkv`.

    Attributes:
        q: ``[B, H, M, D]`` in token order, contiguous, in v's dtype.
        k, v: ``[B, H, N, D]``, likewise.
        q_mean: ``[B, H, ceil(M / block_q), D]`` FP32.
        k_mean, v_mean: ``[B, H, ceil(N / block_k), D]`` FP32.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_mean: Tensor
    k_mean: Tensor
    v_mean: Tensor


def apply_norm(x: Tensor, norm: HeadNorm) -> Tensor:
    """`norm` over the last dimension of `x`, in x's dtype."""
    weight = None if norm.weight is None else norm.weight.to(x.dtype)
    bias = None if norm.bias is None else norm.bias.to(x.dtype)
    if norm.kind == "rms":
        return F.rms_norm(x, x.shape[-1:], weight, norm.eps)
    return F.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Axial rotary embedding. x: ``[B, H, N, D]`` with D a multiple of 4, positions: ``[B, N, 2]``."""
    quarter = x.shape[-1] // 4
    frequencies = base ** -(torch.arange(quarter, device=x.device, dtype=x.dtype) / quarter)
    angles = (positions.to(x.dtype)[..., None] * frequencies)[:, None]  # [B, 1, N, 2, D/4]
    cos, sin = angles.cos(), angles.sin()
    first, second = x.unflatten(-1, (2, 2, quarter)).unbind(-2)  # [B, H, N, 2, D/4]: pairs (i, i + D/4) of each half
    return torch.stack((first * cos - second * sin, second * cos + first * sin), -2).flatten(-3)


def block_means(x: Tensor, block: int) -> Tensor:
    """Means over blocks of `block` tokens: ``[B, H, N, D] -> [B, H, ceil(N / block), D]`` FP32; the last may be short."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    tokens = x.shape[-2]
    counts = block_sizes(tokens, block, x.device).to(x.dtype)
    padded = F.pad(x, (0, 0, 0, -tokens % block))
    return padded.unflatten(-2, (-1, block)).sum(-2) / counts[:, None]


def block_sizes(tokens: int, block: int, device: torch.device) -> Tensor:
    """Tokens in each block: ``[ceil(tokens / block)]`` int64."""
    starts = torch.arange(0, tokens, block, device=device)
    return (tokens - starts).clamp(max=block)


def norm_rope(x: Tensor, *, norm: HeadNorm | None = None, positions: Tensor | None = None, rope_base: float | None = None) -> Tensor:
    """Norm and rotate queries or keys ``[B, H, N, D]``, in FP32 (FP64 for FP64 input)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if norm is not None and norm.kind is not None:
        x = apply_norm(x, norm)
    if rope_base is not None and positions is not None:
        x = rotate(x, positions, rope_base)
    return x


def prepare_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    order: Tensor | None = None,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    positions: Tensor | None = None,
    rope_base: float | None = None,
    keys: Tokens | None = None,
    block_q: int = 128,
    block_k: int = 64,
) -> Prepared:
    """Norm, rotate, reorder and pool; see the module's docstring.

    Args:
        q: ``[B, H, M, D]``, any strides.
        k, v: ``[B, H, N, D]``, any strides.
        order: ``[M]`` a permutation, int; None keeps the order.
        q_norm, k_norm: Norms over the head dimension.
        positions: ``[B or 1, M, 2]`` token coordinates for the rotary embedding, which is skipped without `rope_base`.
        rope_base: Base of the rotary frequencies.
        keys: Order and positions of keys and values; None: they are the tokens of queries.
        block_q, block_k: Tokens per pooled block.

    Returns:
        See `Prepared`.
    """
    q = norm_rope(q, norm=q_norm, positions=positions, rope_base=rope_base)
    keys = keys or Tokens(order, positions)
    k = norm_rope(k, norm=k_norm, positions=keys.positions, rope_base=rope_base)
    q = q if order is None else q.index_select(-2, order)
    k, v = (x if keys.order is None else x.index_select(-2, keys.order) for x in (k, v))
    means = block_means(q, block_q), block_means(k, block_k), block_means(v, block_k)
    return Prepared(q.to(v.dtype).contiguous(), k.to(v.dtype).contiguous(), v.contiguous(), *means)
