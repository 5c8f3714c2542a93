"""VGGT over a stream of frames, in which StreamVGGT and STream3R are alike: global attention to the frames before, which are cached."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lite3r_plugin.adapter import AttentionSite

from . import _blocks
from ._cameras import camera_sites
from .vggt.sites import aggregator_sites, is_aggregator


def attention_sites(model: nn.Module, past: str) -> list[AttentionSite] | None:
    """Sites of every aggregator inside `model` whose attention takes a cache as its argument `past`, and of camera heads beside them."""
    sites = [site for prefix, aggregator in aggregators(model, past) for site in aggregator_sites(prefix, aggregator)]
    return sites + camera_sites(model) if sites else None


def aggregators(model: nn.Module, past: str) -> Iterator[tuple[str, Any]]:
    """Those aggregators, with their names, which end in a dot."""
    modules: dict[str, Any] = dict(model.named_modules())
    for name, module in modules.items():
        if is_aggregator(module):
            cache = _blocks.cache_of(module.global_blocks[0].attn)
            if cache is not None and cache.past == past:
                yield f"{name}." if name else "", module
