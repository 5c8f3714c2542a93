"""Toy models for tests of the engine, and the adapter that knows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pluggy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lite3r_plugin import AttentionSite, FusedQKV, Routed, SeparateQKV, TokenSource, hookimpl
from lite3r_plugin.adapter import hookspecs, plugins

PATCH, SPECIAL = 4, 2


class Attention(nn.Module):
    """Fused qkv; `variant` is what it asks of the attention function."""

    def __init__(self, dim: int, num_heads: int, variant: str = "plain") -> None:
        super().__init__()
        self.num_heads, self.variant = num_heads, variant
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        options: dict[str, Any] = {
            "plain": {},
            "causal": {"is_causal": True},
            "dropout": {"dropout_p": 0.5},
            "negative": {"scale": -0.25},
        }.get(self.variant, {})
        if self.variant == "cross":
            k, v = k[:, :, 1:], v[:, :, 1:]
        if self.variant == "eager":
            out = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
        if self.variant == "twice":
            out = out + F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class Separate(nn.Module):
    """Three Linears instead of one."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Toy(nn.Module):
    """Images ``[B, S, 3, H, W]`` to a number for each token; frame and global attention in turn, two special tokens a view."""

    def __init__(self, dim: int = 32, num_heads: int = 2, depth: int = 2, make: Callable[[int, int], nn.Module] = Attention) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, dim, PATCH, PATCH)
        self.special = nn.Parameter(torch.randn(SPECIAL, dim))
        self.frame = nn.ModuleList(make(dim, num_heads) for _ in range(depth))
        self.cross = nn.ModuleList(make(dim, num_heads) for _ in range(depth))
        self.head = nn.Linear(dim, 1)

    def forward(self, images: Tensor, **options: Any) -> Tensor:
        batch, views = images.shape[:2]
        x = self.embed(images.flatten(0, 1)).flatten(2).transpose(1, 2)
        x = torch.cat((self.special.expand(x.shape[0], -1, -1), x), 1)
        for frame, cross in zip(self.frame, self.cross, strict=True):
            x = x + frame(x)
            joint = x.unflatten(0, (batch, views)).flatten(1, 2)
            x = (joint + cross(joint, **options)).unflatten(1, (views, -1)).flatten(0, 1)
        return self.head(x).unflatten(0, (batch, views)).squeeze(-1)


def images(views: int = 3, height: int = 32, width: int = 40, batch: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(batch, views, 3, height, width, dtype=dtype, generator=torch.Generator().manual_seed(1))


def sites(model: Toy, prefix: str = "") -> list[AttentionSite]:
    """What the adapter says about `model`: Routed where the module does more than the plain forward."""
    found = []
    source = TokenSource(f"{prefix}embed", (PATCH, PATCH), SPECIAL)
    for kind, scope in (("frame", "frame"), ("cross", "global")):
        for i, module in enumerate(getattr(model, kind)):
            heads = module.num_heads
            if isinstance(module, Separate):
                projections, width = SeparateQKV(heads), module.q_proj.out_features
            else:
                width = module.proj.in_features
                plain = getattr(module, "variant", "") == "plain"
                projections = FusedQKV(heads, attn_drop="attn_drop") if plain else Routed(heads)
            found.append(AttentionSite(f"{prefix}{kind}.{i}", scope, width // heads, projections, source))
    return found


class Adapter:
    """A plugin object whose answer can be exchanged: ``Adapter(lambda model: ...)``."""

    def __init__(self, answer: Callable[[nn.Module], Sequence[Any] | None]) -> None:
        self.answer = answer

    @hookimpl
    def lite3r_attention_sites(self, model: nn.Module) -> Sequence[Any] | None:
        return self.answer(model)


def toy_answer(model: nn.Module) -> list[AttentionSite] | None:
    """Sites of every Toy inside `model`."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, Toy):
            found += sites(module, f"{name}." if name else "")
    return found or None


@pytest.fixture(name="adapter")
def toy_adapter(monkeypatch: pytest.MonkeyPatch) -> Adapter:
    """The only installed adapter knows Toy; a test may exchange its answer."""
    toy = Adapter(toy_answer)
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(toy, name="toy")
    monkeypatch.setattr(plugins, "get_manager", lambda: manager)
    return toy
