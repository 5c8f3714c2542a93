"""From a model with ordinary Linears, trained with fake quantisation or not, to one that holds FP8."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..adapter.sites import AttentionSite
from ..config import Fp8Backend
from ..costs.linear import fp8_pays
from ..errors import ConvertedError
from ..wrapper import replace_modules, share_hooks
from . import backends
from .block import Fp8Block, why_not_fused
from .blocks import modules_in
from .linear import Fp8Linear
from .qat import FakeQuantLinear


@dataclass(frozen=True)
class Plan:
    """What `convert` will do to one Linear: run it by `backend`, or leave it and say why."""

    linear: nn.Linear
    backend: Fp8Backend | None
    reason: str = ""


def fake_quantize_linears(model: nn.Module, linears: Iterable[nn.Linear]) -> None:
    """Let each Linear round to FP8 in its forward. Raises `ConvertedError`."""
    linears = list(linears)
    for linear in linears:
        _require_plain(linear)
    replace_modules(model, {linear: functools.partial(FakeQuantLinear, linear) for linear in linears})


def plan(linears: Iterable[nn.Linear], requested: Fp8Backend, tokens: int | None, fused: Callable[[nn.Linear], bool]) -> list[Plan]:
    """A backend for each Linear; with `tokens`, ``"auto"`` leaves those that would not be faster in FP8.

    Args:
        linears: The Linears.
        requested: The backend.
        tokens: Rows of a typical input, or None where memory is what counts.
        fused: Whether the operation before a Linear quantises its input.

    Raises:
        BackendError: the requested backend cannot run one of them.
        ConvertedError: a weight has infinities or NaN, or is made by a parametrisation or by pruning.
    """
    plans = []
    for linear in linears:
        _require_plain(linear)
        device, inputs, outputs = linear.weight.device, linear.in_features, linear.out_features
        if requested == "auto" and tokens is not None and not fp8_pays(device, tokens, inputs, outputs, fused(linear)):
            plans.append(Plan(linear, None, f"not faster in FP8 at {tokens} tokens"))
            continue
        if not is_finite(linear.weight):
            raise ConvertedError(f"a weight {outputs} x {inputs} has infinities or NaN: the model is broken, and FP8 would hide it")
        plans.append(Plan(linear, backends.choose(requested, device, inputs, outputs)))
    return plans


def convert_linears(model: nn.Module, plans: Iterable[Plan]) -> None:
    """Replace the Linears one by one; each weight is freed before the next one is quantised."""
    backends_of: dict[nn.Module, Fp8Backend] = {item.linear: item.backend for item in plans if item.backend is not None}
    replace_modules(model, {linear: functools.partial(_quantized, linear, backend) for linear, backend in backends_of.items()})


def rebind(blocks: Iterable[nn.Module], requested: Fp8Backend) -> None:
    """Choose the backends of FP8 Linears again, for the device that they are on now.

    Raises:
        BackendError: the requested backend cannot run one of them.
    """
    linears = modules_in(blocks, Fp8Linear)
    chosen: list[Fp8Backend] = [backends.choose(requested, m.weight_data.device, m.in_features, m.out_features) for m in linears]
    for linear, backend in zip(linears, chosen, strict=True):
        linear.backend = backend


def fuse_blocks(model: nn.Module, sites: Iterable[AttentionSite], blocks: Mapping[str, nn.Module], takes_fp8: Container[str]) -> None:
    """Put `Fp8Block` in the place of every block that a site describes and that has what it needs.

    Args:
        model: With FP8 Linears.
        sites: All its sites.
        blocks: Its blocks by name.
        takes_fp8: Names of the sites that take an input in FP8.
    """
    stand_ins: dict[nn.Module, Callable[[], nn.Module]] = {}
    for site in sites:
        if site.block is None:
            continue
        host = blocks[site.block.fqn]
        if why_not_fused(host, site.block) is None:
            stand_ins[host] = functools.partial(Fp8Block, host, site, site.fqn in takes_fp8)
    replace_modules(model, stand_ins)


def unfuse_blocks(model: nn.Module) -> None:
    """Put the hosts of all `Fp8Block` back."""
    replace_modules(model, {m: m.release for m in model.modules() if isinstance(m, Fp8Block)})


def is_finite(weight: Tensor) -> bool:
    """Whether it has neither infinities nor NaN; a weight on the meta device has no values at all."""
    return weight.is_meta or bool(weight.detach().isfinite().all())


def _require_plain(linear: nn.Linear) -> None:
    if not isinstance(linear._parameters.get("weight"), nn.Parameter):
        raise ConvertedError(
            f"the weight {linear.out_features} x {linear.in_features} of a Linear is no parameter but made of others before each forward: "
            "make it permanent first (torch.nn.utils.prune.remove, remove_weight_norm or remove_spectral_norm)"
        )


def _quantized(linear: nn.Module, backend: Fp8Backend) -> Fp8Linear:
    host = linear.release() if isinstance(linear, FakeQuantLinear) else linear
    assert isinstance(host, nn.Linear)
    made = Fp8Linear.quantized(host, backend)
    share_hooks(made, host)
    host.register_parameter("weight", None)  # free it, whoever still holds the module
    return made
