"""The verbs: put Lite3R into a model, switch it off for a while, take it out again."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from ..adapter.plugins import find_sites
from ..adapter.sites import AttentionSite, Routed, TokenSource
from ..attention.module import ModelState, SparseLinearAttention
from ..attention.styles import projected as projections
from ..config import Lite3RConfig, matches
from ..errors import AdapterError, AlreadyAppliedError, BackendError, ConfigError, ConvertedError, Lite3RError, NoSitesError
from ..fp8 import convert as fp8
from ..fp8.backends import te
from ..fp8.block import check as check_block
from ..fp8.blocks import find_blocks
from ..fp8.qat import FakeQuantLinear
from ..ops.dispatch import TRITON_HEAD_DIMS, SlowPathWarning
from ..tokens.tracker import GridTracker
from ..wrapper import replace_modules
from .lookup import block_linears, lite3r_modules, require_all, require_lite3r
from .swap import convert

Model = TypeVar("Model", bound=nn.Module)


@torch.inference_mode(False)  # what is made here must serve outside of it
def apply_lite3r(model: Model, config: Lite3RConfig | None = None, **fields: Any) -> Model:
    """Make the attention of `model` sparse-linear, in place. Nothing outside this instance changes.

    Args:
        model: Any model that an installed adapter recognises, itself or as a part of it.
        config: The configuration, `Lite3RConfig()` by default.
        **fields: Fields of `Lite3RConfig` to set on top of `config`.

    Returns:
        The same model.

    Raises:
        UnknownModelError: no adapter knows the model.
        NoSitesError: the adapter names no site that this configuration changes.
        AlreadyAppliedError: the model, or a part of it, carries Lite3R already.
        ConfigError, BackendError, AdapterError: a wrong field, a backend that cannot run, a wrong adapter.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"apply_lite3r takes a torch.nn.Module, got {type(model).__name__}; pass the module inside it")
    if config is not None and not isinstance(config, Lite3RConfig):
        raise ConfigError(f"config is a Lite3RConfig, got {config!r}; single fields are keywords: apply_lite3r(model, keep_ratio=0.1)")
    config = (config or Lite3RConfig()).replace(**fields)
    if lite3r_modules(model):
        raise AlreadyAppliedError("this model carries Lite3R already; call remove_lite3r(model) first to change its configuration")
    adapter, sites = find_sites(model)
    hosts = _resolve(model, adapter, sites)
    scopes = _scopes(config, adapter, sites)
    sparse_sites = [site.fqn for site in sites if site.scope in scopes]
    if unused := [pattern for pattern in config.patterns if not any(matches(pattern, fqn) for fqn in sparse_sites)]:
        raise ConfigError(f"keep_ratio names {unused[:3]}, which match no site that becomes sparse; those are like {sparse_sites[0]!r}")
    # Everything is checked before anything is changed, so an error leaves the model as it was.
    for site in sites:
        check_block(model, site)
    # The state is of full precision until the weights are really in FP8.
    state_config = config.replace(precision="full") if config.precision == "fp8" else config
    state = ModelState(adapter, state_config, sites=tuple(sites), blocks=find_blocks(model, sites))
    plan: dict[str, tuple[AttentionSite, bool]] = {}
    for site in sites:
        sparse = site.scope in scopes
        if not sparse and not (config.fuse and _has_fusable_parts(site)):
            state.skipped[site.fqn] = f"scope {site.scope!r} stays dense"
            continue
        projections.check(hosts[site.fqn], site)
        if sparse and config.attention_backend == "triton" and site.head_dim not in TRITON_HEAD_DIMS:
            raise BackendError(
                f'site {site.fqn!r} has head_dim {site.head_dim}; the Triton kernels take {TRITON_HEAD_DIMS}. Use attention_backend="auto"'
            )
        plan[site.fqn] = (site, sparse)
    image_modules = _image_modules(model, adapter, [site for site, sparse in plan.values() if sparse])
    for name, (module, source) in image_modules.items():
        state.trackers[name] = GridTracker(source)
        state.trackers[name].attach(module)
    swapped: dict[int, SparseLinearAttention] = {}  # a module that appears twice is swapped once
    for fqn, (site, sparse) in plan.items():
        host = hosts[fqn]
        if id(host) not in swapped:
            swapped[id(host)] = SparseLinearAttention(host, site, state, sparse)
    state.swapped = len(swapped)
    replace_modules(model, {module.host: functools.partial(_same, module) for module in swapped.values()})  # at all names that it has
    try:
        if config.precision == "fp8_qat":
            fp8.fake_quantize_linears(model, block_linears(model))
            if config.fp8_backend == "te":
                _train_in_te(swapped.values(), state)
        elif config.precision == "fp8":
            convert(model)
    except Lite3RError:
        _release(model)
        raise
    return model


def _same(module: nn.Module) -> nn.Module:
    return module


