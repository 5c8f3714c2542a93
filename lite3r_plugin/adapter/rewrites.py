"""Descriptions of exact rewrites: which method of which module gets another, and how the two are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..wrapper import RewrittenMethod, RewrittenModule


@dataclass(frozen=True, repr=False)
class Trial:
    """Calls in which a rewrite and the host must agree: in FP32, on the CPU, small.

    Attributes:
        module: The module to be rewritten, or one like it that is small and has weights of its own: a copy, with simple modules in the
            place of large children. Its method is called, so it must be of the host's class. It may keep what it is called with, which
            the host's own must not.
        inputs: Arguments of one call each.
        named: Arguments by name, of as many calls; none of any where it is empty.
    """

    module: nn.Module
    inputs: Sequence[tuple[Any, ...]]
    named: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class ExactRewrite:
    """One method of one module that can be written so that it is faster and gives the same numbers up to rounding.

    Attributes:
        fqn: Fully qualified name of the module; ``""`` is the model itself, of which no `RewrittenModule` can take the place.
        sentence: What is done, as `describe` tells it.
        make: From the module to what takes its place or hides its `method`; it changes nothing, and may raise with the reason why this
            module cannot be rewritten.
        trial: From the module to the calls that are compared first. None: the rewrite calls the host's own method and changes what goes
            in or comes out, so that there is nothing to compare.
        method: The method that is rewritten. Any but ``"forward"`` needs a `RewrittenMethod`.
        keeps_dtype: Whether its results have the host's dtypes, whatever the model runs in. Others serve models in BF16.
        for_precision: Whether it costs time for the sake of precision: ``weights="bf16_everywhere"`` leaves it out.
        needs: Names of modules whose forward must be rewritten for this to have a point.
        kernels: Whether it lets kernels of Lite3R run inside of the host's method, which `Lite3RConfig.fuse` allows. It goes with another
            rewrite of the same method, which then runs around it.
    """

    fqn: str
    sentence: str
    make: Callable[[nn.Module], RewrittenModule | RewrittenMethod]
    trial: Callable[[nn.Module], Trial] | None
    method: str = "forward"
    keeps_dtype: bool = True
    for_precision: bool = False
    needs: tuple[str, ...] = ()
    kernels: bool = False

    def keeps_host(self, fuse: bool) -> bool:
        """Whether it serves a model in the host's dtypes, where kernels inside of the host's code are allowed by `fuse`."""
        return self.keeps_dtype and (fuse or not self.kernels)
