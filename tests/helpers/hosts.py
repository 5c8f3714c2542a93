"""Small models with the structure of VGGT and Pi3, written for these tests: the names that the adapters look for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AxialRope(nn.Module):
    """Rotates half of each head by the row and half by the column; `name` is the attribute that holds the base."""

    def __init__(self, name: str, base: float = 100.0) -> None:
        super().__init__()
        self.name = name
        setattr(self, name, base)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        quarter = x.shape[-1] // 4
        speeds = torch.tensor([getattr(self, self.name) ** (-i / quarter) for i in range(quarter)], dtype=x.dtype)
        rotated = []
        for axis, half in enumerate(x.chunk(2, dim=-1)):
            angle = positions[:, None, :, axis, None].to(x.dtype) * speeds
            real, imaginary = half[..., :quarter], half[..., quarter:]
            rotated += [real * angle.cos() - imaginary * angle.sin(), imaginary * angle.cos() + real * angle.sin()]
        return torch.cat(rotated, -1)


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, rope: nn.Module | None = None, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)
        self.rope = rope

    def attend(self, x: Tensor, positions: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).movedim(2, 0).transpose(2, 3)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = self.rope(q, positions), self.rope(k, positions)
        return self.proj_drop(self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


class PosAttention(_Attention):
    """As in VGGT: the argument with the coordinates is `pos`."""

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        return self.attend(x, pos)


class XposAttention(_Attention):
    """As in Pi3: the argument with the coordinates is `xpos`."""

    def forward(self, x: Tensor, attn_bias: None = None, xpos: Tensor | None = None) -> Tensor:
        return self.attend(x, xpos)


class Block(nn.Module):
    """Attention and an MLP, with residuals."""

    def __init__(self, attn: nn.Module, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = attn
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, **positions: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), **positions)
        return x + self.mlp(self.norm2(x))


class Patches(nn.Module):
    """``[B, 3, H, W] -> [B, patches, C]``."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    """A DINOv2: one class token, registers, blocks; returns the patch tokens."""

    def __init__(self, patch_size: int, dim: int, num_heads: int, depth: int, registers: int = 2) -> None:
        super().__init__()
        self.num_register_tokens = registers
        self.patch_size = patch_size
        self.patch_embed = Patches(patch_size, dim)
        self.special = nn.Parameter(torch.randn(1, 1 + registers, dim))
        self.blocks = nn.ModuleList(Block(PosAttention(dim, num_heads), dim) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat((self.special.expand(x.shape[0], -1, -1), x), 1)
        for block in self.blocks:
            x = block(x)
        return x[:, 1 + self.num_register_tokens :]


def grid_positions(views: int, rows: int, columns: int, special: int) -> Tensor:
    """``[views, special + rows * columns, 2]``: zeros for special tokens, coordinates from 1 for patches."""
    patches = torch.cartesian_prod(torch.arange(1, rows + 1), torch.arange(1, columns + 1))
    return F.pad(patches, (0, 0, special, 0)).expand(views, -1, -1)


class Aggregator(nn.Module):
    """As VGGT's: a camera token and registers per view, then frame and global blocks in turn."""

    def __init__(self, patch_embed: nn.Module, dim: int = 32, num_heads: int = 2, depth: int = 2, rope: bool = True) -> None:
        super().__init__()
        self.patch_size = 14
        self.patch_embed = patch_embed
        self.camera_token = nn.Parameter(torch.randn(1, 2, 1, dim))
        self.register_token = nn.Parameter(torch.randn(1, 2, 4, dim))
        self.patch_start_idx = 5
        self.rope = AxialRope("base_frequency") if rope else None

        def blocks() -> nn.ModuleList:
            return nn.ModuleList(Block(PosAttention(dim, num_heads, self.rope, qk_norm=True), dim) for _ in range(depth))

        self.frame_blocks, self.global_blocks = blocks(), blocks()

    def forward(self, images: Tensor) -> Tensor:
        batch, views, _, height, width = images.shape
        special = torch.cat((self.camera_token, self.register_token), 2)  # [1, 2, 5, C]: of the first view and of the others
        special = torch.cat((special[:, :1], special[:, 1:].expand(-1, views - 1, -1, -1)), 1).expand(batch, -1, -1, -1)
        x = torch.cat((special.flatten(0, 1), self.patch_embed(images.flatten(0, 1))), 1)
        pos = grid_positions(batch * views, height // 14, width // 14, 5) if self.rope is not None else None
        for frame, across in zip(self.frame_blocks, self.global_blocks, strict=True):
            x = frame(x, pos=pos)
            joint = None if pos is None else pos.unflatten(0, (batch, views)).flatten(1, 2)
            x = across(x.unflatten(0, (batch, views)).flatten(1, 2), pos=joint).unflatten(1, (views, -1)).flatten(0, 1)
        return x.unflatten(0, (batch, views))


class VGGT(nn.Module):
    """An aggregator with a pose and a depth head."""

    def __init__(self, *, encoder: bool = True, dim: int = 32, depth: int = 2, rope: bool = True) -> None:
        super().__init__()
        patch_embed = Encoder(14, dim, 2, depth=1) if encoder else Patches(14, dim)
        self.aggregator = Aggregator(patch_embed, dim, depth=depth, rope=rope)
        self.camera_head = nn.Linear(dim, 9)
        self.depth_head = nn.Linear(dim, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.aggregator(images)
        return {"pose_enc": self.camera_head(x[:, :, 0]), "depth": self.depth_head(x[:, :, 5:])}


class Head(nn.Module):
    """As Pi3's decoders: blocks over one view."""

    def __init__(self, dim: int, rope: nn.Module, out: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(XposAttention(dim, 2, rope), dim)])
        self.linear_out = nn.Linear(dim, out)

    def forward(self, x: Tensor, xpos: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, xpos=xpos)
        return self.linear_out(x)


class Pi3(nn.Module):
    """An encoder, and one list of blocks of which every second attends across views."""

    def __init__(self, dim: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.patch_size = 14
        self.encoder = Encoder(14, dim, 2, depth=1)
        self.rope = AxialRope("base")
        self.decoder = nn.ModuleList(Block(XposAttention(dim, 2, self.rope, qk_norm=True), dim) for _ in range(depth))
        self.patch_start_idx = 5
        self.register_token = nn.Parameter(torch.randn(1, 1, 5, dim))
        self.point_decoder = Head(dim, self.rope, 3)
        self.camera_decoder = Head(dim, self.rope, 7)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        batch, views, _, height, width = images.shape
        x = self.encoder(images.flatten(0, 1))
        x = torch.cat((self.register_token[0].expand(x.shape[0], -1, -1), x), 1)
        pos = grid_positions(batch * views, height // 14, width // 14, 5)
        for i, block in enumerate(self.decoder):
            shape = (batch, -1) if i % 2 else (batch * views, -1)
            x = block(x.reshape(*shape, x.shape[-1]), xpos=pos.reshape(*shape, 2))
        x = x.reshape(batch * views, -1, x.shape[-1])
        return {"points": self.point_decoder(x, pos)[:, 5:], "camera_poses": self.camera_decoder(x, pos).mean(1)}
