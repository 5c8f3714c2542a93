"""The plugin manager: finds model adapters by entry point, asks them for the sites of a model and for the models that they build."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import pluggy
from torch import nn

from ..config import WRAPPER_NAMES
from ..errors import AdapterError, InputError, Lite3RError, UnknownModelError, short
from . import hookspecs
from .rewrites import ExactRewrite
from .sites import AttentionSite

if TYPE_CHECKING:
    from .models import ModelEntry
    from .outputs import OutputsFunction

DISTRIBUTION = "lite3r-plugin"
Item = TypeVar("Item")


class AdapterWarning(UserWarning):
    """A model adapter could not be loaded, failed, answered with nonsense, or claims what another one has; the others are unaffected."""


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
        except (Exception, SystemExit) as error:
            warn(f"the model adapter {_describe(entry_point.name, entry_point.dist)} was skipped: {error!r}")
    return manager


def implementations(hook: str) -> list[Any]:
    """All adapters' implementations of the hook of that name (pluggy's `HookImpl`), in the order in which they are asked."""
    return list(reversed(getattr(get_manager().hook, hook).get_hookimpls()))


def call(implementation: Any, **arguments: Any) -> Any:
    """What an implementation returns; as pluggy has it, it may take fewer arguments than its hook."""
    return implementation.function(*(arguments[name] for name in implementation.argnames))


@contextlib.contextmanager
def skipping(implementation: Any, refusals: bool = False) -> Iterator[None]:
    """Ends the block where an adapter raises or exits in it, and names the adapter in an `AdapterWarning`.

    Args:
        implementation: Of a hook, which is called in the block, and whose answer is checked there.
        refusals: Whether errors of the package pass: the hook may refuse with them.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if refusals and isinstance(error, Lite3RError):
            raise
        name, hook = describe_adapter(implementation.plugin_name), implementation.function.__name__
        warn(f"the model adapter {name} failed, and its {hook} was skipped: {short(error)}")


def warn(text: str) -> None:
    """Warn of an adapter; always from here, so that Python shows the same text once."""
    warnings.warn(text, AdapterWarning, stacklevel=1)


def describe_adapter(name: str) -> str:
    """An adapter for messages: its name, its distribution and the version of that."""
    entry_points = importlib.metadata.entry_points(group=hookspecs.ENTRY_POINT_GROUP)
    return _describe(name, next((e.dist for e in entry_points if e.name == name), None))


def find_sites(model: nn.Module) -> tuple[str, Sequence[AttentionSite]]:
    """Name of the adapter that knows `model`, and the model's attention sites.

    An adapter that fails, or that answers with anything but sites, is named in an `AdapterWarning` and the next one is asked. So are
    two adapters that both know the model, unless the other one is a more general one (``trylast=True``), which may.

    Args:
        model: Any module.

    Returns:
        The name of the first adapter whose answer is not None, and that answer; it may be empty.

    Raises:
        UnknownModelError: no adapter knows the model; the message lists the adapters that were asked.
        AdapterError: an adapter raised it. Other errors of the package that an adapter raises pass too.
    """
    asked: list[str] = []
    winner: tuple[Any, tuple[AttentionSite, ...]] | None = None
    for implementation in implementations("lite3r_attention_sites"):
        if winner is not None and _rank(implementation) != _rank(winner[0]):
            break
        asked.append(implementation.plugin_name)
        sites: tuple[AttentionSite, ...] | None = None
        try:
            with skipping(implementation, refusals=True):
                sites = _checked_list(call(implementation, model=model), AttentionSite)
        except Lite3RError as error:
            if winner is None:
                raise _named(error, implementation) from error
            sites = ()  # it knows the model, even though it refuses it
        if sites is None:
            continue
        if winner is None:
            winner = implementation, sites
        else:
            first, second = (describe_adapter(x.plugin_name) for x in (winner[0], implementation))
            warn(f"the model adapters {first} and {second} both know {type(model).__name__}: the first one wins; uninstall one of them")
    if winner is not None:
        return winner[0].plugin_name, winner[1]
    if not asked:
        raise UnknownModelError("no model adapters are installed: reinstall with `pip install lite3r-plugin` (or `pip install -e .`)")
    raise UnknownModelError(
        f"no model adapter knows {type(model).__module__}.{type(model).__qualname__} (asked: {', '.join(asked)}). "
        "Pass the torch.nn.Module that holds the transformer, or write an adapter: `lite3r adapters inspect` and inspect_model(model, "
        "inputs) of lite3r_plugin.testing write one to start from, and adapters/README.md shows one in ten lines."
    )


def find_outputs(model: nn.Module) -> OutputsFunction | None:
    """How what `model` returns maps to depth, points and poses (`ModelOutputs`); None where no adapter knows it.

    DDP, `torch.compile` and PEFT around a model return what it returns, and are looked through. An adapter that fails, or that answers
    with anything but a function, is named in an `AdapterWarning` and the next one is asked.
    """
    for candidate in _without_wrappers(model):
        for implementation in implementations("lite3r_outputs"):
            found: OutputsFunction | None = None
            with skipping(implementation, refusals=True):
                found = _checked_outputs(call(implementation, model=candidate))
            if found is not None:
                return found
    return None


def find_rewrites(model: nn.Module) -> tuple[ExactRewrite, ...] | None:
    """The exact rewrites of the first adapter that has some for `model`; None where none has.

    An adapter that fails, or that answers with anything but rewrites, is named in an `AdapterWarning` and the next one is asked.
    """
    return _first_list("lite3r_exact_rewrites", ExactRewrite, model)


