"""Changes of a thing for as long as somebody wants them: the first who does makes them, the last one takes them back."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

from .changes import Changes

_turn = threading.RLock()
_held: weakref.WeakKeyDictionary[Any, tuple[Changes, set[object]]] = weakref.WeakKeyDictionary()


def hold(thing: Any, holder: object, change: Callable[[Changes], object], changes: Changes) -> None:
    """Change `thing` by `change`, unless another holder has done so, until the last of them lets go: this one when `changes` are undone.

    So contexts of several threads may overlap, and contexts of one may end in any order.
    """
    changes.make(functools.partial(_hold, thing, holder, change), functools.partial(_let_go, thing, holder))


def switch_off(thing: Any, holder: object, changes: Changes, name: str = "enabled", off: bool = False) -> None:
    """`hold` `thing` with its attribute `name` being `off`."""
    hold(thing, holder, lambda inner: inner.put(vars(thing), name, off), changes)


def outside(thing: Any) -> dict[str, Any]:
    """The attributes of `thing` for a copy: nobody holds it, so that nobody will switch it on again."""
    return vars(thing) | ({"enabled": True} if thing in _held else {})


def _hold(thing: Any, holder: object, change: Callable[[Changes], object]) -> None:
    with _turn:
        if (held := _held.get(thing)) is not None:
            held[1].add(holder)
            return
        inner = Changes()
        _held[thing] = inner, {holder}
        change(inner)


def _let_go(thing: Any, holder: object) -> None:
    with _turn:
        inner, holders = _held.get(thing, (None, set()))
        if inner is None or holder not in holders:
            return
        if len(holders) == 1:
            inner.undo()
            _held.pop(thing, None)
        else:
            holders.discard(holder)
