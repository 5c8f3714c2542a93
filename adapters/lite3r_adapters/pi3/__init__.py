"""Pi3 and Pi3X: the decoder, whose odd blocks attend across views, the per-view heads and the image encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lite3r_plugin.adapter import AttentionSite, hookimpl

from . import exact, outputs, sites

if TYPE_CHECKING:
    from lite3r_plugin.adapter import ExactRewrite, ModelEntry, OutputsFunction


@hookimpl
def lite3r_attention_sites(model: nn.Module) -> list[AttentionSite] | None:
    """Sites of every Pi3 inside `model`."""
    return sites.attention_sites(model)


@hookimpl
def lite3r_exact_rewrites(model: nn.Module) -> list[ExactRewrite] | None:
    """Exact rewrites of every Pi3 inside `model`."""
    return exact.rewrites(model)


@hookimpl
def lite3r_outputs(model: nn.Module) -> OutputsFunction | None:
    """Outputs of a Pi3 or Pi3X."""
    return outputs.outputs_of(model)


@hookimpl
def lite3r_models() -> dict[str, ModelEntry]:
    """``pi3``."""
    from .model import ENTRIES  # needs Pillow, which applying does not

    return ENTRIES
