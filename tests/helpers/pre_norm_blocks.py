"""Transformer blocks as DINOv2's, small: what a `PreNormBlock` describes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import Attention

DIM = 32


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(DIM, 96), nn.Linear(48, DIM)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    """As DINOv2's; `kind` is the activation."""

    def __init__(self, kind: str, scaled: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM, bias=False)
        nn.init.uniform_(self.norm1.weight, 0.5, 2)
        self.attn = Attention(DIM, 2)
        self.ls1, self.ls2 = (LayerScale() if scaled else nn.Identity() for _ in range(2))
        act = nn.GELU(approximate="tanh" if kind == "gelu_tanh" else "none")
        self.mlp = SwiGLU() if kind == "swiglu" else nn.Sequential(nn.Linear(DIM, 64), act, nn.Linear(64, DIM))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), mask))
        return x + self.ls2(self.mlp(self.norm2(x)))
