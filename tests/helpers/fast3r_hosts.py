"""A small model of any number of views, of any sizes, with the structure of Fast3R."""

from __future__ import annotations

from typing import Any

import croco_hosts
import hosts
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(croco_hosts.Attention):
    """With the switches of Fast3R's: which function attends, and larger scores in evaluation."""

    def __init__(self, dim: int, rope: nn.Module | None, implementation: str, larger: bool) -> None:
        super().__init__(dim, 2, hosts.AxialRope("base"))
        self.rope = rope  # pyright: ignore[reportAttributeAccessIssue]
        self.attn_implementation, self.attn_bias_for_inference_enabled = implementation, larger

    def forward(self, x: Tensor, xpos: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).movedim(2, 0).transpose(2, 3)
        if self.rope is not None:
            q, k = self.rope(q, xpos), self.rope(k, xpos)
        scale = self.scale * (1.2 if self.attn_bias_for_inference_enabled and not self.training else 1)
        if self.attn_implementation == "pytorch_naive":
            out = (q @ k.mT * scale).softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


def block(rope: nn.Module | None, implementation: str, larger: bool) -> nn.Module:
    made = croco_hosts.Block(32, 2, hosts.AxialRope("base"))
    made.attn = Attention(32, rope, implementation, larger)
    return made


class Encoder(nn.Module):
    def __init__(self, implementation: str) -> None:
        super().__init__()
        self.patch_embed = hosts.Patches(croco_hosts.PATCH, 32)
        self.rope = hosts.AxialRope("base")
        self.enc_blocks = nn.ModuleList([block(self.rope, implementation, larger=False)])

    def forward(self, image: Tensor, true_shape: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patch_embed(image)
        rows, columns = (size // croco_hosts.PATCH for size in image.shape[-2:])
        pos = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).expand(len(x), -1, -1).clone()
        for one in self.enc_blocks:
            x = one(x, pos)
        return x, pos


class Decoder(nn.Module):
    def __init__(self, implementation: str, larger: bool) -> None:
        super().__init__()
        self.decoder_embed = nn.Linear(32, 32)
        self.dec_blocks = nn.ModuleList(block(None, implementation, larger) for _ in range(2))
        self.index = nn.Parameter(torch.randn(8, 32))

    def forward(self, encoded_feats: list[Tensor], positions: list[Tensor], image_ids: Tensor) -> Tensor:
        x, pos = self.decoder_embed(torch.cat(encoded_feats, 1)) + self.index[image_ids], torch.cat(positions, 1)
        for one in self.dec_blocks:
            x = one(x, pos)
        return x


class Fast3R(nn.Module):
    """``model([view, ...])``, each a dict with an ``img`` ``[B, 3, H, W]``."""

    def __init__(self, implementation: str = "flash_attention", larger: bool = False) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(implementation), Decoder(implementation, larger)
        self.downstream_head = nn.Linear(32, 3)

    def forward(self, views: list[dict[str, Any]]) -> list[Tensor]:
        seen = [self.encoder(one["img"], one["true_shape"]) for one in views]
        ids = torch.cat([torch.full((x.shape[1],), i) for i, (x, _) in enumerate(seen)])
        x = self.decoder([x for x, _ in seen], [pos for _, pos in seen], ids)
        return list(self.downstream_head(x).split([x.shape[1] for x, _ in seen], 1))


def make(implementation: str = "flash_attention", larger: bool = False) -> Fast3R:
    torch.manual_seed(0)
    return Fast3R(implementation, larger).eval()
