"""What takes the place of a forward, or of another method, with the same result: put in, switched off for a while, taken out again."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn

from .changes import Changes
from .holding import outside
from .host import HostWrapper


class _Arguments:
    """What arguments `rewritten` takes: a fork's method may be called with others, which its own code is there for."""

    _placed: tuple[str, ...] = ()  # by position
    _needed: tuple[str, ...] = ()  # the first of them, which have no default
    _named: frozenset[str] = frozenset()  # by name
    _any_placed = _any_named = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        taken = list(inspect.signature(cls.rewritten).parameters.values())[1:]
        placed = [x for x in taken if x.kind in (x.POSITIONAL_ONLY, x.POSITIONAL_OR_KEYWORD)]
        cls._placed = tuple(x.name for x in placed)
        cls._needed = tuple(x.name for x in placed if x.default is x.empty)
        cls._named = frozenset(x.name for x in taken if x.kind in (x.POSITIONAL_OR_KEYWORD, x.KEYWORD_ONLY))
        cls._any_placed = any(x.kind is x.VAR_POSITIONAL for x in taken)
        cls._any_named = any(x.kind is x.VAR_KEYWORD for x in taken)

    def takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether `rewritten` can be called with these."""
        return (
            (self._any_placed or len(args) <= len(self._placed))
            and (self._any_named or all(name in self._named for name in kwargs))
            and all(name in kwargs for name in self._needed[len(args) :])
        )

    def rewritten(self, *args: Any, **kwargs: Any) -> Any:
        """What runs instead of the host's code; `run_host` is there for what it does not know, and runs where there are arguments that
        this does not take."""
        raise NotImplementedError


class RewrittenModule(_Arguments, HostWrapper):
    """Stands in for a module and runs `rewritten` instead of its forward.

    Args:
        host: The module to stand in for.

    Attributes:
        enabled: False runs the host's own forward.
    """

    def __init__(self, host: nn.Module) -> None:
        super().__init__(host)
        self.enabled = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the host's forward."""
        return self.rewritten(*args, **kwargs) if self.enabled and self.takes(args, kwargs) else self.run_host(*args, **kwargs)


class RewrittenMethod(_Arguments):
    """Hides a method of one module, on which it lies as an attribute, and runs `rewritten` instead of it.

    For methods that a module calls on itself, and for the forward of a model, which nothing can take the place of.

    Args:
        module: The module.
        name: The method of its class.

    Attributes:
        enabled: False runs the method of the class.
        stays_eager: Whether compiled blocks around the module break their graph for it.
        narrow: Names of parameters of the module that may be in BF16 where it computes in FP32: this, and its `run_host`, widen them.
    """

    stays_eager = False
    narrow: tuple[str, ...] = ()

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.enabled = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the method of the class."""
        return self.rewritten(*args, **kwargs) if self.enabled and self.takes(args, kwargs) else self.run_host(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(functools.partial(getattr(type(self.module), self.name), self.module))

    def run_host(self, *args: Any, **kwargs: Any) -> Any:
        """The method of the class."""
        return getattr(type(self.module), self.name)(self.module, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return outside(self)

    def put_in(self, changes: Changes) -> None:
        """Lie on the module."""
        changes.put(vars(self.module), self.name, self)

    def take_out(self, changes: Changes) -> None:
        """Let the method of the class be seen again. Where somebody has wrapped this since, it stays inside, switched off."""
        if vars(self.module).get(self.name) is self:
            changes.drop(vars(self.module), self.name)
        else:
            changes.put(vars(self), "enabled", False)


def was_exchanged(module: nn.Module) -> bool:
    """Whether somebody else has put a forward of its own into this instance, or into what it stands in for, which may do anything."""
    return _does_its_own(module, vars(module).get("forward")) or (isinstance(module, HostWrapper) and was_exchanged(module.host))


def _does_its_own(module: nn.Module, forward: Any) -> bool:
    if forward is None or isinstance(forward, RewrittenMethod):
        return False
    if getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is type(module).forward:
        return False  # as it is left where somebody has put it back
    if isinstance(forward, functools.partial) and getattr(forward.func, "__module__", None) == "accelerate.hooks":  # it moves tensors
        return _does_its_own(module, vars(module).get("_old_forward"))
    return True
