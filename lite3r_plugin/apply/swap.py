"""What changes a model, as planned: modules go in, modules come out, Linears change their precision. Nothing here refuses.

After an error or an interruption, Ctrl-C and a lack of memory included, a model is as it was before, but for Linears that were put
into FP8 one by one: what they were is gone. `remove_lite3r` takes out whatever was left half in, `convert` goes on.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from ..attention.module import SparseLinearAttention
from ..attention.state import ModelState
from ..config import Lite3RConfig, WholeModel
from ..errors import plural
from ..fp8.backends import BACKENDS, te
from ..fp8.convert import convert_linears, fuse_blocks
from ..fp8.qat import FakeQuantLinear
from ..runtime.fast import FastForward
from ..runtime.half import HalfWeights
from ..runtime.memory import MemoryPlanner
from ..runtime.rewrites import take_out as take_out_rewrites
from ..tokens.tracker import LayoutTracker
from ..wrapper import Changes, HostWrapper, RewrittenModule, configs_of_tuners, put_module, replace_modules
from .lookup import Inventory
from .plan import ApplyPlan, ConversionPlan, left_linears


def put_in(plan: ApplyPlan, changes: Changes) -> ModelState:
    """Put the attention modules in, and the Linears that round to FP8 in training. Returns what the modules share.

    Everything is made before anything is put in.
    """
    state = ModelState(
        plan.adapter, plan.config, phase="full" if plan.training is None else "fp8_qat", skipped=dict(plan.skipped),
        routed=dict(plan.routed), sites=plan.sites, blocks=plan.blocks, hosts=tuple(swap.host for swap in plan.swaps),
        trackers={source: LayoutTracker(source, around) for source, (_, around) in plan.watched.items()},
        rewrites=tuple(plan.rewrites.made.values()), rewritten=plan.rewrites.done, not_rewritten=plan.rewrites.left,
        model=plan.found.model,
    )  # fmt: skip
    made = {swap.host: SparseLinearAttention(swap.host, swap.site, state, swap.sparse, swap.left) for swap in plan.swaps}
    rounding: dict[nn.Module, nn.Module] = {linear: FakeQuantLinear(linear) for linear in plan.training or ()}
    if plan.training is not None:
        state.notes["left"] = _left(left_linears(plan.linears, plan.config))
        if plan.config.fp8_backend == "te":
            _train_in_te(made.values(), state)
    replace_modules(changes, plan.found.modules, made)  # first: as long as anything is left in, there is one to be found
    replace_modules(changes, plan.found.modules, rounding)
    plan.rewrites.put_in(changes, plan.found.modules)
    for source, tracker in state.trackers.items():
        changes.make(functools.partial(tracker.attach, plan.watched[source][0], plan.found.model), tracker.detach)
    return state


def run_fast(plan: ApplyPlan, state: ModelState, changes: Changes) -> None:
    """Let the whole model run as its configuration says: after everything else, since what is here counts the modules that are there."""
    parts = plan.fast.parts
    sites = dict.fromkeys(module for module in plan.found.attention.values() if module.state is state)
    if plan.fast.left:
        state.notes["fast"] = [f"asked for, and left out: {what}, because {why}" for what, why in plan.fast.left.items()]
    if parts != WholeModel():
        half = None if parts.weights == "host" else HalfWeights(plan.fast.module, plan.config.keep_originals)
        fast = FastForward(plan.fast.module, state, sites, parts, half)
        changes.put(vars(state), "fast", fast)
        changes.put(vars(state), "rewrites", (*state.rewrites, fast))
        fast.put_in(changes)
    if plan.config.plans_memory:
        limit = plan.config.max_memory
        planner = MemoryPlanner(plan.fast.module, state, sites, limit if isinstance(limit, int) else None)
        changes.put(vars(state), "planner", planner)
        changes.put(vars(state), "rewrites", (*state.rewrites, planner))
        planner.put_in(changes)


def set_ratios(found: Inventory, state: ModelState, config: Lite3RConfig, changes: Changes) -> None:
    """Let the sites have the keep ratios of `config`, which takes the place of the one that the model has, and forget what was recorded,
    compiled and planned with others."""
    changes.put(vars(state), "config", config)
    ratios = config.keep_ratio
    for adapter in configs_of_tuners(found.modules.values()):
        changes.put(vars(adapter), "keep_ratio", [list(item) for item in ratios.items()] if isinstance(ratios, Mapping) else ratios)
    for module in dict.fromkeys(found.attention.values()):
        module.settle(changes)
    if (fast := fast_of(state)) is not None:
        if fast.blocks is not None:
            changes.put(vars(fast), "blocks", fast.blocks.anew())
        changes.make(fast.forget, fast.forget)
    if (planner := planner_of(state)) is not None:
        changes.put(vars(planner), "plans", {})


@contextlib.contextmanager
def as_it_came(state: ModelState) -> Iterator[None]:
    """Let the model have the weights that it came with inside the context, where they are kept, and nothing that was recorded of it."""
    fast = fast_of(state)
    if fast is not None:
        fast.forget()
    if fast is None or fast.half is None or not fast.half.kept:
        yield
        return
    with Changes() as changes:
        fast.half.put_back(changes)
        changes.put(vars(fast), "half", None)
    try:
        yield
    finally:
        with Changes() as changes:
            half = HalfWeights(fast.module, keep=True)
            half.put_in(changes)
            changes.put(vars(fast), "half", half)


def fast_of(state: ModelState) -> FastForward | None:
    """What lies over the forward of the model."""
    return state.fast if isinstance(state.fast, FastForward) else None


def planner_of(state: ModelState) -> MemoryPlanner | None:
    """What plans the memory of the model's forwards."""
    return state.planner if isinstance(state.planner, MemoryPlanner) else None


