"""STream3R: VGGT over a stream of frames, whose global attention sees the frames before through a cache of finished keys and values.

Its forward takes mode "causal" for all frames at once, "window" (the first frame and the last few), and "full".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lite3r_plugin.adapter import AttentionSite, hookimpl

from . import _streaming
from .vggt.outputs import to_outputs

if TYPE_CHECKING:
    from lite3r_plugin.adapter import OutputsFunction

PAST = "kv_cache"


@hookimpl
def lite3r_attention_sites(model: nn.Module) -> list[AttentionSite] | None:
    """Sites of every STream3R aggregator inside `model`."""
    return _streaming.attention_sites(model, PAST)


@hookimpl
def lite3r_outputs(model: nn.Module) -> OutputsFunction | None:
    """Outputs of a STream3R, which are VGGT's."""
    known = any(prefix == "aggregator." for prefix, _ in _streaming.aggregators(model, PAST)) and hasattr(model, "set_freeze")
    return to_outputs if known else None
