"""Building blocks of the testbed: image stem, rotary attention, transformer block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AxialRope(nn.Module):
    """Rotary embedding on two axes: half of the head dimension turns with the token's row, the other half with its column.

    Angles are made on the device from the positions, so nothing waits for the device and CUDA graphs can capture it.
    """

    def __init__(self, base_frequency: float = 100.0) -> None:
        super().__init__()
        self.base_frequency = base_frequency

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        """x: ``[B, H, N, D]`` with D a multiple of 4; pos: ``[B, N, 2]`` rows and columns. Returns x's dtype."""
        quarter = x.shape[-1] // 4
        exponents = torch.arange(quarter, device=x.device, dtype=torch.float32) / quarter
        angles = (pos[..., None].float() * self.base_frequency**-exponents)[:, None]  # [B, 1, N, 2, D/4]
        cos, sin = angles.cos(), angles.sin()
        a, b = x.float().unflatten(-1, (2, 2, quarter)).unbind(-2)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -2).flatten(-3).to(x.dtype)


class Attention(nn.Module):
    """Self-attention with normalised queries and keys and an optional rotary embedding."""

    def __init__(self, dim: int, head_dim: int = 64, rope: AxialRope | None = None) -> None:
        super().__init__()
        self.num_heads = dim // head_dim
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(head_dim)
        self.k_norm = nn.LayerNorm(head_dim)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)
        self.rope = rope

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        """x: ``[B, N, C]``; pos: ``[B, N, 2]``, or None without rotary embedding."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None and pos is not None:
            q, k = self.rope(q, pos), self.rope(k, pos)
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class LayerScale(nn.Module):
    """A learnt gain per channel on a residual branch."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        """x: ``[..., C]``."""
        return x * self.gamma


class Block(nn.Module):
    """A transformer block: attention and MLP, each behind a LayerNorm and in front of a `LayerScale`."""

    def __init__(self, dim: int, head_dim: int, mlp_ratio: float, layer_scale: float, rope: AxialRope | None = None) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, head_dim, rope)
        self.ls1 = LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.ls2 = LayerScale(dim, layer_scale)

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        """x: ``[B, N, C]``; pos: ``[B, N, 2]`` or None."""
        x = x + self.ls1(self.attn(self.norm1(x), pos=pos))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchStem(nn.Module):
    """Convolutions from an image to one token per 8 x 8 patch. They learn faster from scratch than one large kernel."""

    patch_size = 8

    def __init__(self, dim: int, width: int = 64) -> None:
        super().__init__()
        self.to_half = _conv(3, width, stride=2)
        self.to_quarter = nn.Sequential(_conv(width, 2 * width, stride=2), _conv(2 * width, 2 * width))
        self.to_eighth = nn.Sequential(_conv(2 * width, 4 * width, stride=2), _conv(4 * width, 4 * width))
        self.out = nn.Conv2d(4 * width, dim, 1)
        self.fine_dim = 2 * width

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images: ``[B, 3, H, W]`` in [0, 1]. Returns tokens ``[B, H/8 * W/8, C]`` and fine features ``[B, F, H/4, W/4]``."""
        fine = self.to_quarter(self.to_half((images.to(self.out.weight.dtype) - 0.5) * 4))
        return self.out(self.to_eighth(fine)).flatten(2).transpose(1, 2), fine


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(8, outputs), nn.GELU())
