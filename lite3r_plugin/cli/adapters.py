"""`lite3r adapters`: what is installed, and where a model attends that no adapter knows."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError, short

if TYPE_CHECKING:
    from torch import nn

    from ..adapter.models import ModelEntry

adapters = typer.Typer(help="List the installed model adapters, or inspect a model to write one.")


@adapters.callback(invoke_without_command=True)
def list_installed(context: typer.Context) -> None:
    """List the installed model adapters, and the models that the other commands can build; `inspect` helps to write one."""
    if context.invoked_subcommand is not None:
        return
    from ..adapter.plugins import list_adapters, model_entries
    from .show import listing

    adapters = ((info.name, info.summary, f"{info.distribution} {info.version}".strip()) for info in list_adapters())
    listing("Model adapters: what apply_lite3r recognises", adapters)
    listing("Models: what other commands take as --model", ((name, *_about(entry)) for name, entry in model_entries().items()))


def _about(entry: ModelEntry) -> tuple[str, ...]:
    """What is said of a model, line by line."""
    weights = entry.default_weights
    where = "none" if weights is None else "come with the package" if Path(weights).is_absolute() else weights
    return entry.summary, f"weights: {where}", *(() if entry.available else (f"library missing: {entry.install}",))


@adapters.command()
def inspect(
    factory: Annotated[str, typer.Argument(help="A function that makes the model, as MODEL.py:factory or package.module:factory.")],
    shape: Annotated[
        str | None,
        typer.Option("--shape", help="Of the random images, such as 1,2,3,224,224; by default what the model takes.", show_default=False),
    ] = None,
) -> None:
    """Run a model on random images and print where it attends, how, and an adapter to start from.

    The factory takes nothing and returns the model, or a pair of it and its inputs: a tuple, a dict of keywords, or a function that runs
    the model that it is given.
    """
    from ..testing import inspect_model

    size = None if shape is None else _shape(shape)
    model, inputs = made_by(factory)
    typer.echo(str(inspect_model(model, inputs, shape=size)))


def _shape(text: str) -> tuple[int, ...]:
    try:
        size = tuple(int(part) for part in text.split(","))
    except ValueError:
        size = ()
    if len(size) < 3 or min(size) < 1:
        raise InputError(f"--shape is integers such as 1,2,3,224,224, got {text[:100]!r}")
    return size


def made_by(factory: str) -> tuple[nn.Module, Any]:
    """The model that `factory` makes, and its inputs, or None."""
    from torch import nn

    where, _, name = factory.rpartition(":")
    if not where or not name.isidentifier():
        raise InputError(f"{factory[:200]!r} names no factory: write MODEL.py:factory, or package.module:factory")
    try:
        function = getattr(_module(where), name, None)
        if not callable(function):
            raise InputError(f"{where} has no function {name!r}")
        made = function()
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # of the user's file, which may be a script
        raise InputError(f"{factory} failed: {short(error)}") from error
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise InputError(f"{factory} returned {type(model).__name__}: let it return a torch.nn.Module, or a pair of that and its inputs")
    return model, inputs


def _module(where: str) -> Any:
    """The module of a file, which may import what lies beside it, or of that name."""
    path = Path(where)
    if path.suffix != ".py":
        return importlib.import_module(where)
    if not path.is_file():
        raise InputError(f"there is no file {where}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