def take_out(found: Inventory) -> None:
    """Put everything back that `put_in` took the place of, or as much of it as is there."""
    wrappers = [module for module in found.modules.values() if isinstance(module, HostWrapper) and not isinstance(module, RewrittenModule)]
    with Changes() as changes:
        take_out_lora(changes, found)
        for tracker in [tracker for state in found.states for tracker in state.trackers.values()]:
            if tracker.module is not None and tracker.model is not None:
                changes.make(tracker.detach, functools.partial(tracker.attach, tracker.module, tracker.model))
        take_out_rewrites(changes, found.modules, [item for state in found.states for item in state.rewrites])
        for state in found.states:
            changes.put(vars(state), "fast", None)
        replace_modules(changes, found.modules, {m: m.release() for m in wrappers if not isinstance(m, SparseLinearAttention)})
        replace_modules(changes, found.modules, {module: module.release() for module in found.attention.values()})


def take_out_lora(changes: Changes, found: Inventory) -> None:
    """Put the Linears back that `add_lora` of `lite3r_plugin.peft` put LoRA around."""
    layers: dict[nn.Module, Any] = {layer: layer.base_layer for state in found.states for layer in state.lora}
    for name, layer in list(found.modules.items()):
        if layer in layers:
            put_module(changes, found.modules, name, layers[layer])
            for inside in [other for other in found.modules if other.startswith(f"{name}.")]:
                del found.modules[inside]
            found.modules[name] = layers[layer]
    for state in found.states:
        changes.put(vars(state), "lora", ())


def to_fp8(found: Inventory, state: ModelState, plan: ConversionPlan) -> None:
    """Store the Linears in FP8 and let the blocks around them run fused.

    Until it is done, `state` says what the model was before. The Linears say how far it came.
    """
    convert_linears(found.modules, plan.linears)
    with Changes() as changes:
        for item in plan.again:
            if item.backend is not None:
                changes.put(vars(item.linear), "_runner", BACKENDS[item.backend]())
        if state.phase == "fp8_qat":
            for module in dict.fromkeys(found.attention.values()):
                module.round_projection(changes)
        changes.put(vars(state), "config", plan.config)
        run_in_fp8(found, state, plan.left, changes)


def run_in_fp8(found: Inventory, state: ModelState, left: dict[str, int], changes: Changes) -> None:
    """Fuse the blocks of a model whose Linears are in FP8, but for those that were left, counted by reason."""
    changes.put(vars(state), "phase", "fp8")
    changes.put(state.notes, "left", _left(left))
    takes_fp8 = {module.site.fqn for module in found.attention.values() if module.takes_fp8}
    differing = fuse_blocks(changes, found.modules, state.sites, state.blocks, takes_fp8)
    reasons = Counter(differing.values())
    own = [f"{plural(count, 'block runs its', 'blocks run their')} own forward on FP8 Linears: {why}" for why, count in reasons.items()]
    changes.put(state.notes, "blocks", own)


def _left(left: dict[str, int]) -> list[str]:
    """What `describe` says of Linears that were left as they are, counted by reason."""
    return [f"{plural(count, 'Linear left as it is', 'Linears left as they are')}: {reason}" for reason, count in left.items()]


def _train_in_te(modules: Iterable[SparseLinearAttention], state: ModelState) -> None:
    """Let TransformerEngine run the projections in training, or note why it cannot."""
    branches = [module for module in modules if "proj_lin" in module._modules]
    reasons = {te.why_not_projection(module.proj_lin.weight, state.config.linear_branch) for module in branches}
    if reasons == {None}:
        for module in branches:
            module.te_projection = te.TeProjection()
    elif reason := next((r for r in reasons if r is not None), None):
        state.notes["te"] = [f"the linear branches train in emulated FP8, not in TransformerEngine: {reason}"]
