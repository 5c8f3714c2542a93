"""`convert`: from a model with Lite3R to one whose transformer blocks hold their weights in FP8."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import TypeVar

import torch
from torch import nn

from ..attention.styles import projected as projections
from ..config import Fp8Backend, Lite3RConfig
from ..errors import BackendError, ConvertedError, NoSitesError
from ..fp8 import convert as fp8
from ..fp8.linear import Fp8Linear
from ..fp8.qat import FakeQuantLinear
from .lookup import block_linears, whole_model

Model = TypeVar("Model", bound=nn.Module)
LEFT = "Linears left as they are"
ADAPTED = "Linears in FP8 are inside adapters (PEFT)"


@torch.inference_mode(False)
def convert(model: Model, *, fp8_backend: Fp8Backend | None = None, tokens: int | None = None) -> Model:
    """Store the Linears of the transformer blocks of `model` in FP8 and run them so, in place. There is no way back.

    A model that was converted before gets its backends chosen again, for the device that it is on now, and Linears that were left
    because of `tokens` are looked at again.

    Args:
        model: A model with Lite3R.
        fp8_backend: What is to run the Linears; `Lite3RConfig.fp8_backend` by default.
        tokens: Rows of a typical input of a Linear (batch times views times tokens of a view). With ``"auto"``, Linears
            that would not be faster in FP8 at that size stay as they are. None: all are converted, for the memory.

    Returns:
        The same model.

    Raises:
        NotAppliedError: the model carries no Lite3R, or is a part of the one that it was applied to.
        NoSitesError: there is no Linear to convert.
        BackendError: the backend cannot run here, or nothing would be faster at `tokens`.
        ConvertedError: a weight, or that of a linear branch, is not finite, or is made by a parametrisation or by pruning.
    """
    modules, state = whole_model(model, "convert")
    config = state.config.replace(precision="fp8", fp8_backend=fp8_backend or state.config.fp8_backend)
    converted = state.config.precision == "fp8"
    for fqn, module in modules.items():
        if "proj_lin" in module._modules and not fp8.is_finite(module.proj_lin.weight):
            raise ConvertedError(f"{fqn}.proj_lin.weight has infinities or NaN: the model is broken; train it again or start from zeros")
    fused = {id(linear) for linear in block_linears(model, [site.block.fqn for site in state.sites if site.block is not None])}
    linears = [linear for linear in block_linears(model) if not isinstance(linear, Fp8Linear)]
    plans = fp8.plan(linears, config.fp8_backend, tokens, lambda linear: id(linear) in fused)
    if not plans and not converted:
        raise NoSitesError(f"no transformer block of this {type(model).__name__} has a torch.nn.Linear to convert")
    if not converted and all(plan.backend is None for plan in plans):
        raise BackendError(f"no Linear of this model is faster in FP8 at {tokens} tokens here; leave out tokens= to convert for memory")
    if converted:
        fp8.rebind(state.blocks.values(), config.fp8_backend)
        fp8.unfuse_blocks(model)
    fp8.convert_linears(model, plans)
    state.notes = [note for note in state.notes if LEFT not in note]
    others = [m for block in state.blocks.values() for m in block.modules() if isinstance(m, nn.Linear)]
    others = [f"of class {type(m).__name__}" for m in others if type(m) not in (nn.Linear, FakeQuantLinear)]
    reasons = [p.reason for p in plans if p.reason] + others
    state.notes += [f"{count} {LEFT}: {reason}" for reason, count in Counter(reasons).items()]
    if adapted := sum(isinstance(getattr(m, "base_layer", None), Fp8Linear) for m in model.modules()):
        note = f"{adapted} {ADAPTED}: they work, but merging them now would lose them; merge adapters before convert(model)"
        state.notes = [*(n for n in state.notes if ADAPTED not in n), note]
        warnings.warn(f"Lite3R: {note}", stacklevel=3)
    for module in modules.values() if state.config.precision == "fp8_qat" else ():
        module.round_projection()
    return finish_conversion(model, config)


def finish_conversion(model: Model, config: Lite3RConfig) -> Model:
    """Fuse the blocks of a `model` whose Linears are in FP8 and give it the configuration. Returns it."""
    modules, state = whole_model(model, "convert")
    state.config = config
    sites = {module.site.fqn: module for module in modules.values()}
    takes_fp8 = {fqn for fqn, module in sites.items() if projections.takes_fp8(module)}
    fp8.fuse_blocks(model, state.sites, state.blocks, takes_fp8)
    return model
