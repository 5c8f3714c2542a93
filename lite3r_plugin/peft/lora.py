"""LoRA (arXiv 2106.09685) around the projections of attention sites: put in, switched off for a while, folded in."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, get_args

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..adapter.sites import AttentionSite, FusedQKV, SeparateQKV
from ..apply.lookup import Inventory, look_up
from ..apply.swap import take_out_lora
from ..config import Scope
from ..errors import AlreadyAppliedError, ConfigError, ConvertedError, NoSitesError, NotAppliedError, WeightsError, shown
from ..fp8.blocks import BlockLinear
from ..fp8.convert import is_finite, require_plain_weight
from ..fp8.qat import folded
from ..ops.options import check_choice, is_int, is_number
from ..wrapper import Changes, is_lora, is_plain_tensor, put_module, switch_off
from .qat_lora import made_around

Model = TypeVar("Model", bound=nn.Module)
ADAPTER = "default"


@torch.inference_mode(False)  # what is made here must serve outside of it
def add_lora(
    model: nn.Module,
    *,
    rank: int = 16,
    alpha: float | None = None,
    scopes: Sequence[Scope] = ("global", "frame"),
    changes: Changes | None = None,
) -> list[str]:
    """Put LoRA around the projections of the attention sites of these scopes: ``W + alpha / rank * B A``, zero at the start.

    Taken are the Linears that make q, k and v and the output projection; where a host makes them in its own forward (`Routed`), all
    Linears inside of the attention module. Sites that stay dense are taken, too. A and B are in FP32, whatever the model is in, and
    train; which other parameters do is not changed. In a model that trains for FP8 it is ``W + alpha / rank * B A`` that is rounded.

    `remove_lite3r` takes them out, `merge_lora` folds them in, and `convert` and `save_lite3r` want them folded in.

    Args:
        model: A model with Lite3R, not converted.
        rank: Rows of A ``[rank, C]`` and columns of B ``[C_out, rank]``.
        alpha: `rank` by default.
        scopes: Of the sites, as in `AttentionSite`.
        changes: Takes note of what is done. By default an error or an interruption leaves the model as it was.

    Returns:
        The names of the Linears.

    Raises:
        ModelTypeError: `model` is no `torch.nn.Module`.
        NotAppliedError: it carries no Lite3R, or is a part of the one that Lite3R was applied to.
        AlreadyAppliedError: LoRA is in it already, or another adapter is around one of the Linears.
        ConvertedError: weights are in FP8.
        NoSitesError: the model has no site of these scopes, or their sites have no Linear.
        ConfigError: rank, alpha or scopes have values that they do not take.
        WeightsError: a weight is sharded, quantised by another tool, or made by a parametrisation or by pruning.
    """
    if not is_int(rank) or rank < 1:
        raise ConfigError(f"rank of LoRA is a positive integer, got {shown(rank)}")
    if alpha is not None and (not is_number(alpha) or not 0 < alpha < math.inf):
        raise ConfigError(f"alpha of LoRA is a positive number or None, got {shown(alpha)}")
    if isinstance(scopes, str) or not scopes:
        raise ConfigError(f"scopes of LoRA is a tuple of {get_args(Scope)}, got {shown(scopes)}")
    for scope in scopes:
        check_choice("scopes", scope, get_args(Scope))
    found = look_up(model)
    state = found.require_one_state("add_lora")
    found.require_whole(state, "add_lora")
    if found.converted:
        raise ConvertedError("weights are in FP8, to which LoRA cannot be added: train before convert(model)")
    if state.lora:
        raise AlreadyAppliedError("this model has LoRA already: go on with that, or fold it in by merge_lora(model) first")
    made: dict[nn.Module, nn.Module] = {}
    for linear in projections(found, scopes):
        if linear.tuner is not None:
            raise AlreadyAppliedError(
                f"{linear.names[-1]} is inside of an adapter already ({type(linear.tuner).__name__}): train that one, or merge it first"
            )
        if not linear.known:
            raise WeightsError(f"{linear.names[0]} is a {type(linear.module).__name__}; LoRA goes around a torch.nn.Linear only")
        require_plain_weight(linear)
        assert isinstance(linear.module, nn.Linear)
        tied = next((other for other in made if other.weight is linear.module.weight), None)
        if tied is not None:
            raise WeightsError(f"{linear.names[0]} shares its weight with another projection, and LoRA of both cannot be folded into one")
        made[linear.module] = made_around(linear.module, ADAPTER, rank, rank if alpha is None else alpha)
    names = []
    with Changes() if changes is None else contextlib.nullcontext(changes) as changes:
        changes.put(vars(state), "lora", tuple(made.values()))  # first: whatever is in then is found and can be taken out
        for name, module in found.modules.items():
            if module in made:
                put_module(changes, found.modules, name, made[module])
                names.append(name)
    return names


@contextlib.contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Run the model without its adapters inside the context: LoRA of `add_lora`, and whatever PEFT put in, `modules_to_save` included.

    With `lite3r_disabled` around it this is the dense teacher, bit for bit. Unlike PEFT's own switches it leaves `requires_grad` alone.

    Raises:
        ModelTypeError: `model` is no `torch.nn.Module`.
    """
    layers = [m for m in set(look_up(model).modules.values()) if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    changes, holder = Changes(), object()
    try:
        try:
            for layer in layers:
                switch_off(layer, holder, changes, "_disable_adapters", off=True)
            yield
        finally:
            changes.undo()
    finally:
        changes.undo()  # an interruption may come before the first, too


@torch.inference_mode(False)
@torch.no_grad()
def merge_lora(model: Model) -> Model:
    """Fold the LoRA of `add_lora` into the weights, in place: ``W <- W + alpha / rank * B A``. Linear branches stay as they are.

    From then on the dense model, that of `lite3r_disabled` too, is another one.
    Linears that round to FP8 in training compute the same as before, bit for bit; the others, by default those of the first and last
    blocks and output projections, up to rounding. An error or an interruption leaves the model as it was.

    Returns:
        The same model.

    Raises:
        ModelTypeError: `model` is no `torch.nn.Module`.
        NotAppliedError: it carries no Lite3R, is a part of the one that Lite3R was applied to, or has no LoRA of `add_lora`.
        WeightsError: what came out would not be finite, or weights are sharded.
    """
    found = look_up(model)
    state = found.require_one_state("merge_lora")
    found.require_whole(state, "merge_lora")
    if not state.lora:
        others = any(is_lora(module) for module in found.modules.values())
        raise NotAppliedError(
            "the LoRA of this model was put in by PEFT: fold it in by model = model.merge_and_unload()"
            if others
            else "this model has no LoRA; add_lora(model) puts it in"
        )
    names = {module: name for name, module in found.modules.items()}
    sums: list[tuple[nn.Parameter, Tensor, Tensor]] = []
    layers: tuple[Any, ...] = state.lora
    for layer in layers:
        if layer.merged:
            continue
        weight = layer.base_layer.weight
        deltas = [layer.get_delta_weight(name) for name in layer.active_adapters if name in layer.lora_A]
        if not all(map(is_plain_tensor, (weight, *deltas))):
            raise WeightsError(f"{names[layer]} is sharded: load what was trained into a model that is not, and call merge_lora there")
        merged = folded(weight, deltas)
        if not is_finite(merged):
            raise WeightsError(f"{names[layer]}: W + BA has infinities or NaN, so training broke it; nothing was changed")
        sums.append((weight, weight.clone(), merged))
    with Changes() as changes:
        for weight, before, after in sums:
            changes.make(functools.partial(weight.copy_, after), functools.partial(weight.copy_, before))
        changes.put(vars(state), "changed", (*state.changed, *(layer.base_layer for layer in layers)))
        take_out_lora(changes, found)
    return model


def projections(found: Inventory, scopes: Sequence[Scope]) -> list[BlockLinear]:
    """The Linears that make q, k and v, and the output projections, of the sites of these scopes.

    Raises:
        NoSitesError: there is no such site, or none with a Linear.
    """
    state = found.states[0]
    sites = [site for site in state.sites if site.scope in scopes]
    if not sites:
        present = sorted({site.scope for site in state.sites})
        raise NoSitesError(f"this {found.name} has no attention site of the scopes {list(scopes)}, but of {present}: pass other scopes")
    taken = [linear for linear in found.linears(state) if any(_projects(site, linear) for site in sites)]
    if not taken:
        raise NoSitesError(f"the attention modules of this {found.name}, such as {sites[0].fqn!r}, have no torch.nn.Linear inside")
    return taken


def _projects(site: AttentionSite, linear: BlockLinear) -> bool:
    match site.projections:
        case FusedQKV(qkv=qkv, out=out):
            names = {f"{site.fqn}.{name}" for name in (qkv, out)}
        case SeparateQKV(q=q, k=k, v=v, out=out):
            names = {f"{site.fqn}.{name}" for name in (q, k, v, out)}
        case _:
            return any(name.startswith(f"{site.fqn}.") for name in linear.names)
    return not names.isdisjoint(linear.names)
