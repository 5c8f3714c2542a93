"""What a verb is going to do to a model. Everything is found and checked here, so an error leaves the model as it was."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..adapter.plugins import find_sites
from ..adapter.rewrites import ExactRewrite
from ..adapter.sites import AttentionSite, Routed
from ..attention.branch import branch_device, why_not_written
from ..attention.styles.registry import check_projections, style_of
from ..attention.trial import Trials
from ..config import Lite3RConfig, matches
from ..errors import AdapterError, AlreadyAppliedError, BackendError, ConfigError, NoSitesError, WeightsError, shown
from ..fp8.block import check_block
from ..fp8.blocks import BlockLinear, find_blocks, find_linears
from ..fp8.convert import LinearPlan, choose_again, is_finite, plan_linears, require_plain_weight
from ..fp8.linear import Fp8Linear
from ..ops.dispatch import TRITON_HEAD_DIMS
from ..runtime.fast import FastPlan, plan_fast
from ..runtime.rewrites import NO_REWRITES, Rewrites, plan_rewrites
from ..tokens.tracker import Source
from ..wrapper import RewrittenMethod, forward_parameters, keeps_copies
from .lookup import Inventory
from .profile import KeepRatioProfile, check_sites

BY_HAND = "sites="
"""What stands for the name of an adapter where a user gave the sites."""


@dataclass(frozen=True)
class Swap:
    """One attention module to take the place of: the module, its description, whether it becomes sparse, why it is left to the host."""

    host: nn.Module
    site: AttentionSite
    sparse: bool
    left: str | None = None


@dataclass(frozen=True, repr=False)
class ApplyPlan:
    """What `apply_lite3r` is going to do.

    Attributes:
        found: The modules of the dense model.
        adapter: Name of the model adapter.
        config: The configuration, with names where it had a function as `fp8_filter`.
        sites: All sites that the adapter named.
        swaps: What is taken the place of, each module once.
        skipped: Sites that stay as they are, with the reason.
        routed: Sites whose q, k and v the host's own forward makes although the adapter describes how, with the reason.
        watched: By the source of token layouts that sites name: the module that is watched, and whether such sites are inside of it.
        blocks: The transformer blocks by name.
        linears: Their Linears.
        training: Those of them that are to round to FP8 in training; None where the model is not to train for FP8.
        conversion: How they come into FP8; None where they do not, or where a checkpoint brings FP8 weights of its own.
        rewrites: The exact rewrites, compared with the host.
        fast: How the whole model is going to run.
    """

    found: Inventory
    adapter: str
    config: Lite3RConfig
    sites: tuple[AttentionSite, ...]
    swaps: tuple[Swap, ...]
    skipped: dict[str, str]
    routed: dict[str, str]
    watched: dict[Source, tuple[nn.Module, bool]]
    blocks: dict[str, nn.Module]
    linears: list[BlockLinear]
    training: list[nn.Linear] | None
    conversion: ConversionPlan | None
    rewrites: Rewrites
    fast: FastPlan

    @property
    def places(self) -> dict[str, Swap]:
        """The swaps by every name that their modules have in the model."""
        by_host = {swap.host: swap for swap in self.swaps}
        return {fqn: by_host[module] for fqn, module in self.found.modules.items() if module in by_host}


@dataclass(frozen=True)
class ConversionPlan:
    """What `convert` is going to do.

    Attributes:
        config: The configuration of the converted model.
        linears: The Linears that are not in FP8 yet and that the filter takes, each with its backend.
        again: Those in FP8 already, each with the backend that is to run it from now on.
        left: How many Linears stay as they are, by reason.
    """

    config: Lite3RConfig
    linears: list[LinearPlan]
    again: list[LinearPlan]
    left: dict[str, int]


def plan_application(
    found: Inventory, config: Lite3RConfig, sites: Sequence[AttentionSite] | None = None, *, with_weights: bool = True
) -> ApplyPlan:
    """What `apply_lite3r` is to do to a dense model.

    Args:
        found: The model.
        config: The configuration.
        sites: Its attention sites; None: as an installed adapter says.
        with_weights: Whether ``precision="fp8"`` is about the weights that the model has. False: others take their place.

    Raises:
        UnknownModelError: no adapter knows the model.
        NoSitesError: the adapter names no site that this configuration changes, or `fp8_filter` takes no Linear.
        AlreadyAppliedError: the model, or a part of it, carries Lite3R already.
        ConfigError: a pattern matches nothing.
        BackendError: the attention backend cannot run.
        AdapterError: the adapter does not describe this model, or the arguments of the forward of a site cannot be read.
        WeightsError: FP8 is wanted, and a weight is not finite, or is made by a parametrisation or by pruning; or a module around a site
            brings in its weights for a call.
    """
    if found.attention:
        raise AlreadyAppliedError("this model carries Lite3R already; call remove_lite3r(model) first to change its configuration")
    adapter, sites = find_sites(found.model) if sites is None else (BY_HAND, _checked_sites(sites))
    hosts = _find_hosts(found, adapter, sites)
    scopes = _sparse_scopes(config, adapter, sites)
    if not isinstance(config.keep_ratio, KeepRatioProfile):
        _check_keep_ratios(config, [site.fqn for site in sites if site.scope in scopes])
    if unused := [pattern for pattern in config.exclude if not any(matches(pattern, site.fqn) for site in sites)]:
        raise ConfigError(f"exclude names {unused[:3]}, which match no site of this {found.name}; those are like {sites[0].fqn!r}")
    for site in sites:
        with _naming(adapter):
            check_block(found.modules, site)
    chosen = _choose(found, adapter, sites, hosts, scopes, config)
    swaps, skipped = chosen.swaps, chosen.skipped
    if isinstance(config.keep_ratio, KeepRatioProfile):
        check_sites(config.keep_ratio, [swap.site.fqn for swap in swaps.values() if swap.sparse])
    if config.precision == "full" and not any(swap.sparse for swap in swaps.values()):
        raise NoSitesError(_why_nothing(found, chosen))
    if not swaps:  # FP8 needs what the attention modules keep for all of the model
        swaps = {hosts[fqn]: Swap(hosts[fqn], site, False, skipped.pop(fqn)) for fqn, site in ((site.fqn, site) for site in sites)}
    sites = [_routed(site) if site.fqn in chosen.routed else site for site in sites]
    sources: dict[Source, list[str]] = {}  # the sites of each
    for swap in swaps.values():
        for source in (swap.site.tokens, swap.site.keys):
            if swap.sparse and source is not None:
                sources.setdefault(source, []).append(swap.site.fqn)
    watched = _find_watched(found, adapter, sources)
    blocks = find_blocks(found.modules, [site for site in sites if site.scope != "camera" or "camera" in scopes])
    linears = find_linears(found.modules, {name: [name] for name in blocks}, sites)
    config = _resolve_filter(config, linears, found.name)
    training = plan_training(linears, config) if config.precision == "fp8_qat" else None
    conversion = None
    if config.precision == "fp8" and with_weights:
        conversion = plan_conversion(linears, sites, config, None, again=False, model=found.name)
    fast, rewrites = _plan_whole(found, config, adapter)
    return ApplyPlan(
        found, adapter, config, tuple(sites), tuple(swaps.values()), skipped, chosen.routed, watched, blocks, linears, training, conversion,
        rewrites, fast,
    )  # fmt: skip


def _plan_whole(found: Inventory, config: Lite3RConfig, adapter: str) -> tuple[FastPlan, Rewrites]:
    """How the whole model is to run, and the exact rewrites: those for weights in BF16 come with these, or these are left out."""
    fast = plan_fast(found.innermost, config.whole_model)
    if config.plans_memory and not isinstance(vars(found.innermost).get("forward"), (RewrittenMethod, type(None))):
        raise ConfigError(
            "max_memory cannot be kept: the forward of the model was exchanged by somebody else, such as for CPU offload, and may bring in "
            "what it likes; call apply_lite3r first, or leave max_memory out"
        )

    def keeps(rewrite: ExactRewrite) -> bool:
        return config.exact_rewrites and rewrite.keeps_host(config.fuse)

    if fast.parts.weights != "host":
        everywhere = fast.parts.weights == "bf16_everywhere"

        def wanted(rewrite: ExactRewrite) -> bool:
            return keeps(rewrite) if rewrite.keeps_dtype else not (everywhere and rewrite.for_precision)

        rewrites = plan_rewrites(found.model, found.modules, wanted)
        if rewrites is None:
            reason = f"the adapter {adapter!r} does not say that this {found.name} runs in BF16 (the hook lite3r_exact_rewrites)"
        else:
            reason = next((why for rewrite, why in rewrites.refused.items() if not rewrite.keeps_dtype), None)
        if rewrites is not None and reason is None:
            return fast, rewrites
        fast = fast.without("weights in BF16", str(reason), weights="host")
    return fast, (plan_rewrites(found.model, found.modules, keeps) if config.exact_rewrites else None) or NO_REWRITES


def plan_training(linears: Sequence[BlockLinear], config: Lite3RConfig) -> list[nn.Linear]:
    """The Linears that are to round to FP8 in training.

    Raises:
        WeightsError: the weight of one of them is made by a parametrisation or by pruning.
    """
    taken = [linear for linear in linears if linear.known and linear.taken_by(config)]
    for linear in taken:
        require_plain_weight(linear)
    return [linear.module for linear in taken if isinstance(linear.module, nn.Linear)]


def plan_conversion(
    linears: Sequence[BlockLinear], sites: Sequence[AttentionSite], config: Lite3RConfig, tokens: int | None, *, again: bool, model: str
) -> ConversionPlan:
    """What `convert` is to do to these Linears.

    Args:
        linears: All of the transformer blocks.
        sites: All sites of the model.
        config: Its configuration, with the wanted `fp8_backend`.
        tokens: Rows of a typical input, or None where memory is what counts.
        again: Whether the model was converted before: then nothing need be left to convert.
        model: What the model is called in messages.

    Raises:
        NoSitesError: there is no Linear to convert, or `fp8_filter` takes none.
        BackendError: the backend cannot run here, or nothing would be faster at `tokens`.
        WeightsError: a weight is not finite, or is made by a parametrisation or by pruning; or an adapter is around a Linear.
    """
    config = config.replace(precision="fp8")
    known = [linear for linear in linears if linear.known and not isinstance(linear.module, Fp8Linear)]
    taken = [linear for linear in known if linear.taken_by(config)]
    if not again:
        if not known:
            others = ", ".join(sorted({linear.unknown for linear in linears if linear.unknown is not None}))
            raise NoSitesError(
                f"no transformer block of this {model} has a torch.nn.Linear to convert" + (f": its Linears are {others}" if others else "")
            )
        if not taken:
            raise _nothing_taken(known, model)
    require_merged(taken)
    described = [site.block.fqn for site in sites if site.block is not None]
    plans = plan_linears(taken, config.fp8_backend, tokens, lambda linear: _is_inside(linear, described))
    if not again and all(plan.backend is None for plan in plans):
        raise BackendError(f"no Linear of this model is faster in FP8 at {tokens} tokens here; leave out tokens= to convert for memory")
    left = Counter(plan.reason for plan in plans if plan.reason)
    return ConversionPlan(config, plans, choose_again(linears, config.fp8_backend), {**left, **left_linears(linears, config)})


def require_merged(linears: Sequence[BlockLinear]) -> None:
    """Raise `WeightsError` if adapters are around one of these Linears, which are to be stored in FP8."""
    for linear in linears:
        if linear.tuner is not None:
            raise WeightsError(
                f"{linear.names[-1]} is inside of an adapter ({type(linear.tuner).__name__}), which cannot be merged into a weight in FP8: "
                "merge before, what add_lora put in by merge_lora(model) of lite3r_plugin.peft, what PEFT did by model.merge_and_unload()"
            )


def left_linears(linears: Sequence[BlockLinear], config: Lite3RConfig) -> dict[str, int]:
    """How many of these Linears FP8 leaves whatever they cost, by reason."""
    reasons = []
    for linear in linears:
        if linear.unknown is not None:
            reasons.append(linear.unknown)
        elif not isinstance(linear.module, Fp8Linear) and not linear.taken_by(config):
            reasons.append("not taken by fp8_filter")
    return dict(Counter(reasons))


def check_branches(found: Inventory) -> None:
    """Raise `WeightsError` if a linear branch of the model has infinities or NaN, or cannot be rounded to FP8 for good."""
    for fqn, module in found.attention.items():
        if "proj_lin" not in module._modules:
            continue
        if not is_finite(module.proj_lin.weight):
            raise WeightsError(f"{fqn}.proj_lin.weight has infinities or NaN: the model is broken; train it again or start from zeros")
        if module.state.phase == "fp8_qat" and keeps_copies(module.proj_lin):
            raise WeightsError(
                f"convert rounds the linear branches for good, but {fqn}.proj_lin is held by adapters of PEFT, one copy each: call "
                "model = model.merge_and_unload() first"
            )
        if module.state.phase == "fp8_qat" and (reason := why_not_written(module.proj_lin)):
            raise WeightsError(f"convert cannot round {fqn}.proj_lin for good, as training did in passing: it {reason}")


def _check_device(found: Inventory, site: AttentionSite, host: nn.Module) -> None:
    """Raise `WeightsError` where a module around the host brings in its weights for a call: nobody can tell where its branch belongs."""
    if branch_device(host).type != "meta":
        return
    around = ["", *(site.fqn[:i] for i, character in enumerate(site.fqn) if character == ".")]
    owner = next((name for name in reversed(around) if "forward" in found.modules[name].__dict__), None)
    if owner is not None:
        raise WeightsError(
            f"the weights of site {site.fqn!r} are on the meta device and come only for a call of {owner or 'the model'} as a whole "
            "(CPU offload): call apply_lite3r first, offload then"
        )


@dataclass(frozen=True)
class _Choice:
    """What becomes of the sites: `swaps` by host, each module once, `skipped` and `routed` as in `ApplyPlan`."""

    swaps: dict[nn.Module, Swap]
    skipped: dict[str, str]
    routed: dict[str, str]


def _choose(
    found: Inventory, adapter: str, sites: Sequence[AttentionSite], hosts: Mapping[str, nn.Module], scopes: set[str], config: Lite3RConfig
) -> _Choice:
    """What becomes of each of `sites`, whose modules are `hosts`, where those of `scopes` are to be sparse."""
    chosen, trials = _Choice({}, {}, {}), Trials()
    for site in sites:
        sparse, host = site.scope in scopes, hosts[site.fqn]
        if config.excludes(site.fqn):
            chosen.skipped[site.fqn] = "excluded"
            continue
        if not sparse and not (config.fuse and forward_parameters(host) is not None and style_of(site, host).fuses):
            chosen.skipped[site.fqn] = f"scope {site.scope!r} stays dense"
            continue
        with _naming(adapter):
            check_projections(site, host)
        left, verdict = None, trials.of(site, host)
        if verdict.refused is not None and not sparse:
            chosen.skipped[site.fqn] = (
                f"scope {site.scope!r} stays dense, not fused, since the trial of its projections failed: {verdict.refused}"
            )
            continue
        if verdict.refused is not None:
            chosen.routed[site.fqn] = verdict.refused
            site = _routed(site)
            if verdict.attention_calls not in (None, 1):
                left = f"it calls scaled_dot_product_attention {verdict.attention_calls} times, not once"
        if sparse and config.attention_backend == "triton" and site.head_dim not in TRITON_HEAD_DIMS:
            raise BackendError(
                f'site {site.fqn!r} has head_dim {site.head_dim}; the Triton kernels take {TRITON_HEAD_DIMS}. Use attention_backend="auto"'
            )
        if sparse and config.linear_branch != "none":
            if hasattr(host, "proj_lin"):
                raise AdapterError(
                    f"site {site.fqn!r}: {type(host).__name__} has a proj_lin of its own, under which name Lite3R keeps the linear branch: "
                    'rename it, or take linear_branch="none"'
                )
            _check_device(found, site, host)
        chosen.swaps.setdefault(host, Swap(host, site, sparse and left is None, left))
    return chosen


def _routed(site: AttentionSite) -> AttentionSite:
    return dataclasses.replace(site, projections=Routed(site.projections.num_heads, out=site.projections.out))


def _why_nothing(found: Inventory, chosen: _Choice) -> str:
    reasons = {why: fqn for fqn, why in chosen.skipped.items()}
    reasons |= {swap.left or "its scope stays dense": swap.site.fqn for swap in chosen.swaps.values()}
    listed = "; ".join(f"{why} (such as {fqn!r})" for why, fqn in reasons.items())
    return f"no attention of this {found.name} would become sparse: {listed}"


def _checked_sites(sites: Sequence[AttentionSite]) -> tuple[AttentionSite, ...]:
    """The sites that a user gave. Raises `ConfigError` where they are anything else."""
    if isinstance(sites, AttentionSite) or not isinstance(sites, Sequence) or not all(isinstance(site, AttentionSite) for site in sites):
        raise ConfigError(f"sites is a list of AttentionSite, got {shown(sites)}")
    return tuple(sites)


@contextlib.contextmanager
def _naming(adapter: str) -> Iterator[None]:
    """Put the adapter's name into the `AdapterError` of what it described."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"adapter {adapter!r}: {error}") from error


