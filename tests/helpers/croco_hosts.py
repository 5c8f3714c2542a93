"""A small model of two views with the structure of DUSt3R: CroCo's encoder and two decoders that attend to each other."""

from __future__ import annotations

from typing import Any

import hosts
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 16


class Attention(nn.Module):
    """Within a view."""

    def __init__(self, dim: int, num_heads: int, rope: nn.Module) -> None:
        super().__init__()
        self.num_heads, self.scale, self.rope = num_heads, (dim // num_heads) ** -0.5, rope
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor, xpos: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).movedim(2, 0).transpose(2, 3)
        q, k = self.rope(q, xpos), self.rope(k, xpos)
        out = (q @ k.mT * self.scale).softmax(-1) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class CrossAttention(nn.Module):
    """From one view to another."""

    def __init__(self, dim: int, num_heads: int, rope: nn.Module) -> None:
        super().__init__()
        self.num_heads, self.scale, self.rope = num_heads, (dim // num_heads) ** -0.5, rope
        self.projq, self.projk, self.projv, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def made(self, query: Tensor, key: Tensor, value: Tensor, qpos: Tensor, kpos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v ``[B, H, n, D]``."""
        q, k, v = (
            linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for linear, x in ((self.projq, query), (self.projk, key), (self.projv, value))
        )
        return self.rope(q, qpos), self.rope(k, kpos), v

    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``[B, H, n, D]``."""
        return (q @ k.mT * self.scale).softmax(-1) @ v

    def forward(self, query: Tensor, key: Tensor, value: Tensor, qpos: Tensor, kpos: Tensor) -> Tensor:
        out = self.attended(*self.made(query, key, value, qpos, kpos))
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class FusedCross(CrossAttention):
    """As in CUT3R, by one call of torch."""

    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale)


class OtherScale(CrossAttention):
    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attended(q * 1.5, k, v)


class FusedOtherScale(FusedCross):
    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attended(q * 1.5, k, v)


class SwappedPositions(CrossAttention):
    def made(self, query: Tensor, key: Tensor, value: Tensor, qpos: Tensor, kpos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().made(query, key, value, qpos.flip(-1), kpos)


class ValuesFromKeys(CrossAttention):
    def made(self, query: Tensor, key: Tensor, value: Tensor, qpos: Tensor, kpos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().made(query, key, key.roll(1, 1), qpos, kpos)


class Gated(FusedCross):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, qpos: Tensor, kpos: Tensor) -> Tensor:
        return super().forward(query, key, value, qpos, kpos) * query.sigmoid()


def _mlp(dim: int) -> nn.Module:
    layers: Any = {"fc1": nn.Linear(dim, 2 * dim), "act": nn.GELU(), "drop1": nn.Dropout(0.0), "fc2": nn.Linear(2 * dim, dim)}
    mlp = nn.Sequential()
    for name, layer in layers.items():
        mlp.add_module(name, layer)
    return mlp


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, rope: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(dim), nn.LayerNorm(dim), _mlp(dim)
        self.attn, self.drop_path = Attention(dim, num_heads, rope), nn.Identity()

    def forward(self, x: Tensor, xpos: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), xpos))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DecoderBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, rope: nn.Module, across: type[CrossAttention]) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3, self.norm_y = (nn.LayerNorm(dim) for _ in range(4))
        self.attn, self.cross_attn, self.mlp = Attention(dim, num_heads, rope), across(dim, num_heads, rope), _mlp(dim)

    def forward(self, x: Tensor, y: Tensor, xpos: Tensor, ypos: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attn(self.norm1(x), xpos)
        other = self.norm_y(y)
        x = x + self.cross_attn(self.norm2(x), other, other, xpos, ypos)
        return x + self.mlp(self.norm3(x)), y


class Pair(nn.Module):
    """``model(view, view)``, each a dict with an ``img`` ``[B, 3, H, W]``."""

    def __init__(self, across: type[CrossAttention] = CrossAttention, dim: int = 64, num_heads: int = 2, depth: int = 2) -> None:
        super().__init__()
        rope = hosts.AxialRope("base")
        self.patch_embed = hosts.Patches(PATCH, dim)
        self.enc_blocks = nn.ModuleList([Block(dim, num_heads, rope)])
        self.dec_blocks, self.dec_blocks2 = (
            nn.ModuleList(DecoderBlock(dim, num_heads, rope, across) for _ in range(depth)) for _ in range(2)
        )

    def forward(self, view1: dict[str, Tensor], view2: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        f1, pos1 = self.encode(view1["img"])
        f2, pos2 = self.encode(view2["img"])
        return self.decode(f1, pos1, f2, pos2)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and their coordinates."""
        x = self.patch_embed(image)
        pos = torch.cartesian_prod(*(torch.arange(size // PATCH) for size in image.shape[-2:])).expand(len(x), -1, -1).clone()
        for block in self.enc_blocks:
            x = block(x, pos)
        return x, pos

    def decode(self, f1: Tensor, pos1: Tensor, f2: Tensor, pos2: Tensor) -> tuple[Tensor, Tensor]:
        """Both views' tokens, each with those of the other."""
        for one, other in zip(self.dec_blocks, self.dec_blocks2, strict=True):
            f1, f2 = one(f1, f2, pos1, pos2)[0], other(f2, f1, pos2, pos1)[0]
        return f1, f2


def make(across: type[CrossAttention] = CrossAttention) -> Pair:
    """One with the same weights every time."""
    torch.manual_seed(0)
    return Pair(across).eval()


def view(height: int, width: int, seed: int = 0) -> dict[str, Any]:
    """A view with random pixels."""
    pixels = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))
    return {"img": pixels * 2 - 1, "true_shape": torch.tensor([[height, width]]), "instance": [str(seed)]}
