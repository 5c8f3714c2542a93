"""From a model with ordinary Linears, trained with fake quantisation or not, to one that holds FP8."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapter.sites import AttentionSite
from ..config import Fp8Backend
from ..costs.linear import fp8_pays
from ..errors import WeightsError
from ..wrapper import Changes, HostWrapper, host_of, is_plain_tensor, must_be_called, replace_modules, share_hooks, was_exchanged
from . import backends
from .block import Fp8Block, why_not_fused
from .blocks import BlockLinear
from .linear import Fp8Linear
from .trial import BlockTrials

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # of weights that FP8 can be made of


@dataclass(frozen=True)
class LinearPlan:
    """What becomes of one Linear: `backend` runs it, or it stays as it is, for `reason`."""

    linear: nn.Module
    backend: Fp8Backend | None
    reason: str = ""


def plan_linears(
    linears: Iterable[BlockLinear], requested: Fp8Backend, tokens: int | None, fused: Callable[[BlockLinear], bool]
) -> list[LinearPlan]:
    """A backend for each Linear; with `tokens`, ``"auto"`` leaves those that would not be faster in FP8.

    Args:
        linears: In full precision or in training.
        requested: The backend.
        tokens: Rows of a typical input, or None where memory is what counts.
        fused: Whether the operation before a Linear quantises its input.

    Raises:
        BackendError: the requested backend cannot run one of them.
        WeightsError: a weight has infinities or NaN, or is made by a parametrisation or by pruning.
    """
    plans = []
    for linear in linears:
        require_plain_weight(linear)
        module = linear.module
        assert isinstance(module, nn.Linear)
        device, inputs, outputs = module.weight.device, module.in_features, module.out_features
        if requested == "auto" and tokens is not None and not fp8_pays(device, tokens, inputs, outputs, fused(linear)):
            plans.append(LinearPlan(module, None, f"not faster in FP8 at {tokens} tokens"))
            continue
        if not is_finite(module.weight):
            raise WeightsError(
                f"{linear.names[0]}.weight, {outputs} x {inputs}, has infinities or NaN: the model is broken, and FP8 would hide it"
            )
        plans.append(LinearPlan(module, backends.choose(requested, device, inputs, outputs)))
    return plans


def choose_again(linears: Sequence[BlockLinear], requested: Fp8Backend) -> list[LinearPlan]:
    """A backend for each of these Linears that is in FP8 already, on the device where it is now.

    Raises:
        BackendError: the requested backend cannot run one of them.
    """
    in_fp8 = [linear.module for linear in linears if isinstance(linear.module, Fp8Linear)]
    return [LinearPlan(m, backends.choose(requested, m.weight_data.device, m.in_features, m.out_features)) for m in in_fp8]


def require_plain_weight(linear: BlockLinear) -> None:
    """Raise `WeightsError` unless the weight of `linear` is a parameter of its own, there as it is, that any operator may compute with."""
    weight = linear.module._parameters.get("weight")
    if isinstance(weight, Tensor) and not is_plain_tensor(weight):
        raise WeightsError(
            f"{linear.names[0]}.weight is a {type(weight).__name__}: FP8 takes plain weights, so use FP8 before the model is sharded, and "
            "instead of another quantisation"
        )
    if isinstance(weight, Tensor) and weight.is_meta and must_be_called(linear.module):
        raise WeightsError(
            f"{linear.names[0]}.weight is on the meta device and comes only for each call (CPU offload): use FP8 first, offload then"
        )
    if not isinstance(weight, nn.Parameter):
        raise WeightsError(
            f"{linear.names[0]}.weight is no parameter but made of others before each forward: "
            "make it permanent first (torch.nn.utils.prune.remove, remove_weight_norm or remove_spectral_norm)"
        )
    if weight.dtype not in DTYPES:
        raise WeightsError(
            f"{linear.names[0]}.weight is stored in {weight.dtype}, which another tool has made of it: FP8 rounds weights in full or half "
            "precision, so give the model without that, or leave the Linear out by fp8_filter"
        )


def is_finite(weight: Tensor) -> bool:
    """Whether it has neither infinities nor NaN; of one on the meta device, or of another class, nothing is known."""
    return weight.is_meta or not is_plain_tensor(weight) or bool(weight.detach().isfinite().all())


def convert_linears(modules: dict[str, nn.Module], plans: Iterable[LinearPlan]) -> None:
    """Replace the Linears one by one; each weight is freed before the next one is quantised.

    After an error or an interruption each is either as it was or in FP8. For `modules` see `wrapper.replace_modules`.
    """
    for plan in plans:
        if plan.backend is not None:
            host = plan.linear.release() if isinstance(plan.linear, HostWrapper) else plan.linear
            assert isinstance(host, nn.Linear)
            put_in_fp8(modules, plan.linear, functools.partial(Fp8Linear.quantized, host, plan.backend))


def put_in_fp8(modules: dict[str, nn.Module], linear: nn.Module, make: Callable[[], Fp8Linear]) -> None:
    """Put what `make` gives in the place of `linear`, with its hooks and its bias, and free its weight: there is no way back."""
    host = host_of(linear)
    with Changes() as changes:
        if (bias := host._parameters.get("bias")) is not None:  # which no longer learns
            changes.make(functools.partial(bias.requires_grad_, False), functools.partial(bias.requires_grad_, bias.requires_grad))
        made = make()
        share_hooks(made, host)
        replace_modules(changes, modules, {linear: made})
    host._parameters["weight"] = None  # free it, whoever still holds the module


def fuse_blocks(
    changes: Changes,
    modules: dict[str, nn.Module],
    sites: Iterable[AttentionSite],
    blocks: Mapping[str, nn.Module],
    takes_fp8: Container[str],
) -> dict[str, str]:
    """Put a new `Fp8Block` in the place of every block that a site describes and that has what it needs.

    Those that are there already are put out: a fused block is of the modules that it was made around.

    Args:
        changes: Takes note of what is done.
        modules: All modules of a model with FP8 Linears.
        sites: All its sites.
        blocks: Its blocks that FP8 is about, by name.
        takes_fp8: Names of the sites that take an input in FP8.

    Returns:
        The names of described blocks that run as they are, on FP8 Linears, because they do something else, with the reason.
    """
    replace_modules(changes, modules, {module: module.release() for module in modules.values() if isinstance(module, Fp8Block)})
    made: dict[nn.Module, nn.Module] = {}
    differing: dict[str, str] = {}
    trials = BlockTrials()
    for site in sites:
        if site.block is None or (host := blocks.get(site.block.fqn)) is None:
            continue
        if why_not_fused(host, site.block) is not None:
            continue
        if was_exchanged(host):
            differing[site.block.fqn] = "its forward was exchanged by somebody else"
            continue
        verdict = trials.of(site, host)
        if verdict.refused is None:
            made[host] = Fp8Block(host, site, site.fqn in takes_fp8, verdict.passed)
        else:
            differing[site.block.fqn] = verdict.refused
    replace_modules(changes, modules, made)
    return differing
