"""The variants that are compared, and what one forward of them shows about itself."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..apply import apply_lite3r, lite3r_modules
from ..attention import SparseLinearAttention
from ..errors import NoSitesError
from ..layout import pinned_tokens
from ..ops.block_map import kept_blocks
from ..plugins import get_manager

PROJ_STD = 0.02


@dataclass(frozen=True)
class Variant:
    """One way to prepare the model.

    Attributes:
        name: Its name.
        summary: What it is.
        strong: BF16 weights, exact fixes, the fastest dense attention backend, compiled blocks, CUDA graphs. Otherwise
            FP32 weights under BF16 autocast, eager, as the READMEs of the models say.
        lite3r: With `apply_lite3r`.
    """

    name: str
    summary: str
    strong: bool
    lite3r: bool


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("stock", "FP32 weights, BF16 autocast, eager, as the model's README says", False, False),
        Variant("strong", "dense: BF16 weights and heads, exact fixes, best SDPA backend, compiled blocks, CUDA graph", True, False),
        Variant("lite3r", "apply_lite3r on the stock model, nothing else", False, True),
        Variant("lite3r-strong", "apply_lite3r on top of everything that strong has", True, True),
    )
}


def prepare(module: nn.Module, variant: Variant, options: dict[str, Any]) -> list[str]:
    """Turn a stock model into `variant`, in place. Returns the exact fixes that were applied.

    Raises:
        NoSitesError: no adapter has exact fixes for this model, so it has no strong variant.
    """
    fixes: list[str] = []
    if variant.strong:
        module.to(torch.bfloat16)
        found = get_manager().hook.lite3r_optimize(model=module)
        if found is None:
            raise NoSitesError(
                f"no adapter has exact fixes (the hook lite3r_optimize) for {type(module).__name__}; leave {variant.name!r} out"
            )
        fixes = list(found)
    if variant.lite3r:
        apply_lite3r(module, **options)
        fill_projections(module)
    return fixes


def fill_projections(module: nn.Module) -> None:
    """Give every `proj_lin` small random weights, so that nothing can skip the linear branch because it is zero."""
    torch.manual_seed(0)
    for site in lite3r_modules(module).values():
        if hasattr(site, "proj_lin"):
            nn.init.normal_(site.proj_lin.weight, std=PROJ_STD)


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The transformer blocks: items of a `ModuleList` that are all of one class and have parts of their own."""
    blocks: dict[int, nn.Module] = {}
    for found in module.modules():
        if isinstance(found, nn.ModuleList) and len(found) > 1 and len({type(item) for item in found}) == 1:
            blocks |= {id(item): item for item in found if sum(1 for _ in item.modules()) > 4 and not isinstance(item, nn.Sequential)}
    return list(blocks.values())


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
    sites = {fqn: site for fqn, site in lite3r_modules(module).items() if site.sparse}
    before = {fqn: dict(vars(site.calls)) for fqn, site in lite3r_modules(module).items()}
    lengths: dict[str, int] = {}

    def see_dtype(part: str) -> Any:
        return lambda module, args, output: dtypes[part].add(str(output.dtype).removeprefix("torch."))

    def see_length(fqn: str) -> Any:
        return lambda module, args, kwargs: lengths.__setitem__(fqn, next(iter((*args, *kwargs.values()))).shape[-2])

    for fqn, child in module.named_modules():
        if isinstance(child, (nn.Linear, nn.Conv2d)):
            handles.append(child.register_forward_hook(see_dtype(fqn.partition(".")[0])))
    for fqn, site in sites.items():
        handles.append(site.register_forward_pre_hook(see_length(fqn), with_kwargs=True))
    try:
        yield observed
    finally:
        for handle in handles:
            handle.remove()
    observed.compute_dtypes = {part: sorted(names) for part, names in dtypes.items()}
    after = {fqn: vars(site.calls) for fqn, site in lite3r_modules(module).items()}
    calls = {fqn: {what: n - before[fqn][what] for what, n in counts.items()} for fqn, counts in after.items()}
    for counts in calls.values():
        for what, n in counts.items():
            observed.sites[what] = observed.sites.get(what, 0) + n
    blocks = [_score_blocks(sites[fqn], n, calls[fqn]["sparse"] > 0) for fqn, n in lengths.items()]
    if blocks:
        observed.density = sum(computed for computed, _ in blocks) / sum(total for _, total in blocks)


def _score_blocks(site: SparseLinearAttention, tokens: int, ran_sparse: bool) -> tuple[int, int]:
    """Score blocks that a site computed for a sequence of `tokens` tokens, and how many there are."""
    config = site.state.config
    rows, columns = -(-tokens // config.block_q), -(-tokens // config.block_k)
    if not ran_sparse:
        return rows * columns, rows * columns
    pinned = 0
    if site.site.tokens is not None:
        layout = site.state.trackers[site.site.tokens.image_module].layout(site.site.fqn, tokens)
        pinned = pinned_tokens(layout, config.keep_special_tokens, config.keep_reference_view)
    pinned_rows = min(rows, -(-pinned // config.block_q))
    kept = kept_blocks(columns, site.keep_ratio, -(-pinned // config.block_k))
    return pinned_rows * columns + (rows - pinned_rows) * kept, rows * columns
