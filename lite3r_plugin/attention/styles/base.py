"""What a projection style is, and what it may use of the module that it works for."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from ...adapter.sites import AttentionSite, KeyValueCache
from ...errors import AdapterError
from ...wrapper import argument_defaults, argument_names
from ..inputs import AttentionInputs


class SiteModule(Protocol):
    """The attention module of a site, as its style sees it.

    Attributes:
        training: As of every module.
        heads_at_once: How many heads of attention are to be made at once, where memory is planned; None: all.
    """

    training: bool
    heads_at_once: int | None

    @property
    def sparse(self) -> bool:
        """Whether attention may be sparse; False at sites that stay dense and only have norm and rotary embedding fused."""
        ...

    def child(self, name: str) -> Any:
        """The host's child of that name as it is now: PEFT, quantisation and `.to` may have replaced it since the last call."""
        ...

    def attend(self, inputs: AttentionInputs, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Attention over the tokens of the site, ``[B, H, N, D]``, in a forward that was given `args` and `kwargs`."""
        ...

    def attend_by_heads(self, parts: Iterator[AttentionInputs], num_heads: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """`attend` of inputs that hold some of the heads each, made one after another."""
        ...

    @property
    def is_seen_whole(self) -> bool:
        """Whether somebody observes its attention, or takes the place of it: who does sees all heads at once."""
        ...

    def attend_to_past(
        self,
        inputs: AttentionInputs,
        past: tuple[Tensor, Tensor] | None,
        cache: KeyValueCache,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention over the tokens of the site and those that came before: ``[B, H, N, D]``, and k and v to be cached."""
        ...

    def run_host(self, *args: Any, **kwargs: Any) -> Any:
        """The host's own forward."""
        ...

    def note(self, reason: str) -> None:
        """Take note that this call of a site that may be sparse runs dense in the host's own code, and why."""
        ...

    def leave_to_host(self, reason: str) -> None:
        """Let the host's own forward run from now on, and say why."""
        ...


class ProjectionStyle(abc.ABC):
    """One way to get from the hidden states to q, k and v and from the output of attention to that of the host.

    Each site has an object of its own, which knows what does not change from call to call; what it has to remember it keeps
    itself. Children are looked up in every call. It is copied and pickled with its model, so it holds no module, tensor or function.

    Args:
        site: The description of the site; its `projections` are of the class that the style is registered for.
        host: The module whose forward is to be replaced. It is looked at, not kept.

    Attributes:
        site: The description.
        argument_names: The arguments of the host's forward, in order.
        argument_defaults: What they are where they are not given, as `wrapper.argument_defaults` says.
        replaces: Whether it runs more than attention itself, and not the host's own forward.
        fuses: Whether it runs the rotary embedding in one kernel with the norms, which sites that stay dense gain by, too.

    Raises:
        AdapterError: the arguments of the host's forward cannot be read.
    """

    replaces = False
    fuses = False

    def __init__(self, site: AttentionSite, host: nn.Module) -> None:
        self.site = site
        names = argument_names(host)
        if names is None:
            raise AdapterError(
                f"site {site.fqn!r}: the arguments of its forward cannot be read; something has put an object of class "
                f"{type(host.forward).__name__} in its place: take that out before apply_lite3r"
            )
        self.argument_names = names
        self.argument_defaults = argument_defaults(host)

    def check(self, host: nn.Module) -> None:
        """Raise `AdapterError` unless `host` is as the site says. By default nothing is checked."""
        return

    @abc.abstractmethod
    def run(self, module: SiteModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward of the site, called with what the host's forward would be.

        What the call asks for that has no sparse form runs in the host's own code, of which `SiteModule.note` takes note.
        """

    def takes_fp8(self, child: Callable[[str], Any]) -> bool:
        """Whether the site's input may be in FP8 already: nothing but FP8 Linears reads it. `child` as in `SiteModule`."""
        return False


def child_of(host: nn.Module, name: str, fqn: str) -> nn.Module:
    """The child, or descendant, `name` of the attention module `host` of the site `fqn`. Raises `AdapterError` where there is none."""
    child: Any = host
    for part in name.split("."):
        child = getattr(child, part, None)
    if not isinstance(child, nn.Module):
        raise AdapterError(f"site {fqn!r}: {type(host).__name__} has no child {name!r}; correct the adapter's projections")
    return child
