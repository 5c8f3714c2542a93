"""Which style serves which class of projections. A new style is a class of `adapter.sites` and a line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ...adapter.sites import AttentionSite, FusedQKV, Routed, SeparateQKV
from ...errors import AdapterError
from .base import ProjectionStyle
from .fused import FusedStyle
from .routed import RoutedStyle
from .separate import SeparateStyle

STYLES: dict[type, Callable[[AttentionSite, nn.Module, Any], ProjectionStyle]] = {
    FusedQKV: FusedStyle,
    SeparateQKV: SeparateStyle,
    Routed: RoutedStyle,
}
"""Takes the site, its host and the site's projections, an instance of the key; returns a style for that site alone."""


def style_of(site: AttentionSite, host: nn.Module, fuse: bool = True) -> ProjectionStyle:
    """A new style object for `site`, whose module is `host`.

    Args:
        site: Its `projections` are of a class in `STYLES`, or derived from one.
        host: The module whose forward is to be replaced. A forward that was put into this instance is not: it runs.
        fuse: False lets the host's own forward make q, k and v, whatever the site says of it (`Lite3RConfig.fuse`).

    Raises:
        AdapterError: no style serves that class.
    """
    # A forward of the instance may bring in the weights of everything inside, as accelerate's for a module that is loaded whole.
    spec = site.projections if fuse and "forward" not in host.__dict__ else Routed()
    for kind in type(spec).__mro__:
        if kind in STYLES:
            return STYLES[kind](site, host, spec)
    raise AdapterError(f"site {site.fqn!r}: no projection style serves {type(spec).__name__}")


def check_projections(site: AttentionSite, host: nn.Module) -> None:
    """Raise `AdapterError` unless `host` has what the `projections` of `site` say: the children, in the right sizes."""
    style_of(site, host).check(host)
