"""Exact rewrites that families of models share: the same numbers up to rounding, fewer launches, no waits for the GPU.

Adapters put them together in their hook `lite3r_exact_rewrites`. All of them change one instance, never a class or a module.
"""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, WeightsError
from ..wrapper import must_be_called

MAX_POSITIONS = 1024  # rows and columns of the rotary tables; token coordinates are below it


class TableRope(nn.Module):
    """Axial rotary embedding from precomputed tables; `lite3r_plugin.adapter.Rope2D` says what it computes.

    It takes the place of a module that looks up ``positions.max()`` on the device in every call, which waits for the
    GPU and forbids CUDA graphs. The angles are computed in FP32, whatever the dtype of the tables.

    Args:
        head_dim: D, a multiple of 4.
        base: Base of the rotary frequencies.
        like: A tensor with the device and the dtype of the tables.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, base: float, like: Tensor) -> None:
        super().__init__()
        self.base_frequency = base
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(MAX_POSITIONS, head_dim // 4, device=like.device, dtype=like.dtype), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Compute the tables, also once a module that was made on the meta device is somewhere."""
        device, quarter = self.cos.device, self.cos.shape[1]
        frequencies = 1.0 / self.base_frequency ** (torch.arange(0, 2 * quarter, 2, device=device).float() / (2 * quarter))
        angles = torch.arange(MAX_POSITIONS, device=device).float()[:, None] * frequencies
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Rotate ``[B, H, N, D]``, in its own dtype, by integer positions ``[B, N, 2]`` from 0 to below `MAX_POSITIONS`."""
        cos = self.cos[positions][:, None].to(tokens.dtype)  # [B, 1, N, 2, D/4]
        sin = self.sin[positions][:, None].to(tokens.dtype)
        first, second = tokens.unflatten(-1, (2, 2, -1)).unbind(-2)  # [B, H, N, 2, D/4]
        return torch.stack((first * cos - second * sin, second * cos + first * sin), -2).flatten(-3)


def use_table_rope(owner: nn.Module) -> None:
    """Replace `owner.rope` and every reference to it below `owner` by one `TableRope`.

    Args:
        owner: A module whose `rope` has a `base_frequency`. At least one module that shares it is an attention module with the
            Linear `qkv` and `num_heads`; the tables take the device and the dtype of the first one's weight.

    Raises:
        WeightsError: that weight is offloaded.
    """
    rope: Any = owner.rope
    users = [module for module in owner.modules() if getattr(module, "rope", None) is rope]
    attention: Any = next(module for module in users if hasattr(module, "qkv"))
    weight = attention.qkv.weight
    if weight.is_meta and must_be_called(attention.qkv):
        raise WeightsError("the weights of this model come only for each call (CPU offload): exact rewrites first, offload then")
    table = TableRope(attention.qkv.in_features // attention.num_heads, rope.base_frequency, weight)
    for module in users:
        module.rope = table


def cache_position_embedding(head: nn.Module, method: str) -> None:
    """Let a DPT head add its position embedding from a cache, in the dtype of the features.

    The host computes it in FP64 in every call, and its FP32 result promotes BF16 features. One embedding is kept for each
    size of the features and of the image, dtype and device, as long as the head lives.

    Args:
        head: The head.
        method: Name of its method ``(features [B, C, h, w], width, height, ratio)`` that adds the embedding, which must depend
            on the sizes alone.
    """
    cache: dict[Any, Tensor] = {}
    host = getattr(type(head), method)

    def add(head: nn.Module, x: Tensor, width: int, height: int, ratio: float = 0.1) -> Tensor:
        key = (x.shape[1:], width, height, ratio, x.dtype, x.device)
        if key not in cache:
            zeros = x.new_zeros((1, *x.shape[1:]), dtype=torch.promote_types(x.dtype, torch.float32))
            cache[key] = host(head, zeros, width, height, ratio).to(x.dtype)
        return x + cache[key]

    setattr(head, method, MethodType(add, head))


@functools.lru_cache(maxsize=8)
def token_positions(views: int, rows: int, columns: int, special: int, device: torch.device) -> Tensor:
    """Coordinates of the tokens, int64 ``[views, P, 2]`` with P = special + rows * columns, on `device`; the last eight are kept.

    Special tokens come first, at (0, 0); the patches follow row by row, at (row, column) counted from 1.

    Raises:
        InputError: an image has so many patches that the rotary tables do not reach.
    """
    if max(rows, columns) >= MAX_POSITIONS:
        raise InputError(f"images of {rows} x {columns} patches are too large; the rotary tables have {MAX_POSITIONS} positions")
    axes = (torch.arange(1, size + 1, device="cpu") for size in (rows, columns))
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)
    return torch.cat((grid.new_zeros(special, 2), grid)).expand(views, -1, -1).contiguous().to(device)


def finish_in_fp32(module: nn.Module) -> None:
    """Give the output of `module`, one tensor, back in FP32: the activations that follow it need the precision."""
    module.register_forward_hook(_to_fp32)


def _to_fp32(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.float()
