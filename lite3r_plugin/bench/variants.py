"""The variants that are compared, and what one forward of them shows about itself."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..apply.lookup import lite3r_modules
from ..apply.verbs import apply_lite3r
from ..errors import NoSitesError
from ..fp8 import backends
from ..fp8.linear import Fp8Linear
from ..runtime.rewrites import rewrite_exactly

PROJ_STD = 0.02
FP8 = {"precision": "fp8"}
# Dense attention at all sites; the exact fusion of norm and rotary embedding, which the site brings along, stays.
DENSE = {"keep_ratio": 1.0, "linear_branch": "none"}


@dataclass(frozen=True)
class Variant:
    """One way to prepare the model.

    Attributes:
        name: Its name.
        summary: What it is.
        strong: BF16 weights, exact rewrites, the fastest dense attention backend, compiled blocks, CUDA graphs. Otherwise
            FP32 weights under BF16 autocast, eager, as the READMEs of the models say.
        lite3r: With `apply_lite3r`.
        options: Fields of `Lite3RConfig` that belong to the variant, whatever else is asked for.
    """

    name: str
    summary: str
    strong: bool
    lite3r: bool
    options: Mapping[str, Any] = field(default_factory=dict)

    def fields(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of `Lite3RConfig` for it where `options` are asked for."""
        return {**options, **self.options}

    @property
    def fp8(self) -> bool:
        """Whether its Linears are in FP8."""
        return self.options.get("precision") == "fp8"


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("stock", "FP32 weights, BF16 autocast, eager, as the model's README says", False, False),
        Variant("strong", "dense: BF16 weights and heads, exact rewrites, best SDPA backend, compiled blocks, CUDA graph", True, False),
        Variant("strong-fp8", "strong with the Linears of the transformer blocks in FP8; attention dense", True, True, FP8 | DENSE),
        Variant("lite3r", "apply_lite3r on the stock model, nothing else", False, True),
        Variant("lite3r-strong", "apply_lite3r on top of everything that strong has", True, True),
        Variant("lite3r-fp8", "lite3r-strong with the Linears of the transformer blocks in FP8", True, True, FP8),
    )
}
"""The variants by name, in the order in which they run by default."""


def why_not(variant: Variant, options: Mapping[str, Any], device: torch.device) -> str | None:
    """The reason why `variant` has nothing to show on `device`, or None: FP8 without FP8 products must be asked for."""
    if not variant.fp8 or options.get("fp8_backend", "auto") != "auto":
        return None
    reason = backends.why_not("scaled_mm", device, 16, 16)
    return None if reason is None else f"no FP8 matrix products: {reason}; --config fp8_backend=emulated runs it for its memory and error"


def prepare(build: Callable[[], nn.Module], variant: Variant, options: Mapping[str, Any]) -> tuple[nn.Module, list[str]]:
    """A model prepared as `variant`, and the exact rewrites that were made in it, in words.

    Args:
        build: Makes the stock model.
        variant: The variant.
        options: Fields of `Lite3RConfig`.

    Raises:
        NoSitesError: no adapter has exact rewrites for this model, so it has no strong variant.
    """
    module, words = build(), []
    if variant.strong:
        rewrites = rewrite_exactly(module.to(torch.bfloat16))
        if rewrites is None:
            raise NoSitesError(
                f"no adapter has exact rewrites (the hook lite3r_exact_rewrites) for {type(module).__name__}; leave {variant.name!r} out"
            )
        words = [*rewrites.done, *(f"not {what}, because {why}" for what, why in rewrites.left.items())]
    if variant.lite3r:
        apply_lite3r(module, **variant.fields(options))
        fill_projections(module)
    return module, words


def fill_projections(module: nn.Module) -> None:
    """Give every `proj_lin` small random weights, so that nothing can skip the linear branch because it is zero."""
    torch.manual_seed(0)
    for site in lite3r_modules(module).values():
        if hasattr(site, "proj_lin"):
            nn.init.normal_(site.proj_lin.weight, std=PROJ_STD)


@dataclass
class Observed:
    """What one eager forward showed: dtypes by part of the model, calls of sites, share of score blocks computed."""

    compute_dtypes: dict[str, list[str]] = field(default_factory=dict)
    sites: dict[str, int] = field(default_factory=dict)
    density: float | None = None


@contextlib.contextmanager
def observe(module: nn.Module) -> Iterator[Observed]:
    """Watch the forward inside the context; the answer is complete after it."""
    observed, handles = Observed(), []
    dtypes: dict[str, set[str]] = defaultdict(set)
    before = {fqn: dataclasses.replace(site.calls) for fqn, site in lite3r_modules(module).items()}

    def see_dtype(part: str) -> Any:
        return lambda module, args, output: dtypes[part].add(str(output.dtype).removeprefix("torch."))

    for fqn, child in module.named_modules():
        if isinstance(child, (nn.Linear, nn.Conv2d, Fp8Linear)):
            handles.append(child.register_forward_hook(see_dtype(fqn.partition(".")[0])))
    try:
        yield observed
    finally:
        for handle in handles:
            handle.remove()
    observed.compute_dtypes = {part: sorted(names) for part, names in dtypes.items()}
    densities = []
    for fqn, site in lite3r_modules(module).items():
        for what in ("sparse", "dense", "disabled"):
            calls = getattr(site.calls, what) - getattr(before[fqn], what)
            observed.sites[what] = observed.sites.get(what, 0) + calls
            if calls and site.sparse:
                densities.append(site.calls.density if what == "sparse" else 1.0)
    if densities:
        observed.density = sum(densities) / len(densities)
