"""Tiles, warps and pipeline stages of the backward kernels, so that registers and shared memory suffice."""

from __future__ import annotations

import torch

from ...dispatch import has_tma
from .operands import Operands


def dq_options(operands: Operands) -> dict[str, int]:
    """Of the kernel that holds queries."""
    if operands.q.dtype == torch.float32:
        return dict(TILE_Q=min(operands.block_q, 32), TILE_K=min(operands.block_k, 16), num_warps=4, num_stages=1)
    if operands.q.shape[-1] <= 64 and operands.block_q > 64:
        # As in the forward kernel: two programs on an SM, of two warp groups that hold 64 queries each.
        return dict(TILE_Q=operands.block_q, TILE_K=min(operands.block_k, 64), num_warps=8, num_stages=3, maxnreg=128)
    return dict(TILE_Q=operands.block_q, TILE_K=min(operands.block_k, 64), num_warps=4 if operands.block_q <= 64 else 8, num_stages=2)


def dkv_options(operands: Operands) -> dict[str, int]:
    """Of the kernel that holds keys."""
    if operands.q.dtype == torch.float32:
        return dict(TILE_Q=min(operands.block_q, 16), TILE_K=min(operands.block_k, 32), num_warps=4, num_stages=1)
    options = dict(TILE_Q=min(operands.block_q, 64), TILE_K=min(operands.block_k, 64), num_warps=4, num_stages=2)
    if operands.q.shape[-1] <= 64:
        options["maxnreg"] = 168  # three programs on an SM
    return options


def dmeans_options(operands: Operands) -> dict[str, int]:
    """Of the kernel that holds mean keys."""
    options = dkv_options(operands)
    if operands.q.dtype != torch.float32 and operands.q.shape[-1] <= 64:
        options["num_stages"] = 3
    return options


def rows_options(operands: Operands) -> dict[str, int]:
    """Of the kernel of the linear branch."""
    if operands.linear == "all" and operands.mask is not None:  # which has pairs besides
        return dict(TILE_Q=min(operands.block_q, 32), num_warps=4 if operands.q.shape[-1] <= 64 else 8, num_stages=1)
    if operands.q.dtype == torch.float32 or operands.q.shape[-1] > 64:
        return dict(TILE_Q=min(operands.block_q, 32), num_warps=4 if operands.q.shape[-1] <= 64 else 8, num_stages=2)
    return dict(TILE_Q=min(operands.block_q, 64), num_warps=4, num_stages=1)


def uses_tma(operands: Operands) -> bool:
    """Whether loops load their tiles by TMA: with heads of 64. Those of 32 take 2 percent longer with it, those of 128 as long, and it
    takes no others. Tensors that were kept may come back at any address."""
    if not operands.is_large or not has_tma(operands.q.device) or operands.q.dtype == torch.float32 or operands.q.shape[-1] != 64:
        return False
    return all(x.data_ptr() % 16 == 0 for x in (operands.q, operands.k, operands.v))
