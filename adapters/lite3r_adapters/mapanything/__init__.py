"""MapAnything and other models around UniCeption's multi-view transformers, and the models that MapAnything's factory wraps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lite3r_plugin.adapter import AttentionSite, hookimpl

from . import outputs, sites

if TYPE_CHECKING:
    from lite3r_plugin.adapter import ModelEntry, OutputsFunction


@hookimpl
def lite3r_attention_sites(model: nn.Module) -> list[AttentionSite] | None:
    """Sites of every multi-view transformer of UniCeption inside `model`, and of the image encoder beside it."""
    return sites.attention_sites(model)


@hookimpl
def lite3r_outputs(model: nn.Module) -> OutputsFunction | None:
    """Outputs of a MapAnything, or of what its factory makes of another model."""
    return outputs.outputs_of(model)


@hookimpl
def lite3r_models() -> dict[str, ModelEntry]:
    """``mapanything``."""
    from .model import ENTRIES  # needs Pillow, which applying does not

    return ENTRIES
