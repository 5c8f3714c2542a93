"""A toy multi-view depth model, and its Lite3R adapter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lite3r_plugin import AttentionSite, SeparateQKV, TokenSource, hookimpl


class CrossViewAttention(nn.Module):
    """Self-attention over the tokens of all views: ``[B, N, C] -> [B, N, C]``."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for linear in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TinyMultiView(nn.Module):
    """Depth of every patch from several views: ``[B, S, 3, H, W] -> [B, S, patches]``. One camera token per view."""

    def __init__(self, dim: int = 64, num_heads: int = 2, depth: int = 2, patch_size: int = 16) -> None:
        super().__init__()
        self.dim, self.num_heads, self.patch_size = dim, num_heads, patch_size
        self.to_patches = nn.Conv2d(3, dim, patch_size, patch_size)
        self.camera = nn.Parameter(torch.randn(dim))
        self.cross_view = nn.ModuleList(CrossViewAttention(dim, num_heads) for _ in range(depth))
        self.depth = nn.Linear(dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        batch, views = images.shape[:2]
        x = self.to_patches(images.flatten(0, 1)).flatten(2).transpose(1, 2)
        x = torch.cat((self.camera.expand(len(x), 1, -1), x), 1).unflatten(0, (batch, views)).flatten(1, 2)
        for attention in self.cross_view:
            x = x + attention(x)
        return self.depth(x.unflatten(1, (views, -1))[:, :, 1:]).squeeze(-1)


@hookimpl
def lite3r_attention_sites(model: nn.Module) -> list[AttentionSite] | None:
    """Sites of every TinyMultiView inside `model`."""
    sites = []
    for name, module in model.named_modules():
        if isinstance(module, TinyMultiView):
            dot = f"{name}." if name else ""
            tokens = TokenSource(f"{dot}to_patches", (module.patch_size, module.patch_size), special_tokens=1)
            projections = SeparateQKV(module.num_heads, q="query", k="key", v="value", out="out")
            head_dim = module.dim // module.num_heads
            for i in range(len(module.cross_view)):
                sites.append(AttentionSite(f"{dot}cross_view.{i}", "global", head_dim, projections, tokens))
    return sites or None
