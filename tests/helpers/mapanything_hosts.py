"""Small models of several views with the structure of MapAnything and of UniCeption's transformers."""

from __future__ import annotations

import dataclasses
from typing import Any

import hosts
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass
class Features:
    features: list[Tensor]
    additional_input_tokens: Tensor | None = None
    additional_input_tokens_per_view: list[Tensor] | None = None


class Attention(nn.Module):
    def __init__(self, dim: int, encoding: Any = None, growing: bool = False, gain: float = 1.0) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = 2, dim // 2, (dim // 2) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.custom_positional_encoding, self.use_scalable_softmax, self.use_entropy_scaling = encoding, growing, False
        self.gain = gain

    def forward(self, x: Tensor, xpos: Any = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).movedim(2, 0).transpose(2, 3)
        if self.custom_positional_encoding is not None:
            q, k = (self.custom_positional_encoding(t, xpos) for t in (q, k))
        if self.use_scalable_softmax:
            q = q * torch.log(torch.tensor(float(x.shape[1])))
        out = F.scaled_dot_product_attention(q * self.gain, k, v, scale=self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 4 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, dim: int, encoding: Any, **options: Any) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(dim), nn.LayerNorm(dim), Mlp(dim)
        self.attn, self.custom_positional_encoding = Attention(dim, encoding, **options), encoding

    def forward(self, x: Tensor, xpos: Any = None) -> Tensor:
        x = x + self.attn(self.norm1(x), xpos)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Blocks of all views, in turn with blocks of one view if it alternates."""

    def __init__(self, alternates: bool, depth: int = 4, reference: bool = True, encoding: Any = None, **options: Any) -> None:
        super().__init__()
        self.alternates, self.distinguish_ref_and_non_ref_views = alternates, reference
        self.encoding = encoding
        self.self_attention_blocks = nn.ModuleList(Block(32, encoding, **options) for _ in range(depth))

    def forward(self, model_input: Features) -> Tensor:
        views, own = model_input.features, model_input.additional_input_tokens_per_view
        batch, _, rows, columns = views[0].shape
        x = torch.stack([torch.cat((f.flatten(2), *(() if own is None else (own[i],))), 2) for i, f in enumerate(views)], 1).mT
        per_view = x.shape[2]
        x = x.flatten(1, 2)
        last = model_input.additional_input_tokens
        if last is not None:
            x = torch.cat((x, last.mT), 1)
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        positions: Any = [None] * len(views) if self.encoding is None else grid.repeat(len(views), 1).expand(batch, -1, -1)
        for i, block in enumerate(self.self_attention_blocks):
            if self.alternates and i % 2:
                end = x[:, per_view * len(views) :]
                inside = None if self.encoding is None else grid.expand(batch * len(views), -1, -1)
                x = block(x[:, : per_view * len(views)].reshape(-1, per_view, x.shape[-1]), positions if inside is None else inside)
                x = torch.cat((x.reshape(batch, -1, x.shape[-1]), end), 1)
            else:
                x = block(x, positions)
        return x


class MapAnything(nn.Module):
    """``model([view, ...])``, each a dict with an ``img`` ``[B, 3, H, W]``."""

    def __init__(self, alternates: bool = True, registers: bool = True, scale: bool = True, **options: Any) -> None:
        super().__init__()
        self.info_sharing_type = "alternating_attention" if alternates else "global_attention"
        self.encoder = nn.Module()
        self.encoder.model = hosts.Encoder(14, 32, 2, 1)
        self.info_sharing = Transformer(alternates, **options)
        self.registers, self.scale = (nn.Parameter(torch.randn(1, 32, n)) if there else None for n, there in ((2, registers), (1, scale)))
        self.dense_head = nn.Linear(32, 3)

    def forward(self, views: list[dict[str, Tensor]]) -> Tensor:
        batch, _, height, width = views[0]["img"].shape
        x: Tensor = self.encoder.model(torch.cat([view["img"] for view in views]))  # pyright: ignore[reportCallIssue]
        features = list(x.mT.unflatten(2, (height // 14, width // 14)).split(batch))
        own = None if self.registers is None else [self.registers.expand(batch, -1, -1)] * len(views)
        last = None if self.scale is None else self.scale.expand(batch, -1, -1)
        return self.dense_head(self.info_sharing(Features(features, last, own)))


def make(**options: Any) -> MapAnything:
    torch.manual_seed(0)
    return MapAnything(**options).eval()


def view(height: int, width: int, seed: int = 0) -> dict[str, Any]:
    pixels = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))
    return {"img": pixels * 2 - 1, "data_norm_type": ["dinov2"]}


class Crossing(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_heads, self.custom_positional_encoding = 2, None
        self.projq, self.projk, self.projv, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, qpos: Any = None, kpos: Any = None) -> Tensor:
        made = ((self.projq, query), (self.projk, key), (self.projv, value))
        q, k, v = (linear(x).unflatten(-1, (2, -1)).transpose(1, 2) for linear, x in made)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm_y = (nn.LayerNorm(dim) for _ in range(3))
        self.attn, self.cross_attn = Attention(dim), Crossing(dim)

    def forward(self, x: Tensor, y: Tensor, xpos: Any = None, ypos: Any = None) -> Tensor:
        x = x + self.attn(self.norm1(x), xpos)
        y = self.norm_y(y)
        return x + self.cross_attn(self.norm2(x), y, y, xpos, ypos)


class CrossTransformer(nn.Module):
    """Blocks of one view each, which also attend to all other views."""

    def __init__(self, views: int, depth: int = 2) -> None:
        super().__init__()
        self.multi_view_branches = nn.ModuleList(nn.ModuleList(CrossBlock(32) for _ in range(depth)) for _ in range(views))

    def forward(self, model_input: Features) -> Tensor:
        views = [x.flatten(2).mT for x in model_input.features]
        for blocks in zip(*self.multi_view_branches, strict=True):  # pyright: ignore[reportArgumentType]
            views = [block(x, torch.cat([y for y in views if y is not x], 1)) for block, x in zip(blocks, views, strict=True)]
        return torch.cat(views, 1)