def _find_hosts(found: Inventory, adapter: str, sites: Sequence[AttentionSite]) -> dict[str, nn.Module]:
    hosts: dict[str, nn.Module] = {}
    for site in sites:
        if not site.fqn:
            raise ConfigError(f"this {found.name} is an attention module itself: pass the model that holds it")
        if site.fqn in hosts:
            raise AdapterError(f"adapter {adapter!r} names the site {site.fqn!r} twice")
        hosts[site.fqn] = _find_module(found, adapter, site.fqn)
    return hosts


def _find_module(found: Inventory, adapter: str, fqn: str) -> nn.Module:
    if fqn not in found.modules:
        raise AdapterError(f"adapter {adapter!r} names {fqn!r}, but the model has no such module")
    if "_orig_mod" in found.modules[fqn]._modules:
        inside = f"{fqn}._orig_mod"
        raise AdapterError(f"adapter {adapter!r} names {fqn!r}, which is what torch.compile made around {inside!r}: name the latter")
    return found.modules[fqn]


def _sparse_scopes(config: Lite3RConfig, adapter: str, sites: Sequence[AttentionSite]) -> set[str]:
    """The scopes that become sparse. Raises `NoSitesError` when no site has one of them."""
    present: set[str] = {site.scope for site in sites}
    if config.scopes == "auto":
        wanted = present & {"global"} or present - {"camera"}
    else:
        wanted = present.intersection(config.scopes)
    if not wanted:
        raise NoSitesError(
            f"the adapter {adapter!r} found no attention site with scope {config.scopes!r} in this model; "
            + (f"it has {sorted(present)}: pass scopes={tuple(sorted(present))!r}" if present else "it has no attention sites at all")
        )
    return wanted