def remove_lite3r(model: Model) -> Model:
    """Take Lite3R out again: the same modules, outputs and `state_dict` keys as before, bit for bit.

    Raises:
        NotAppliedError: the model carries no Lite3R, or is a part of the one that it was applied to.
        ConvertedError: its weights are in FP8.
    """
    _require_original_weights(model, "remove_lite3r")
    for state in {id(m.state): m.state for m in lite3r_modules(model).values()}.values():
        require_all(model, state, "remove_lite3r")
    _release(model)
    return model


def _release(model: nn.Module) -> None:
    modules = require_lite3r(model)
    replace_modules(model, {m: m.release for m in model.modules() if isinstance(m, FakeQuantLinear)})
    for module in modules.values():
        for tracker in module.state.trackers.values():
            tracker.detach()
    replace_modules(model, {module: module.release for module in modules.values()})


@contextlib.contextmanager
def lite3r_disabled(model: nn.Module) -> Iterator[None]:
    """Run the dense model inside the context: the teacher, with the same weights, bit for bit, no second copy.

    Raises:
        NotAppliedError: the model carries no Lite3R.
        ConvertedError: its weights are in FP8.
    """
    _require_original_weights(model, "lite3r_disabled")
    modules = [m for m in model.modules() if isinstance(m, (SparseLinearAttention, FakeQuantLinear))]
    before = [module.enabled for module in modules]
    try:
        for module in modules:
            module.enabled = False
        yield
    finally:
        for module, enabled in zip(modules, before, strict=True):
            module.enabled = enabled


def _train_in_te(modules: Iterable[SparseLinearAttention], state: ModelState) -> None:
    """Let TransformerEngine run the projections in training, or note why it cannot."""
    branches = [module for module in modules if "proj_lin" in module._modules]
    reasons = {te.why_not_projection(module.proj_lin.weight, state.config.linear_branch) for module in branches}
    if reasons == {None}:
        for module in branches:
            module.te_projection = te.TeProjection()
    elif reason := next((r for r in reasons if r is not None), None):
        note = f"the linear branches train in emulated FP8, not in TransformerEngine: {reason}"
        state.notes.append(note)
        warnings.warn(f"Lite3R: {note}", SlowPathWarning, stacklevel=4)


def _require_original_weights(model: nn.Module, what: str) -> None:
    if any(module.state.config.precision == "fp8" for module in require_lite3r(model).values()):
        raise ConvertedError(f"{what} needs the weights that convert(model) replaced by FP8; build the model again for the dense one")


def _resolve(model: nn.Module, adapter: str, sites: Any) -> dict[str, nn.Module]:
    hosts: dict[str, nn.Module] = {}
    for site in sites:
        if not isinstance(site, AttentionSite):
            raise AdapterError(f"adapter {adapter!r} returned {type(site).__name__}, not AttentionSite")
        if not site.fqn:
            raise ConfigError(f"this {type(model).__name__} is an attention module itself: pass the model that holds it")
        if site.fqn in hosts:
            raise AdapterError(f"adapter {adapter!r} names the site {site.fqn!r} twice")
        hosts[site.fqn] = _submodule(model, adapter, site.fqn)
    return hosts


def _submodule(model: nn.Module, adapter: str, fqn: str) -> nn.Module:
    try:
        return model.get_submodule(fqn)
    except AttributeError as error:
        raise AdapterError(f"adapter {adapter!r} names {fqn!r}, but the model has no such module: {error}") from error


def _scopes(config: Lite3RConfig, adapter: str, sites: Any) -> set[str]:
    """The scopes that become sparse. Raises `NoSitesError` when no site has one of them."""
    present: set[str] = {site.scope for site in sites}
    if config.scopes == "auto":
        wanted = present & {"global"} or present
    else:
        wanted = present.intersection(config.scopes)
    if not wanted:
        raise NoSitesError(
            f"the adapter {adapter!r} found no attention site with scope {config.scopes!r} in this model; "
            + (f"it has {sorted(present)}: pass scopes={tuple(sorted(present))!r}" if present else "it has no attention sites at all")
        )
    return wanted


def _has_fusable_parts(site: AttentionSite) -> bool:
    return not isinstance(site.projections, Routed) and site.projections.rope is not None


def _image_modules(model: nn.Module, adapter: str, sites: list[AttentionSite]) -> dict[str, tuple[nn.Module, TokenSource]]:
    """The modules that are given the images, by the name that the sites use, and how each is read."""
    sources: dict[str, TokenSource] = {}
    for site in sites:
        if site.tokens is not None:
            known = sources.setdefault(site.tokens.image_module, site.tokens)
            if known != site.tokens:
                raise AdapterError(f"adapter {adapter!r} describes the tokens from {known.image_module!r} in two ways")
    return {name: (_submodule(model, adapter, name), source) for name, source in sources.items()}
