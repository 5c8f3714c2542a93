"""The variants that are compared, and what one forward of them shows about itself."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..apply.lookup import lite3r_modules
from ..apply.verbs import apply_lite3r
from ..errors import NoSitesError
from ..fp8 import backends
from ..fp8.linear import Fp8Linear
from ..ops.dispatch import SlowPathWarning

PROJ_STD = 0.02
BRANCH = {False: "zero, as before calibration: no time", True: "filled with random numbers, as after calibration"}
"""What reports say of the linear branches, by whether `fill_projections` was called."""
FP8 = {"precision": "fp8"}
FAST: dict[str, Any] = {"preset": "fast"}
# Dense attention at all sites.
DENSE: dict[str, Any] = {"keep_ratio": 1.0, "linear_branch": "none"}


@dataclass(frozen=True)
class Variant:
    """One way to prepare the model: a call of `apply_lite3r`, as a user types it.

    Attributes:
        name: Its name.
        summary: What it is.
        own: Fields of `Lite3RConfig` that belong to it, whatever else is asked for; None: the model as it comes.
    """

    name: str
    summary: str
    own: Mapping[str, Any] | None

    @property
    def lite3r(self) -> bool:
        """Whether `apply_lite3r` is called."""
        return self.own is not None

    @property
    def strong(self) -> bool:
        """Whether it runs as the preset has it. Else its weights are FP32 under BF16 autocast, as the READMEs of the models say."""
        return self.own is not None and "preset" in self.own

    @property
    def fp8(self) -> bool:
        """Whether its Linears are in FP8."""
        return self.own is not None and self.own.get("precision") == "fp8"

    def fields(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of `Lite3RConfig` for it where `options` are asked for."""
        return {**options, **(self.own or {})}

    def line(self, options: Mapping[str, Any]) -> str | None:
        """What a user types to get it; None where that is nothing."""
        if not self.lite3r:
            return None
        return f"apply_lite3r({', '.join(['model', *(f'{name}={value!r}' for name, value in self.fields(options).items())])})"


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("stock", "FP32 weights, BF16 autocast, eager, as the model's README says", None),
        Variant(
            "strong", "dense, all of it in BF16, no kernel of ours: exact rewrites, best SDPA backend, compiled blocks, CUDA graph",
            DENSE | FAST | {"weights": "bf16_everywhere", "fuse": False},
        ),
        Variant(
            "strong-exact", "dense with every exact rewrite and fused kernel that Lite3R has, the camera head computes in FP32",
            DENSE | FAST,
        ),
        Variant("strong-fp8", "strong-exact with the Linears of the transformer blocks in FP8", DENSE | FAST | FP8),
        Variant("lite3r", "apply_lite3r on the stock model, nothing else", {}),
        Variant("lite3r-strong", "with the preset", FAST),
        Variant("lite3r-fp8", "with the preset, the Linears of the transformer blocks in FP8", FAST | FP8),
    )
}  # fmt: skip
"""The variants by name, in the order in which they run by default."""


def why_not(variant: Variant, options: Mapping[str, Any], device: torch.device) -> str | None:
    """The reason why `variant` has nothing to show on `device`, or None: FP8 without FP8 products must be asked for."""
    if not variant.fp8 or options.get("fp8_backend", "auto") != "auto":
        return None
    reason = backends.why_not("scaled_mm", device, 16, 16)
    return None if reason is None else f"no FP8 matrix products: {reason}; --config fp8_backend=emulated runs it for its memory and error"


def prepare(module: nn.Module, variant: Variant, options: Mapping[str, Any]) -> None:
    """Make `variant` of the stock model `module`, where `options`, fields of `Lite3RConfig`, are asked for.

    Raises:
        NoSitesError: a part of the preset is left out for this model, so what would be measured is not what is meant.
    """
    if not variant.lite3r:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowPathWarning)  # it becomes an error
        apply_lite3r(module, **variant.fields(options))
    if left := next(iter(lite3r_modules(module).values())).state.notes.get("fast"):
        raise NoSitesError(f"{'; '.join(left)}: leave the variant {variant.name!r} out for {type(module).__name__}")


def fill_projections(module: nn.Module) -> None:
    """Give every `proj_lin` small random weights, as calibration would: while it is zero the linear branch takes no time."""
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
