"""What changes a model, as planned: modules go in, modules come out, Linears change their precision. Nothing here refuses."""

from __future__ import annotations

import functools

from torch import nn

from ..attention.module import SparseLinearAttention
from ..attention.state import ModelState
from ..fp8.backends import te
from ..fp8.convert import convert_linears, fake_quantize_linears, fuse_blocks, unfuse_blocks
from ..fp8.linear import Fp8Linear
from ..fp8.qat import FakeQuantLinear
from ..tokens.tracker import GridTracker
from ..wrapper import replace_modules
from .lookup import Inventory
from .plan import ApplyPlan, ConversionPlan, left_linears


def put_in(plan: ApplyPlan) -> ModelState:
    """Put the attention modules in, and the Linears that round to FP8 in training. Returns what the modules share."""
    found = plan.found
    state = ModelState(
        plan.adapter, plan.config, phase="full" if plan.training is None else "fp8_qat", skipped=dict(plan.skipped), sites=plan.sites,
        blocks=plan.blocks, swapped=len(plan.swaps),
    )  # fmt: skip
    for name, (module, source) in plan.image_modules.items():
        state.trackers[name] = GridTracker(source)
        state.trackers[name].attach(module)
    made = {swap.host: SparseLinearAttention(swap.host, swap.site, state, swap.sparse) for swap in plan.swaps}
    replace_modules(found.modules, {host: functools.partial(_same, module) for host, module in made.items()})
    if plan.training is not None:
        fake_quantize_linears(found.modules, plan.training)
        note_left(state, left_linears(plan.linears, plan.config))
        if plan.config.fp8_backend == "te":
            _train_in_te(list(made.values()), state)
    if plan.conversion is not None:
        to_fp8(found, state, plan.conversion)
    return state


def take_out(found: Inventory) -> None:
    """Put everything back that `put_in` took the place of."""
    replace_modules(found.modules, {m: m.release for m in found.modules.values() if isinstance(m, FakeQuantLinear)})
    for state in found.states:
        for tracker in state.trackers.values():
            tracker.detach()
    replace_modules(found.modules, {module: module.release for module in found.attention.values()})


def to_fp8(found: Inventory, state: ModelState, plan: ConversionPlan) -> None:
    """Store the Linears in FP8 and let the blocks around them run fused."""
    for item in plan.again:
        if isinstance(item.linear, Fp8Linear) and item.backend is not None:
            item.linear.backend = item.backend
    unfuse_blocks(found.modules)  # a fused block is of the modules that it was made around
    convert_linears(found.modules, plan.linears)
    if state.phase == "fp8_qat":
        for module in found.attention.values():
            module.round_projection()
    state.config = plan.config
    run_in_fp8(found, state, plan.left)
    adapted = sum(isinstance(getattr(module, "base_layer", None), Fp8Linear) for module in set(found.modules.values()))
    note = f"{adapted} Linears in FP8 are inside adapters (PEFT): they work, but merging them now would lose them; merge adapters before "
    state.notes["adapted"] = [f"{note}convert(model)"] if adapted else []


def run_in_fp8(found: Inventory, state: ModelState, left: dict[str, int]) -> None:
    """Fuse the blocks of a model whose Linears are in FP8, but for those that were left, counted by reason."""
    state.phase = "fp8"
    note_left(state, left)
    takes_fp8 = {module.site.fqn for module in found.attention.values() if module.takes_fp8}
    fuse_blocks(found.modules, state.sites, state.blocks, takes_fp8)


def note_left(state: ModelState, left: dict[str, int]) -> None:
    """Let `describe` say how many Linears were left as they are, by reason."""
    state.notes["left"] = [f"{count} Linears left as they are: {reason}" for reason, count in left.items()]


def _train_in_te(modules: list[SparseLinearAttention], state: ModelState) -> None:
    """Let TransformerEngine run the projections in training, or note why it cannot."""
    branches = [module for module in modules if "proj_lin" in module._modules]
    reasons = {te.why_not_projection(module.proj_lin.weight, state.config.linear_branch) for module in branches}
    if reasons == {None}:
        for module in branches:
            module.te_projection = te.TeProjection()
    elif reason := next((r for r in reasons if r is not None), None):
        state.notes["te"] = [f"the linear branches train in emulated FP8, not in TransformerEngine: {reason}"]


def _same(module: nn.Module) -> nn.Module:
    return module
