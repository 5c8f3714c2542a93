"""Which steps of Lite3R would pay, by the cost model, the adapter's rewrites and what a forward showed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..adapter.layouts import TokenLayout, Views
from ..adapter.sites import AttentionSite
from ..apply.lookup import Inventory
from ..config import Lite3RConfig
from ..costs.attention import TABLE
from ..costs.linear import fp8_saves
from ..costs.model import AttentionCosts, SparseShares
from ..errors import Lite3RError, short
from ..fp8 import backends
from ..fp8.blocks import find_blocks, find_linears
from ..runtime.half import why_not_half
from ..runtime.rewrites import plan_rewrites
from ..runtime.trace import Trace
from ..tokens.layout import pinned_tokens
from ..wrapper import RewrittenMethod
from .report import Step, Timing

SPARSE = "sparse attention"
FP8 = "FP8 Linears"


@dataclass(frozen=True)
class Facts:
    """What is known of a model before its steps are judged.

    Attributes:
        found: Its modules.
        sites: As its adapter says; empty where none knows it.
        config: What would be asked for.
        device: Where it is.
        trace: A forward.
        timing: Where its time goes.
        views: In it, or None.
        unread: Bytes at the peak that nothing reads.
    """

    found: Inventory
    sites: Sequence[AttentionSite]
    config: Lite3RConfig
    device: torch.device
    trace: Trace
    timing: Timing
    views: int | None
    unread: int


def judge(facts: Facts) -> list[Step]:
    """All steps, in the order in which one would take them. One that cannot be judged says why."""
    steps: list[tuple[str, str, Callable[[Facts], Step]]] = [
        ("exact rewrites", "apply_lite3r(model)", _rewrites),
        ("weights in BF16", 'apply_lite3r(model, preset="fast")', _half),
        ("CUDA graphs", 'apply_lite3r(model, preset="fast")', _graphs),
        (SPARSE, f"apply_lite3r(model, keep_ratio={facts.config.keep_ratio!r})", _sparse),
        (FP8, _fp8_line(facts.config), _fp8),
    ]
    judged = []
    for name, line, step in steps:
        try:
            judged.append(step(facts))
        except Lite3RError as error:
            judged.append(Step(name, line, False, None, None, short(error)))
    return judged


def _rewrites(facts: Facts) -> Step:
    name, line = "exact rewrites", "apply_lite3r(model)"
    plan = plan_rewrites(facts.found.model, facts.found.modules, lambda rewrite: rewrite.keeps_host(facts.config.fuse))
    if plan is None or not (plan.done or plan.left):
        return Step(name, line, False, None, None, "no adapter has any for this model")
    left = "".join(f"; not {what}, because {why}" for what, why in plan.left.items())
    if not plan.done:
        return Step(name, line, False, None, None, f"none agrees with the model's own code{left}")
    waits = sum(facts.timing.waits.values())
    why = f"{len(plan.done)} of them, the same numbers up to rounding ({'; '.join(plan.done)}){left}"
    if waits:
        why += f"; they are meant to end waits for the GPU, {waits} a forward now"
    keeps_less = any("layers" in words for words in plan.done)
    return Step(name, line, True, None, facts.unread if keeps_less and facts.unread else None, why)


def _half(facts: Facts) -> Step:
    name, line = "weights in BF16", 'apply_lite3r(model, preset="fast")'
    if (reason := why_not_half(facts.found.model)) is not None:
        return Step(name, line, False, None, None, reason)
    plan = plan_rewrites(facts.found.model, facts.found.modules, lambda rewrite: True)
    if plan is None:
        return Step(name, line, False, None, None, "no adapter says that this model runs in BF16 (the hook lite3r_exact_rewrites)")
    if refused := next((why for rewrite, why in plan.refused.items() if not rewrite.keeps_dtype), None):
        return Step(name, line, False, None, None, refused)
    in_fp32 = [facts.found.modules[rewrite.fqn] for rewrite in plan.made if rewrite.for_precision and rewrite.fqn in facts.found.modules]
    narrow = {id(getattr(made, "module", None)): made.narrow for made in plan.made.values() if isinstance(made, RewrittenMethod)}
    inside = {id(module): module for outer in in_fp32 for module in outer.modules()}
    kept = {id(p) for key, m in inside.items() for name, p in m._parameters.items() if p is not None and name not in narrow.get(key, ())}
    saved = sum(p.nbytes // 2 for p in facts.found.model.parameters() if p.dtype == torch.float32 and id(p) not in kept)
    if not saved:
        return Step(name, line, False, None, None, "no weight that may be in BF16 is in FP32")
    return Step(name, line, True, None, saved, "of the weights that are in FP32 and need not be; heads run in BF16 too")


def _graphs(facts: Facts) -> Step:
    name, line, timing = "CUDA graphs", 'apply_lite3r(model, preset="fast")', facts.timing
    if facts.device.type != "cuda":
        return Step(name, line, False, None, None, f"they are for CUDA devices, and the model is on {facts.device}")
    if timing.launch_bound is None or timing.host_ms is None or timing.gpu_ms is None:
        return Step(name, line, None, None, None, "the forward waits for the GPU, so how long Python takes by itself cannot be told")
    if not timing.launch_bound:
        return Step(name, line, False, None, None, f"Python is ahead of the GPU by {timing.gpu_ms - timing.host_ms:.1f} ms")
    saved = timing.host_ms - timing.gpu_ms
    return Step(
        name, line, True, saved, None, f"{timing.operators} operators and more are launched one by one; a graph leaves the GPU's time"
    )


def _sparse(facts: Facts) -> Step:
    config = facts.config
    line = f"apply_lite3r(model, keep_ratio={config.keep_ratio!r})"
    scopes = config.scopes
    if scopes == "auto":
        scopes = ("global",) if any(site.scope == "global" for site in facts.sites) else ("frame", "encoder")
    wanted = {site.fqn: site for site in facts.sites if site.scope in scopes and not config.excludes(site.fqn)}
    if not wanted:
        return Step(
            SPARSE, line, False, None, None, "no adapter names a site that would be sparse (`lite3r adapters inspect` helps to write one)"
        )
    if facts.device.type != "cuda":
        return Step(SPARSE, line, False, None, None, f"on {facts.device} it runs in torch operators, which are never taken to be faster")
    costs = TABLE.of(facts.device, may_measure=False)
    assert costs is not None
    saved = [saving for call in facts.trace.attention if (saving := _saved(facts, wanted, call.part, call.queries, costs)) is not None]
    if not saved:
        return Step(SPARSE, line, None, None, None, "no site was seen to call scaled_dot_product_attention, so its length is not known")
    paying = [ms for ms in saved if ms > 0]
    longest = max(call.queries[-2] for call in facts.trace.attention)
    if not paying:
        return Step(
            SPARSE, line, False, None, None, f"{longest} tokens are too few: dense attention is as fast, and sites run it by themselves"
        )
    return Step(
        SPARSE, line, True, sum(paying), None, f"at {len(paying)} of {len(saved)} calls; it changes outputs: calibrate, and measure"
    )


def _saved(facts: Facts, wanted: dict[str, AttentionSite], part: str, queries: tuple[int, ...], costs: AttentionCosts) -> float | None:
    """Milliseconds that a call would take less; None where it is of no site that would be sparse."""
    fqn = next((fqn for fqn in wanted if part == fqn or part.startswith(f"{fqn}.")), None)
    if fqn is None:
        return None
    tokens, width = queries[-2], 1
    for size in (*queries[:-2], queries[-1]):
        width *= size
    views = facts.views or 1 if wanted[fqn].scope == "global" else 1
    pinned = pinned_tokens(TokenLayout((Views((1, tokens // views), views),)), facts.config.pin)
    share = SparseShares.of(facts.config, fqn).of_scores(tokens, *pinned)
    return costs.milliseconds(width, tokens, None) - costs.milliseconds(width, tokens, share)


def _fp8_line(config: Lite3RConfig) -> str:
    chosen = "" if config.fp8_filter == Lite3RConfig.fp8_filter else f", fp8_filter={config.fp8_filter!r}"
    return f'apply_lite3r(model, preset="fast", precision="fp8"{chosen})'


def _fp8(facts: Facts) -> Step:
    line = _fp8_line(facts.config)
    if not facts.sites:
        return Step(FP8, line, False, None, None, "no adapter names the transformer blocks")
    if (reason := backends.why_not("scaled_mm", facts.device, 16, 16)) is not None:
        return Step(FP8, line, False, None, None, f"no FP8 matrix products: {reason}")
    blocks = find_blocks(facts.found.modules, [site for site in facts.sites if site.scope != "camera"])
    described = [site.block.fqn for site in facts.sites if site.block is not None]
    saved, size, count = 0.0, 0, 0
    for linear in find_linears(facts.found.modules, {name: [name] for name in blocks}, facts.sites):
        module, rows = linear.module, next((facts.trace.rows[name] for name in linear.names if name in facts.trace.rows), 0)
        if not isinstance(module, nn.Linear) or not linear.known or not rows or not linear.taken_by(facts.config):
            continue
        fused = any(name.startswith(f"{block}.") for name in linear.names for block in described)
        saved += fp8_saves(facts.device, rows, module.in_features, module.out_features, fused)
        size += module.weight.numel()
        count += 1
    why = f"{count} Linears at the rows that they had, beside BF16; it changes outputs by rounding"
    return Step(FP8, line, saved > 0, max(0.0, saved), size or None, why)
