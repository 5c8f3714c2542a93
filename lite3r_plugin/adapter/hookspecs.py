"""The hooks of the package. A plugin is a module with one or more of them, marked with `hookimpl`; a model adapter has the first.

One family of models is one adapter, with one entry point in the group ``lite3r.adapters``; see `adapters/README.md`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import typer
    from torch import nn

    from .models import ModelEntry
    from .outputs import OutputsFunction
    from .rewrites import ExactRewrite
    from .sites import AttentionSite

PROJECT = "lite3r"
ENTRY_POINT_GROUP = "lite3r.adapters"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function as one of the hooks of this module; ``@hookimpl(trylast=True)`` for general families, to be asked last.

Examples:
    >>> @hookimpl
    ... def lite3r_attention_sites(model):
    ...     return None  # not my model: ask the next adapter
"""


@hookspec(firstresult=True)
def lite3r_attention_sites(model: nn.Module) -> Sequence[AttentionSite] | None:
    """The attention sites of `model`, or None when this adapter does not know it.

    Called once by `apply_lite3r`. The first adapter that answers wins; third-party adapters are asked before the
    built-in ones, and implementations with ``trylast=True`` (for generic families) after all others. Recognise a
    model by its classes or its structure, never by class names, and do not import its library: whoever passes a
    model has imported it already, so ``sys.modules`` tells.

    Args:
        model: Any module; the family's own may be it, or somewhere inside it, or not there at all.

    Returns:
        One site per attention module, under its name in `model`, which need not be in any order; None: ask the next adapter.

    Raises:
        Lite3RError: reaches the user. Of any other exception, and of an answer that is no sequence of sites, an `AdapterWarning`
            remains, and the next adapter is asked.
    """


@hookspec
def lite3r_models() -> Mapping[str, ModelEntry]:
    """Models that the command line can build, by the name that users type. All adapters' answers are collected.

    Where two adapters give one name, a third party's entry wins over a built-in one, and a warning says so. The models' libraries may be
    missing: import them in `ModelEntry.create`, not here.
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def lite3r_exact_rewrites(model: nn.Module) -> Sequence[ExactRewrite] | None:
    """Parts of `model` that can be written so that they are faster and give the same numbers up to rounding.

    Nothing is changed here: `apply_lite3r` compares each rewrite with the host's own forward, puts in those that agree and keep dtypes,
    and `remove_lite3r` takes them out again. With ``weights="bf16"`` it takes all: with them the model must also run with BF16 weights
    without autocast, or one of them say that it does not (`lite3r_plugin.runtime.exact.not_in_bf16`). And its forward should not wait
    for the GPU, so that a CUDA graph can hold it. Recognise what you rewrite by structure; `lite3r_plugin.runtime.exact` has what the
    built-in families share. The first adapter that answers wins.

    Args:
        model: The dense model, of any dtype and on any device, the meta device too; the family's own may be inside it.

    Returns:
        One description each, of which a later one of the same method takes the place of an earlier one where both may run; an
        empty list where none is needed; None when this adapter does not know the model. After an exception an `AdapterWarning` remains,
        and the next adapter is asked.
    """


@hookspec(firstresult=True)
def lite3r_outputs(model: nn.Module) -> OutputsFunction | None:
    """How what `model` returns maps to depth, points and poses; None when this adapter does not know it.

    Distillation and calibration compare the outputs of a model by what they mean. Of a model that no adapter maps, all floating-point
    tensors that it returns count alike. The first adapter that answers wins, in the order of `lite3r_attention_sites`.

    Args:
        model: The module that is called, without wrappers such as DDP: answer for the family's own class, whose outputs are known,
            and not for a network that has it inside.

    Returns:
        A function from what the forward of `model` returns, in training too, to `lite3r_plugin.adapter.ModelOutputs`, with gradients.
    """


@hookspec(firstresult=True)
def lite3r_gathered_modules(model: nn.Module) -> Sequence[str] | None:
    """Modules in which views meet besides the attention sites of `model`, as in a head that reads the reference view's token for each.

    Where one scene runs on several processes (`lite3r_plugin.parallel.parallelize_views`), each of which holds some of the views, these
    run on all views in every process. So they should be small: their tensors, ``[B, S, ...]``, travel whole. Sites inside of them
    need no more. The first adapter that answers wins, in the order of `lite3r_attention_sites`.

    Args:
        model: Any module; the family's own may be inside it.

    Returns:
        Their names in `model`; None where this adapter has nothing to say. After an exception an `AdapterWarning` remains, and the next
        adapter is asked.
    """


@hookspec
def lite3r_commands(app: typer.Typer) -> None:
    """Add commands to the command line: ``@app.command()`` before a function makes ``lite3r NAME``.

    Every plugin is given an `app` of its own and cannot change other commands; the names of built-in commands are taken. A plugin
    that raises is named in a warning and skipped whole. Import what is heavy inside of the commands, lest help wait for it.
    """
