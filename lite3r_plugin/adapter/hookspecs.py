"""The hooks of the package. A plugin is a module with one or more of them, marked with `hookimpl`; a model adapter has the first.

Register it under the entry-point group ``lite3r.adapters``; see `adapters/README.md`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import typer
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


@hookspec
def lite3r_commands(app: typer.Typer) -> None:
    """Add commands to the command line: ``@app.command()`` before a function makes ``lite3r NAME``.

    Every plugin is given an `app` of its own and cannot change other commands; the names of built-in commands are taken. A plugin
    that raises is named in a warning and skipped. Import what is heavy inside of the commands, lest help wait for it.
    """
