"""StreamVGGT: VGGT over a stream of frames, whose global attention sees the frames before through a cache of their keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lite3r_plugin.adapter import AttentionSite, hookimpl

from .. import _streaming
from . import outputs

if TYPE_CHECKING:
    from lite3r_plugin.adapter import OutputsFunction

PAST = "past_key_values"


@hookimpl
def lite3r_attention_sites(model: nn.Module) -> list[AttentionSite] | None:
    """Sites of every StreamVGGT aggregator inside `model`."""
    return _streaming.attention_sites(model, PAST)


@hookimpl
def lite3r_outputs(model: nn.Module) -> OutputsFunction | None:
    """Outputs of a StreamVGGT."""
    known = any(prefix == "aggregator." for prefix, _ in _streaming.aggregators(model, PAST)) and hasattr(model, "inference")
    return outputs.to_outputs if known else None
