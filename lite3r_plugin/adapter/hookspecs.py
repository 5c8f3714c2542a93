"""The hooks of the package. A model adapter is a module with one or both of them, marked with `hookimpl`.

Register it under the entry-point group ``lite3r.adapters``; see `adapters/README.md`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from torch import nn

    from .models import ModelEntry
    from .sites import AttentionSite

PROJECT = "lite3r"
ENTRY_POINT_GROUP = "lite3r.adapters"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(firstresult=True)
def lite3r_attention_sites(model: nn.Module) -> Sequence[AttentionSite] | None:
    """The attention sites of `model`, or None when this adapter does not know it.

    Called once by `apply_lite3r`. The first adapter that answers wins; third-party adapters are asked before the
    built-in ones, and implementations with ``trylast=True`` (for generic families) after all others. Recognise a
    model by its classes or its structure, never by class names, and do not import its library: whoever passes a
    model has imported it already, so ``sys.modules`` tells.
    """


@hookspec
def lite3r_models() -> Mapping[str, ModelEntry]:
    """Models that the command line can build, by name. All adapters' answers are collected."""
    raise NotImplementedError


@hookspec(firstresult=True)
def lite3r_optimize(model: nn.Module) -> Sequence[str] | None:
    """Apply exact fixes to `model` in place, the same numbers up to rounding; None when this adapter does not know it.

    The answer says in words what was fixed. Afterwards the model must also run with BF16 weights without autocast, and
    its forward must not wait for the GPU. Only the given instance may change. `lite3r bench` builds its strong dense
    baseline with it.
    """