def _check_keep_ratios(config: Lite3RConfig, sparse_sites: Sequence[str]) -> None:
    if unused := [pattern for pattern in config.patterns if not any(matches(pattern, fqn) for fqn in sparse_sites)]:
        raise ConfigError(f"keep_ratio names {unused[:3]}, which match no site that becomes sparse; those are like {sparse_sites[0]!r}")


def _find_watched(found: Inventory, adapter: str, sources: Mapping[Source, Sequence[str]]) -> dict[Source, tuple[nn.Module, bool]]:
    watched: dict[Source, tuple[nn.Module, bool]] = {}
    for source, sites in sources.items():
        if (name := source.module) is not None:
            inside = any(not name or site.startswith(f"{name}.") for site in sites)
            watched[source] = _find_module(found, adapter, name), inside
    return watched


def _resolve_filter(config: Lite3RConfig, linears: Sequence[BlockLinear], model: str) -> Lite3RConfig:
    """`config` with the names that `fp8_filter` chose if it is a function, which no file can hold. Raises as `plan_application` says."""
    known = [linear for linear in linears if linear.known]
    names = [name for linear in known for name in linear.names]
    patterns = config.fp8_filter if isinstance(config.fp8_filter, tuple) else ()
    if callable(config.fp8_filter):
        chosen = [name for linear in known for name in linear.names if config.takes_fp8(linear.module, name)]
        config = config.replace(fp8_filter=tuple(chosen))
    elif names and (unused := [p for p in patterns if not any(matches(p, name) for name in names)]):
        raise ConfigError(
            f"fp8_filter names {unused[:3]}, which match no Linear in the transformer blocks of this {model}; those are like {names[0]!r}"
        )
    rounds_none = config.precision == "fp8_qat" and not any(linear.taken_by(config) for linear in known)
    if known and (not config.fp8_filter or rounds_none):
        raise _nothing_taken(known, model)
    return config


def _nothing_taken(linears: Sequence[BlockLinear], model: str) -> NoSitesError:
    return NoSitesError(
        f"fp8_filter takes none of the {len(linears)} Linears in the transformer blocks of this {model}: let it take names like "
        f'{linears[0].names[0]!r}, or all of them, fp8_filter=("*",)'
    )


def _is_inside(linear: BlockLinear, blocks: Sequence[str]) -> bool:
    return any(name.startswith(f"{block}.") for name in linear.names for block in blocks)
