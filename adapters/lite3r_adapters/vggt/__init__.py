"""VGGT: frame and global attention of the aggregator, its image encoder, its camera head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lite3r_plugin.adapter import AttentionSite, hookimpl

from . import exact, outputs, sites

if TYPE_CHECKING:
    from lite3r_plugin.adapter import ExactRewrite, ModelEntry, OutputsFunction


@hookimpl
def lite3r_attention_sites(model: nn.Module) -> list[AttentionSite] | None:
    """Sites of every VGGT aggregator inside `model`."""
    return sites.attention_sites(model)


@hookimpl
def lite3r_exact_rewrites(model: nn.Module) -> list[ExactRewrite] | None:
    """Exact rewrites of every VGGT inside `model`."""
    return exact.rewrites(model)


@hookimpl
def lite3r_outputs(model: nn.Module) -> OutputsFunction | None:
    """Outputs of a VGGT."""
    return outputs.outputs_of(model)


@hookimpl
def lite3r_models() -> dict[str, ModelEntry]:
    """``vggt``."""
    from .model import ENTRIES  # needs Pillow, which applying does not

    return ENTRIES
