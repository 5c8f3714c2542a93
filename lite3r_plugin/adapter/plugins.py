"""The plugin manager: finds model adapters by entry point, asks them for the sites of a model and for the models that they build."""

from __future__ import annotations

import functools
import importlib.metadata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pluggy

from ..errors import AdapterError, InputError, Lite3RError, UnknownModelError
from . import hookspecs
from .sites import AttentionSite

if TYPE_CHECKING:
    from torch import nn

    from .models import ModelEntry

DISTRIBUTION = "lite3r-plugin"


class AdapterWarning(UserWarning):
    """A model adapter could not be loaded or failed; the others are unaffected."""


@dataclass(frozen=True)
class AdapterInfo:
    """An installed model adapter.

    Attributes:
        name: Of its entry point.
        distribution: The installed package that it comes from, or "" where it was registered by hand.
        version: Of that package, or "".
        summary: The first line of its docstring.
        models: Names of the models that it can build, as ``--model`` of the command line takes them.
    """

    name: str
    distribution: str
    version: str
    summary: str
    models: tuple[str, ...]


@functools.cache
def get_manager() -> pluggy.PluginManager:
    """The process's plugin manager, filled on first use. A broken adapter is skipped with an `AdapterWarning`.

    Call ``get_manager.cache_clear()`` after installing an adapter in a running process.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    # pluggy calls the plugin that was registered last first, so the built-in adapters go in first.
    for entry_point in sorted(importlib.metadata.entry_points(group=hookspecs.ENTRY_POINT_GROUP), key=_is_third_party):
        try:
            _register(manager, entry_point)
        except Exception as error:
            warnings.warn(f"the model adapter {_describe(entry_point)} was skipped: {error!r}", AdapterWarning, stacklevel=2)
    return manager


def find_sites(model: nn.Module) -> tuple[str, Sequence[AttentionSite]]:
    """Name of the adapter that knows `model`, and the model's attention sites.

    Args:
        model: Any module.

    Returns:
        The name of the first adapter whose answer is not None, and that answer; it may be empty.

    Raises:
        UnknownModelError: no adapter knows the model; the message lists the adapters that were asked.
        AdapterError: an adapter's answer is no sequence. Other errors of the package that an adapter raises pass too.
    """
    manager = get_manager()
    names = []
    for implementation in reversed(manager.hook.lite3r_attention_sites.get_hookimpls()):
        names.append(implementation.plugin_name)
        try:
            sites: Any = implementation.function(model)
        except Lite3RError:
            raise
        except Exception as error:
            warnings.warn(f"the model adapter {names[-1]!r} failed on {type(model).__name__}: {error!r}", AdapterWarning, stacklevel=2)
            continue
        if sites is not None:
            if not isinstance(sites, Sequence):
                raise AdapterError(f"the model adapter {names[-1]!r} returned {type(sites).__name__}, not a list of AttentionSite")
            return names[-1], tuple(sites)
    if not names:
        raise UnknownModelError("no model adapters are installed: reinstall with `pip install lite3r-plugin` (or `pip install -e .`)")
    raise UnknownModelError(
        f"no model adapter knows {type(model).__module__}.{type(model).__qualname__} (asked: {', '.join(names)}). "
        "Pass the torch.nn.Module that holds the transformer, or write an adapter: adapters/README.md shows one in ten lines."
    )


def model_entries() -> dict[str, ModelEntry]:
    """Models that the command line can build, by the name that users type.

    The answers of all adapters together; a third party's entry wins over a built-in one of that name.
    """
    entries: dict[str, ModelEntry] = {}
    for implementation in get_manager().hook.lite3r_models.get_hookimpls():
        found: Any = implementation.function()
        entries.update(found)
    return entries


def find_model(name: str) -> ModelEntry:
    """The model called `name` that an installed adapter can build. Raises `InputError`, which lists the known ones."""
    entries = model_entries()
    if name not in entries:
        raise InputError(
            f"no installed adapter can build {name!r}; choose one of {', '.join(sorted(entries)) or 'none'} (see `lite3r adapters`)"
        )
    return entries[name]


def list_adapters() -> list[AdapterInfo]:
    """The adapters that loaded, in the order in which they are asked for sites; then those that only build models."""
    hook = get_manager().hook
    distributions = {e.name: e.dist for e in importlib.metadata.entry_points(group=hookspecs.ENTRY_POINT_GROUP)}
    finders, builders = (list(reversed(h.get_hookimpls())) for h in (hook.lite3r_attention_sites, hook.lite3r_models))
    build: dict[str, Any] = {i.plugin_name: i.function for i in builders}
    infos = []
    for name, plugin in {i.plugin_name: i.plugin for i in (*finders, *builders)}.items():
        dist = distributions.get(name)
        summary = ((getattr(plugin, "__doc__", None) or "").strip().splitlines() or [""])[0]
        models = build[name]() if name in build else ()
        infos.append(AdapterInfo(name, dist.name if dist else "", dist.version if dist else "", summary, tuple(models)))
    return infos


def _register(manager: pluggy.PluginManager, entry_point: importlib.metadata.EntryPoint) -> None:
    if manager.has_plugin(entry_point.name):
        raise AdapterError(f"another adapter is registered as {entry_point.name!r} already; rename the entry point")
    plugin = entry_point.load()
    manager.register(plugin, name=entry_point.name)
    try:
        manager.check_pending()  # the only place where a misspelt hook name shows
    except pluggy.PluginValidationError:
        manager.unregister(plugin)
        raise


def _is_third_party(entry_point: importlib.metadata.EntryPoint) -> bool:
    return entry_point.dist is None or entry_point.dist.name != DISTRIBUTION


def _describe(entry_point: importlib.metadata.EntryPoint) -> str:
    dist = entry_point.dist
    return f"{entry_point.name!r} ({f'{dist.name} {dist.version}' if dist else 'unknown distribution'})"
