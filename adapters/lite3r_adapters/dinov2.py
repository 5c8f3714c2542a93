"""DINOv2 as Meta publishes it, alone or as the backbone of another model: Depth Anything V2, MoGe, UniDepth and others carry its code."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from lite3r_plugin.adapter import AttentionSite, ExactRewrite, hookimpl
from lite3r_plugin.runtime.patches import patch_products

from . import _blocks
from ._dinov2 import encoder_sites, patch_embedding


@hookimpl(trylast=True)
def lite3r_attention_sites(model: nn.Module) -> list[AttentionSite] | None:
    """Sites of every DINOv2 inside `model`, each image by itself. Adapters of models that use one as their encoder are asked before."""
    sites: list[AttentionSite] = []
    for prefix, module in model.named_modules():
        if _is_dinov2(module):
            sites += (dataclasses.replace(site, scope="frame") for site in encoder_sites(f"{prefix}." if prefix else "", module))
    return sites or None


@hookimpl(trylast=True)
def lite3r_exact_rewrites(model: nn.Module) -> list[ExactRewrite] | None:
    """Of a DINOv2 by itself, which runs in BF16 as it is; of a larger model nobody knows whether the rest does."""
    return patch_products(*patch_embedding("", model)) if _is_dinov2(model) else None


def _is_dinov2(module: Any) -> bool:
    """By structure, so that vendored copies are known too. Its blocks may be in chunks."""
    return (
        isinstance(getattr(module, "num_register_tokens", None), int)
        and isinstance(getattr(module, "cls_token", None), nn.Parameter)
        and isinstance(getattr(module, "patch_embed", None), nn.Module)
        and hasattr(module, "patch_size")
        and hasattr(module, "interpolate_pos_encoding")
        and isinstance(getattr(module, "blocks", None), (nn.ModuleList, nn.Sequential))
        and any(_blocks.is_attention(inside) for inside in module.blocks.modules())
    )
