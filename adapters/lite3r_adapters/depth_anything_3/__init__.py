"""Depth Anything 3: the DINOv2 backbone whose odd blocks, from `alt_start` on, attend across views."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lite3r_plugin.adapter import AttentionSite, hookimpl

from . import exact, outputs, sites

if TYPE_CHECKING:
    from lite3r_plugin.adapter import ExactRewrite, ModelEntry, OutputsFunction


@hookimpl
def lite3r_attention_sites(model: nn.Module) -> list[AttentionSite] | None:
    """Sites of every Depth Anything 3 backbone inside `model`; the nested model has two."""
    return sites.attention_sites(model)


@hookimpl
def lite3r_exact_rewrites(model: nn.Module) -> list[ExactRewrite] | None:
    """Exact rewrites of every Depth Anything 3 network inside `model`."""
    return exact.rewrites(model)


@hookimpl
def lite3r_outputs(model: nn.Module) -> OutputsFunction | None:
    """Outputs of a Depth Anything 3 network."""
    return outputs.outputs_of(model)


@hookimpl
def lite3r_models() -> dict[str, ModelEntry]:
    """``da3-small`` to ``da3nested-giant-large``."""
    from .model import ENTRIES  # needs Pillow, which applying does not

    return ENTRIES
