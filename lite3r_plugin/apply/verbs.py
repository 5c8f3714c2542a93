"""The verbs: put Lite3R into a model, switch it off for a while, take it out again, convert the model to FP8.

Each looks the model up in one walk, plans and checks, and only then changes it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from ..adapter.sites import AttentionSite
from ..attention.module import SparseLinearAttention
from ..attention.state import ModelState
from ..config import Fp8Backend, Lite3RConfig
from ..errors import ConfigError, ConvertedError, WeightsError
from ..fp8.qat import FakeQuantLinear
from ..ops.dispatch import SlowPathWarning
from ..wrapper import Changes, hold, switch_off
from .lookup import Inventory, look_up
from .plan import check_branches, plan_application, plan_conversion
from .swap import as_it_came, fast_of, put_in, run_fast, take_out, to_fp8

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..config import Lite3RFields

NOT_KEPT = (
    "Lite3R: weights become BF16, and keep_originals=False frees what they were: remove_lite3r and lite3r_disabled will refuse, and "
    "save_lite3r(whole=True) too"
)

Model = TypeVar("Model", bound=nn.Module)


@torch.inference_mode(False)  # what is made here must serve outside of it
def apply_lite3r(
    model: Model, config: Lite3RConfig | None = None, *, sites: Sequence[AttentionSite] | None = None, **fields: Unpack[Lite3RFields]
) -> Model:
    """Make the attention of `model` sparse-linear, in place. Nothing outside this instance changes.

    Everything is checked before anything is changed: an error or an interruption leaves the model as it was; with
    ``precision="fp8"`` see `convert`, which comes second.

    Args:
        model: Any model that an installed adapter recognises, itself or as a part of it, or whose `sites` are given. Any
            floating-point dtype, any device.
        config: The configuration, `Lite3RConfig()` by default.
        sites: The attention sites of `model`, where no adapter is installed that names them, or in its place. `load_lite3r` then needs
            them, too.
        **fields: Fields of `Lite3RConfig` to set on top of `config`.

    Returns:
        The same model.

    Raises:
        ModelTypeError: `model` is no `torch.nn.Module`.
        UnknownModelError: no adapter knows the model.
        NoSitesError: the adapter names no site that this configuration changes, or there is no Linear for FP8.
        AlreadyAppliedError: the model, or a part of it, carries Lite3R already.
        WeightsError: FP8 is wanted, and a weight is not finite, is made by a parametrisation or by pruning, or is inside of an adapter;
            or a module around a site brings in its weights for a call (CPU offload), where a branch cannot follow.
        ConfigError, BackendError, AdapterError: a wrong field, a backend that cannot run, a wrong adapter.

    Examples:
        >>> model = apply_lite3r(model, keep_ratio=0.1)  # in place: it is the same model
        >>> predictions = model(images)  # as before
    """
    found = look_up(model)
    if config is not None and not isinstance(config, Lite3RConfig):
        raise ConfigError(f"config is a Lite3RConfig, got {config!r}; single fields are keywords: apply_lite3r(model, keep_ratio=0.1)")
    plan = plan_application(found, (config or Lite3RConfig()).replace(**fields), sites)
    if plan.fast.parts.weights != "host" and not plan.config.keep_originals:
        warnings.warn(NOT_KEPT, stacklevel=3)
    with Changes() as changes:
        state = put_in(plan, changes)
        if plan.conversion is None:
            run_fast(plan, state, changes)
    if plan.conversion is not None:
        to_fp8(found, state, plan.conversion)
        with Changes() as changes:
            run_fast(plan, state, changes)
    for note in (*state.notes.get("te", ()), *state.notes.get("fast", ())):
        warnings.warn(f"Lite3R: {note}", SlowPathWarning, stacklevel=3)
    return model


@torch.inference_mode(False)
def convert(model: Model, *, fp8_backend: Fp8Backend | None = None, tokens: int | None = None) -> Model:
    """Store the Linears of the transformer blocks of `model` in FP8 and run them so, in place. There is no way back.

    A model that was converted before gets its backends chosen again, for the device that it is on now, and Linears that were left
    because of `tokens` are looked at again. Which Linears are taken, `Lite3RConfig.fp8_filter` said when Lite3R was applied. Weights
    are stored as E4M3 with one FP32 scale for each output row.

    Each weight is freed before the next is stored, so an error or an interruption (memory may run out) leaves some Linears in FP8 and
    some not. Such a model runs, `describe` says how far it came, and another call goes on.

    Args:
        model: A model with Lite3R.
        fp8_backend: What is to run the Linears; `Lite3RConfig.fp8_backend` by default.
        tokens: Rows of a typical input of a Linear (batch times views times tokens of a view). With ``"auto"``, Linears
            that would not be faster in FP8 at that size stay as they are. None: all that are taken are converted, for the memory.

    Returns:
        The same model.

    Raises:
        ModelTypeError: `model` is no `torch.nn.Module`.
        NotAppliedError: the model carries no Lite3R, or is a part of the one that it was applied to.
        NoSitesError: there is no Linear to convert, or the filter takes none.
        BackendError: the backend cannot run here, or nothing would be faster at `tokens`.
        WeightsError: a weight, or that of a linear branch, is not finite, or is made by a parametrisation or by pruning; or an adapter,
            such as LoRA, is still around a Linear, or after training for FP8 around a linear branch.

    Examples:
        >>> model = apply_lite3r(model)
        >>> model = convert(model, fp8_backend="emulated")  # which runs anywhere; without it the fastest that can run here
    """
    found = look_up(model)
    state = found.require_one_state("convert")
    found.require_whole(state, "convert")
    found.require_enabled("convert")
    config = state.config.replace(fp8_backend=fp8_backend or state.config.fp8_backend)
    check_branches(found)
    plan = plan_conversion(found.linears(state), state.sites, config, tokens, again=found.converted, model=found.name)
    with as_it_came(state):
        to_fp8(found, state, plan)
    return model


def remove_lite3r(model: Model) -> Model:
    """Take Lite3R out again: the same modules, outputs and `state_dict` keys as before, bit for bit.

    LoRA that `lite3r_plugin.peft.add_lora` put in is taken out, too, with what it learned; what PEFT itself put around modules of the
    host stays. An error or an interruption leaves the model as it was. A model that was left half in and half out is taken out whole.

    Returns:
        The same model.

    Raises:
        ModelTypeError: `model` is no `torch.nn.Module`.
        NotAppliedError: the model carries no Lite3R, or is a part of the one that it was applied to.
        ConvertedError: weights are in FP8, be it not all of them.
        WeightsError: PEFT holds linear branches, which would be lost with it; or ``keep_originals=False`` freed weights.

    Examples:
        >>> model = apply_lite3r(model)
        >>> model = remove_lite3r(model)  # the model as it was
    """
    found = look_up(model)
    _require_original_weights(found, "remove_lite3r")
    found.require_rewrites_inside("remove_lite3r")
    for state in found.states:
        found.require_whole(state, "remove_lite3r", in_part=True)
    for fqn, module in found.attention.items():
        if "proj_lin" in module._modules and not isinstance(module.proj_lin, nn.Linear):
            raise WeightsError(
                f"{fqn}.proj_lin is held by an adapter ({type(module.proj_lin).__name__}), which would be left without it: call "
                "model = model.unload() of PEFT first, or merge_and_unload() to keep what LoRA learned in the weights"
            )
    take_out(found)
    return model


@contextlib.contextmanager
def lite3r_disabled(model: nn.Module) -> Iterator[None]:
    """Run the dense model inside the context: the teacher, with the same weights, bit for bit, no second copy.

    Raises:
        ModelTypeError: `model` is no `torch.nn.Module`.
        NotAppliedError: the model carries no Lite3R.
        ConvertedError: weights are in FP8, be it not all of them.
        WeightsError: ``keep_originals=False`` freed weights.

    Examples:
        >>> model = apply_lite3r(model)
        >>> with lite3r_disabled(model):
        ...     dense = model(images)
    """
    found = look_up(model)
    _require_original_weights(found, "lite3r_disabled")
    with run_dense(found.modules.values()):
        yield


@contextlib.contextmanager
def run_dense(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let those of `modules` that Lite3R has put in run what they took the place of, inside the context."""
    ours: dict[Any, None] = {m: None for m in modules if isinstance(m, (SparseLinearAttention, FakeQuantLinear))}
    states = {id(m.state): m.state for m in ours if isinstance(m, SparseLinearAttention)}
    ours |= {rewrite: None for state in states.values() for rewrite in state.rewrites}
    changes, holder = Changes(), object()
    try:
        try:
            for module in ours:
                switch_off(module, holder, changes)
            for state in states.values():
                _put_weights_back(state, holder, changes)
            yield
        finally:
            changes.undo()
    finally:
        changes.undo()  # an interruption may come before the first, too


def _put_weights_back(state: ModelState, holder: object, changes: Changes) -> None:
    """Let the host have the weights that it came with; undone unless Lite3R is taken out meanwhile."""
    fast = fast_of(state)
    if fast is None or (half := fast.half) is None:
        return

    def put_back(outer: Changes) -> None:
        inner = Changes()
        outer.make(lambda: half.put_back(inner), lambda: inner.undo() if state.fast is fast else None)

    hold(half, holder, put_back, changes)


def _require_original_weights(found: Inventory, verb: str) -> None:
    found.require_applied()
    if found.converted:
        raise ConvertedError(f"{verb} needs the weights that convert(model) replaced by FP8; build the model again for the dense one")
    for fast in filter(None, map(fast_of, found.states)):
        if fast.half is not None:
            fast.half.require_kept(verb)
