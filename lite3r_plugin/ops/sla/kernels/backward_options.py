"""Tiles, warps and pipeline stages of the backward kernels, so that registers and shared memory suffice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..dispatch import has_tma

if TYPE_CHECKING:
    from .problem import Problem


def dq_options(p: Problem) -> dict[str, int]:
    """Of the kernel that holds queries."""
    if p.q.dtype == torch.float32:
        return dict(TILE_Q=min(p.block_q, 32), TILE_K=min(p.block_k, 16), num_warps=4, num_stages=1)
    if p.q.shape[-1] <= 64 and p.block_q > 64:
        # As in the forward kernel: two programs on an SM, of two warp groups that hold 64 queries each.
        return dict(TILE_Q=p.block_q, TILE_K=min(p.block_k, 64), num_warps=8, num_stages=3, maxnreg=128)
    return dict(TILE_Q=p.block_q, TILE_K=min(p.block_k, 64), num_warps=4 if p.block_q <= 64 else 8, num_stages=2)


def dkv_options(p: Problem) -> dict[str, int]:
    """Of the kernel that holds keys."""
    if p.q.dtype == torch.float32:
        return dict(TILE_Q=min(p.block_q, 16), TILE_K=min(p.block_k, 32), num_warps=4, num_stages=1)
    options = dict(TILE_Q=min(p.block_q, 64), TILE_K=min(p.block_k, 64), num_warps=4, num_stages=2)
    if p.q.shape[-1] <= 64:
        options["maxnreg"] = 168  # three programs on an SM
    return options


def dmeans_options(p: Problem) -> dict[str, int]:
    """Of the kernel that holds mean keys."""
    options = dkv_options(p)
    if p.q.dtype != torch.float32 and p.q.shape[-1] <= 64:
        options["num_stages"] = 3
    return options


def rows_options(p: Problem) -> dict[str, int]:
    """Of the kernel of the linear branch."""
    if p.q.dtype == torch.float32 or p.q.shape[-1] > 64:
        return dict(TILE_Q=min(p.block_q, 32), num_warps=4 if p.q.shape[-1] <= 64 else 8, num_stages=2)
    return dict(TILE_Q=min(p.block_q, 64), num_warps=4, num_stages=1)


def uses_tma(p: Problem) -> bool:
    """Whether loops load their tiles by TMA: with heads of 64. Those of 32 take 2 percent longer with it, those of 128 as long, and it
    takes no others. Tensors that were kept may come back at any address."""
    if not p.is_large or not has_tma(p.q.device) or p.q.dtype == torch.float32 or p.q.shape[-1] != 64:
        return False
    return all(x.data_ptr() % 16 == 0 for x in (p.q, p.k, p.v))
