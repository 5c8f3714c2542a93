"""What a model carries: the attention modules that Lite3R has put into it, what they share, and the Linears around them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..attention.module import ModelState, SparseLinearAttention
from ..errors import NotAppliedError
from ..fp8.blocks import modules_in
from ..fp8.linear import Fp8Linear
from ..fp8.qat import FakeQuantLinear


def lite3r_modules(model: nn.Module) -> dict[str, SparseLinearAttention]:
    """The swapped-in modules of `model`, by fully qualified name; empty when it carries no Lite3R."""
    return {fqn: m for fqn, m in model.named_modules(remove_duplicate=False) if isinstance(m, SparseLinearAttention)}


def require_lite3r(model: nn.Module) -> dict[str, SparseLinearAttention]:
    """`lite3r_modules`; raises `NotAppliedError` when there are none."""
    if not isinstance(model, nn.Module):
        raise NotAppliedError(f"this takes a torch.nn.Module with Lite3R, got {type(model).__name__}")
    modules = lite3r_modules(model)
    if not modules:
        raise NotAppliedError(f"this {type(model).__name__} carries no Lite3R; call apply_lite3r(model) first")
    return modules


def one_state(model: nn.Module, what: str) -> tuple[dict[str, SparseLinearAttention], ModelState]:
    """`require_lite3r` and what its modules share; raises `NotAppliedError` if Lite3R was applied to several parts on their own."""
    modules = require_lite3r(model)
    states = {id(module.state): fqn for fqn, module in modules.items()}
    if len(states) > 1:
        raise NotAppliedError(
            f"Lite3R was applied to {len(states)} parts of this {type(model).__name__} on their own (around {', '.join(states.values())}): "
            f"call {what} on each of them"
        )
    return modules, next(iter(modules.values())).state


def whole_model(model: nn.Module, what: str) -> tuple[dict[str, SparseLinearAttention], ModelState]:
    """`one_state`; raises `NotAppliedError` as well if `model` holds but a part of what Lite3R was applied to."""
    modules, state = one_state(model, what)
    require_all(model, state, what)
    return modules, state


def require_all(model: nn.Module, state: ModelState, what: str) -> None:
    """Raise `NotAppliedError` unless `model` holds all modules of `state`."""
    held = len({id(module) for module in lite3r_modules(model).values() if module.state is state})
    if held != state.swapped:
        raise NotAppliedError(
            f"this {type(model).__name__} holds {held} of the {state.swapped} attention modules that Lite3R was applied to: call {what} on "
            "the whole model (and take modules out of it before apply_lite3r)"
        )


def block_linears(model: nn.Module, blocks: Iterable[str] | None = None) -> list[Any]:
    """The Linears of the transformer blocks of these names, by default of all, in full precision, in training or in FP8."""
    shared, state = one_state(model, "it")
    modules = shared.values()
    chosen = [state.blocks[name] for name in (state.blocks if blocks is None else blocks)]
    branches = [m.proj_lin for m in modules if "proj_lin" in m._modules]
    return [linear for kind in (nn.Linear, FakeQuantLinear, Fp8Linear) for linear in modules_in(chosen, kind, skip=branches)]
