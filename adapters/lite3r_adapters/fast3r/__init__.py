"""Fast3R: one decoder in which all patches of all views attend to each other, behind an image encoder of each view."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lite3r_plugin.adapter import AttentionSite, hookimpl

from . import outputs, sites

if TYPE_CHECKING:
    from lite3r_plugin.adapter import ModelEntry, OutputsFunction


@hookimpl
def lite3r_attention_sites(model: nn.Module) -> list[AttentionSite] | None:
    """Sites of every Fast3R inside `model`."""
    return sites.attention_sites(model)


@hookimpl
def lite3r_outputs(model: nn.Module) -> OutputsFunction | None:
    """Outputs of a Fast3R."""
    return outputs.outputs_of(model)


@hookimpl
def lite3r_models() -> dict[str, ModelEntry]:
    """``fast3r``."""
    from .model import ENTRIES  # needs Pillow, which applying does not

    return ENTRIES
