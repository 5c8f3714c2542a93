"""What the tests of the attention operators run on: as compiled on a GPU, interpreted at small sizes elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BLOCK_Q, BLOCK_K = (128, 64) if GPU else (32, 16)
BLOCKS: dict[str, int] = dict(block_q=BLOCK_Q, block_k=BLOCK_K)
LENGTHS = (1, 63, 257, 1374, 5497) if GPU else (1, 15, 97)
# tl.dot of bfloat16 is wrong in Triton's interpreter
HALF = torch.bfloat16 if GPU else torch.float16
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if GPU else (torch.float16, torch.float32)
Branch = tuple[str, str, bool]  # linear branch, its feature map, whether there are block means
BRANCHES: list[Branch] = [
    ("none", "softmax", False), ("none", "softmax", True), ("all", "softmax", True), ("all", "elu", False),
    ("marginal", "softmax", False), ("marginal", "elu", True),
]  # fmt: skip


def random_qkv(tokens: int, dim: int, dtype: torch.dtype, batch: int = 2, heads: int = 2) -> tuple[Tensor, ...]:
    """q, k, v ``[B, H, N, D]`` as views of one qkv Linear's output, as hosts make them."""
    qkv = torch.randn(batch, tokens, 3, heads, dim, device=DEVICE).to(dtype)
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def random_proj(dim: int) -> Tensor:
    """A weight of Proj ``[D, D]``."""
    return torch.randn(dim, dim, device=DEVICE) * 0.3


def random_order(tokens: int) -> Tensor:
    """``[N]`` int32."""
    return torch.randperm(tokens, device=DEVICE).int()


def norms(dim: int) -> dict[str, Any]:
    """Head norms by name."""
    from lite3r_plugin.ops.qk_norm_rope import HeadNorm

    weight, bias = torch.randn(2, dim, device=DEVICE)
    return {
        "none": None,
        "layer": HeadNorm("layer", weight, bias, 1e-5),
        "rms": HeadNorm("rms", weight, None, 1e-6),
        "layer without affine": HeadNorm("layer", None, None, 1e-6),
    }