def find_gathered(model: nn.Module) -> tuple[str, ...] | None:
    """Names of the modules in which views meet besides the attention sites, of the first adapter that names some; None where none does.

    An adapter that fails, or that answers with anything but names, is named in an `AdapterWarning` and the next one is asked.
    """
    return _first_list("lite3r_gathered_modules", str, model)


def model_entries() -> dict[str, ModelEntry]:
    """Models that the command line can build, by the name that users type.

    The answers of all adapters together. An adapter that fails, or that answers with anything else, is named in an `AdapterWarning` and
    skipped. So are two that give one name: a third party's entry wins over a built-in one.
    """
    entries: dict[str, ModelEntry] = {}
    owners: dict[str, str] = {}
    for adapter, found in reversed(_entries_by_adapter().items()):
        for name in found.keys() & entries.keys():
            first, second = describe_adapter(adapter), describe_adapter(owners[name])
            warn(f"the model adapters {first} and {second} both build a model called {name!r}: the first one wins; uninstall one of them")
        entries.update(found)
        owners.update(dict.fromkeys(found, adapter))
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
    distributions = {e.name: e.dist for e in importlib.metadata.entry_points(group=hookspecs.ENTRY_POINT_GROUP)}
    models = _entries_by_adapter()
    infos = []
    hooks = implementations("lite3r_attention_sites") + implementations("lite3r_models")
    for name, plugin in {i.plugin_name: i.plugin for i in hooks}.items():
        dist, doc = distributions.get(name), getattr(plugin, "__doc__", None)
        summary = next(iter(doc.strip().splitlines()), "") if isinstance(doc, str) else ""
        infos.append(AdapterInfo(name, dist.name if dist else "", dist.version if dist else "", summary, tuple(models.get(name, ()))))
    return infos


def _without_wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """`model`, and the one inside of each wrapper around it whose outputs are those of what it wraps."""
    yield model
    children = dict(model.named_children())
    if len(children) == 1 and WRAPPER_NAMES.issuperset(children):
        yield from _without_wrappers(*children.values())
        return
    base: Any = getattr(model, "get_base_model", None)  # of a PeftModel
    if callable(base) and isinstance(inside := base(), nn.Module):
        yield from _without_wrappers(inside)


def _entries_by_adapter() -> dict[str, dict[str, ModelEntry]]:
    """The models of each adapter that has some, in the order in which they are asked."""
    found: dict[str, dict[str, ModelEntry]] = {}
    for implementation in implementations("lite3r_models"):
        with skipping(implementation):
            found[implementation.plugin_name] = _checked_entries(call(implementation))
    return found


def _checked_entries(answer: Any) -> dict[str, ModelEntry]:
    from .models import ModelEntry

    if not isinstance(answer, Mapping):
        raise TypeError(f"it returned {type(answer).__name__}, not a dict of ModelEntry by name")
    for name, entry in answer.items():
        if not isinstance(name, str) or not isinstance(entry, ModelEntry):
            raise TypeError(f"it returned {type(entry).__name__} for {name!r}, not a ModelEntry for a name")
    return dict(answer)


def _first_list(hook: str, kind: type[Item], model: nn.Module) -> tuple[Item, ...] | None:
    """The first answer to `hook`, which is a list of `kind`; None where there is none."""
    for implementation in implementations(hook):
        found: tuple[Item, ...] | None = None
        with skipping(implementation):
            found = _checked_list(call(implementation, model=model), kind)
        if found is not None:
            return found
    return None


def _checked_list(answer: Any, kind: type[Item]) -> tuple[Item, ...] | None:
    if answer is None:
        return None
    if not isinstance(answer, Sequence):
        raise TypeError(f"it returned {type(answer).__name__}, not a list of {kind.__name__}")
    if wrong := next((type(item).__name__ for item in answer if not isinstance(item, kind)), None):
        raise TypeError(f"it returned a list with {wrong}, not of {kind.__name__}")
    return tuple(answer)


def _checked_outputs(answer: Any) -> OutputsFunction | None:
    if answer is not None and not callable(answer):
        raise TypeError(f"it returned {type(answer).__name__}, which is no function")
    return cast("OutputsFunction | None", answer)


def _named(error: Lite3RError, implementation: Any) -> Lite3RError:
    """`error` with the adapter's name, where descriptions of sites raise it, which know no adapter."""
    return (
        AdapterError(f"the model adapter {describe_adapter(implementation.plugin_name)}: {error}") if type(error) is AdapterError else error
    )


def _rank(implementation: Any) -> tuple[bool, bool]:
    """What an adapter's author said about when it is to be asked."""
    return implementation.tryfirst, implementation.trylast


def _register(manager: pluggy.PluginManager, entry_point: importlib.metadata.EntryPoint) -> None:
    if manager.has_plugin(entry_point.name):
        raise AdapterError(f"another adapter is registered as {entry_point.name!r} already; rename the entry point")
    plugin = entry_point.load()
    try:
        manager.register(plugin, name=entry_point.name)
        manager.check_pending()  # the only place where a misspelt hook name shows
        if not manager.get_hookcallers(plugin):
            raise AdapterError("it has none of the hooks; mark them with @hookimpl, and name the module that holds them as the entry point")
    except BaseException:
        if manager.has_plugin(entry_point.name):
            manager.unregister(name=entry_point.name)
        raise


def _is_third_party(entry_point: importlib.metadata.EntryPoint) -> bool:
    return entry_point.dist is None or entry_point.dist.name != DISTRIBUTION


def _describe(name: str, dist: Any) -> str:
    return f"{name!r} ({f'{dist.name} {dist.version}' if dist else 'of no distribution'})"
