"""What the whole operator takes. A kernel would read beyond a tensor that is too small, or take an option for another."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from ...errors import ConfigError
from ..options import Backend, FeatureMap, LinearBranch, check_choice, check_ratio


def check(
    q: Tensor, k: Tensor, v: Tensor, *, keep_ratio: float, negligible_ratio: float, order: Tensor | None, pinned_tokens: int,
    positions: Tensor | None, scale: float | None, linear: str, feature_map: str, proj: Tensor | None, backend: str,
) -> None:  # fmt: skip
    """Raise `ConfigError` unless the arguments of `sparse_linear_attention` fit each other. Looks at no values of tensors."""
    check_ratio("keep_ratio", keep_ratio)
    if not 0 <= negligible_ratio <= 1:
        raise ConfigError(f"negligible_ratio must be in [0, 1], got {negligible_ratio!r}")
    if scale is not None and scale < 0:
        raise ConfigError(f"scale is {scale}; it must not be negative: negate the queries instead")
    for name, value, choices in (("linear", linear, LinearBranch), ("feature_map", feature_map, FeatureMap), ("backend", backend, Backend)):
        check_choice(name, value, get_args(choices))
    if q.dim() != 4 or not v.is_floating_point():
        raise ConfigError(f"q, k and v are [B, H, N, D] floating-point tensors, got {q.dim()} dimensions and {v.dtype}")
    dim = v.shape[-1]
    if proj is not None and tuple(proj.shape) != (dim, dim):
        raise ConfigError(f"proj is [D, D] = [{dim}, {dim}], got {list(proj.shape)}")
    if order is not None and (order.dim() != 1 or order.dtype not in (torch.int32, torch.int64)):
        raise ConfigError(f"order is [N] int32 or int64, got {list(order.shape)} {order.dtype}")
    if torch.compiler.is_compiling():  # lengths are symbols there, and a comparison would become a guard
        return
    if not q.shape == k.shape == v.shape:
        raise ConfigError(
            f"q, k and v must have the same shape, got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}: expand grouped keys and "
            "values, and use dense attention across two sequences"
        )
    tokens = v.shape[-2]
    if order is not None and len(order) != tokens:
        raise ConfigError(f"order names {len(order)} tokens, but q has {tokens}")
    if positions is not None and tuple(positions.shape[-2:]) != (tokens, 2):
        raise ConfigError(f"positions are [..., N, 2] for N = {tokens} tokens, got {list(positions.shape)}")
    if not 0 <= pinned_tokens <= tokens:
        raise ConfigError(f"pinned_tokens must be in [0, {tokens}], the number of tokens, got {pinned_tokens}")
