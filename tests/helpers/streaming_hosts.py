"""Small models that see a stream of frames through a cache of keys and values, with the structure of StreamVGGT and STream3R."""

from __future__ import annotations

from typing import Any

import hosts
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH, REGISTERS = 14, 4


class RawCache(hosts._Attention):
    """As in StreamVGGT: keys are cached as they are made, by frames, and all are normed and rotated in every call."""

    def forward(
        self, x: Tensor, pos: Tensor | None = None, attn_mask: Tensor | None = None, past_key_values: Any = None, use_cache: bool = False
    ) -> Any:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).movedim(2, 0).transpose(2, 3)
        key_positions = pos
        if use_cache:
            k, v = (torch.cat((*old, new[:, :, None]), 2) for old, new in zip(_olds(past_key_values), (k, v), strict=True))
            cached, frames = (k, v), k.shape[2]
            k, v = k.flatten(2, 3), v.flatten(2, 3)
            key_positions = None if pos is None else pos.repeat(1, frames, 1)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = self.rope(q, pos), self.rope(k, key_positions)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask)
        out = self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
        return (out, cached) if use_cache else out


class FinishedCache(hosts._Attention):
    """As in STream3R: keys are cached after norm and rotary embedding, one token after the other."""

    def forward(self, x: Tensor, pos: Tensor | None = None, attn_mask: Tensor | None = None, kv_cache: Any = None) -> Any:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).movedim(2, 0).transpose(2, 3)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = self.rope(q, pos), self.rope(k, pos)
        if kv_cache is not None:
            k, v = (torch.cat((*old, new), 2) for old, new in zip(_olds(kv_cache), (k, v), strict=True))
            kv_cache = [k, v]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask)
        out = self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
        return out if kv_cache is None else (out, kv_cache)


def _olds(past: Any) -> list[tuple[Tensor, ...]]:
    """k and v that came before, each in a tuple, which is empty at the beginning."""
    return [() if past is None or past[i] is None else (past[i],) for i in range(2)]


class Block(hosts.Block):
    """Attention, which may return a cache, and an MLP, with residuals."""

    def forward(self, x: Tensor, **given: Any) -> Any:
        out = self.attn(self.norm1(x), **given)
        out, *cached = out if isinstance(out, tuple) else (out,)
        x = x + out
        x = x + self.mlp(self.norm2(x))
        return (x, *cached) if cached else x


class Aggregator(nn.Module):
    """Frame and global blocks in turn. `past` is a list of what each global block cached, which a call writes to; None: no cache."""

    def __init__(self, kind: type[Any] = RawCache, dim: int = 32, num_heads: int = 2, depth: int = 2) -> None:
        super().__init__()
        self.patch_size, self.patch_start_idx = PATCH, 1 + REGISTERS
        self.patch_embed = hosts.Patches(PATCH, dim)
        self.special = nn.Parameter(torch.randn(2, 1 + REGISTERS, dim))
        self.rope = hosts.AxialRope("base_frequency")
        make = lambda: Block(kind(dim, num_heads, self.rope, qk_norm=True), dim)  # noqa: E731
        self.frame_blocks = nn.ModuleList(make() for _ in range(depth))
        self.global_blocks = nn.ModuleList(make() for _ in range(depth))

    def forward(self, images: Tensor, past: list[Any] | None = None, window: int | None = None) -> Tensor:
        batch, views, _, height, width = images.shape
        x = self.patch_embed(images.flatten(0, 1))
        first = past is None or past[0] is None
        special = self.special[[0 if first and i == 0 else 1 for i in range(views)] * batch]
        x = torch.cat((special, x), 1)
        pos = hosts.grid_positions(len(x), height // PATCH, width // PATCH, self.patch_start_idx)
        for i, (frame, across) in enumerate(zip(self.frame_blocks, self.global_blocks, strict=True)):
            x = frame(x, pos=pos)
            joint, where = x.unflatten(0, (batch, views)).flatten(1, 2), pos.unflatten(0, (batch, views)).flatten(1, 2)
            if past is None:
                joint = across(joint, pos=where, attn_mask=self.mask(views, x.shape[1], window))
            elif isinstance(across.attn, FinishedCache) or "kv_cache" in getattr(across.attn, "argument_names", ()):
                joint, past[i] = across(joint, pos=where, kv_cache=past[i] or [None, None])
            else:
                joint, past[i] = across(joint, pos=where, past_key_values=past[i], use_cache=True)
            x = joint.unflatten(1, (views, -1)).flatten(0, 1)
        return x.unflatten(0, (batch, views))

    def mask(self, views: int, tokens: int, window: int | None) -> Tensor:
        """Frame-causal; with a window, of the first frame and the last ones, as STream3R has it."""
        frame = torch.arange(views).repeat_interleave(tokens)
        apart = frame[:, None] - frame
        seen = (apart >= 0) if window is None else (apart >= 0) & ((apart < window) | (frame == 0))
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)

    def stream(self, frames: Tensor, past: list[Any] | None = None) -> Tensor:
        """Frame by frame, ``[B, S, 3, H, W]``, on from `past`, which it writes to."""
        past = [None] * len(self.global_blocks) if past is None else past
        return torch.cat([self(frame, past) for frame in frames.split(1, 1)], 1)


def make(kind: type[Any] = RawCache) -> Aggregator:
    """One with the same weights every time."""
    torch.manual_seed(0)
    return Aggregator(kind).eval()


def frames(count: int = 5, height: int = 56, width: int = 84) -> Tensor:
    """``[1, S, 3, H, W]``."""
    return torch.rand(1, count, 3, height, width, generator=torch.Generator().manual_seed(1))
