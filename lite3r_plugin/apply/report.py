"""`describe`: what Lite3R did to a model, as data and as text."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adapter.layouts import LayoutFunction
from ..attention.module import SparseLinearAttention
from ..attention.state import CallCounts, ModelState
from ..config import Lite3RConfig, Precision
from ..errors import plural
from ..fp8.linear import Fp8Linear
from ..fp8.qat import FakeQuantLinear
from ..wrapper import is_lora
from .lookup import Inventory, look_up
from .profile import KeepRatioProfile
from .swap import fast_of, planner_of

FULL_PRECISION = "in full precision"


@dataclass(frozen=True)
class SiteDescription:
    """One swapped site.

    Attributes:
        fqn: Its fully qualified name.
        scope: Its scope, as in `AttentionSite`.
        sparse: False where it stays dense and only has its norm and rotary embedding fused, and where it is left to the host.
        keep_ratio: In (0, 1]; 1 where it stays dense, NaN where it waits for `choose_keep_ratios`.
        calls: What ran so far.
        left: Why the host's own code runs in every call; None where it does not.
        pinned: What is always kept, whatever the keep ratio says: ``"special tokens"``, ``"reference view"``, ``"reference view as keys"``.
    """

    fqn: str
    scope: str
    sparse: bool
    keep_ratio: float
    calls: CallCounts
    left: str | None = None
    pinned: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class Description:
    """The state of a model with Lite3R; `str()` gives it as text, a notebook shows that and a table of the sites.

    Attributes:
        model: Class of the model.
        adapter: Name of the model adapter.
        config: The configuration: what was asked for, in the end.
        phase: What the Linears of the transformer blocks are now: ``"full"``, in full precision; ``"fp8_qat"``, rounded to FP8 in
            training; ``"fp8"``, in FP8, be it not all of them.
        sites: The swapped sites.
        skipped: Sites that were not swapped, with the reason.
        routed: Swapped sites whose q, k and v the host's own code makes although its adapter describes how, with the reason.
        rewritten: Exact rewrites of the model's own code, in words.
        not_rewritten: Those that were left out, with the reason.
        branch_parameters: Parameters of the linear branches.
        lora_layers: Modules with LoRA around them, of `lite3r_plugin.peft` or of PEFT itself.
        lora_parameters: Parameters of LoRA, of all adapters.
        lora_active: Names of the adapters that are active.
        trainable_parameters: Parameters of the model with ``requires_grad``.
        parameters: All other parameters of the model.
        bytes_by_dtype: Bytes of parameters and buffers, by dtype.
        linears: Linears of the transformer blocks, by what runs them.
        fp8_bytes: Bytes of weights in FP8 and of their scales, and what the same weights take in BF16.
        infinities: Infinities that FP8 Linears saturated so far.
        whole: How the whole model runs, in lines; empty without a preset.
        peak_bytes: The most that this process has had allocated on the model's GPU; None on other devices.
        notes: What runs in another way than asked, and why.
    """

    model: str
    adapter: str
    config: Lite3RConfig
    phase: Precision
    sites: tuple[SiteDescription, ...]
    skipped: dict[str, str]
    routed: dict[str, str]
    rewritten: tuple[str, ...]
    not_rewritten: dict[str, str]
    branch_parameters: int
    lora_layers: int
    lora_parameters: int
    lora_active: tuple[str, ...]
    trainable_parameters: int
    parameters: int
    bytes_by_dtype: dict[str, int]
    linears: dict[str, int]
    fp8_bytes: tuple[int, int]
    infinities: int
    whole: tuple[str, ...]
    peak_bytes: int | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"Lite3R on {self.model} (adapter {self.adapter!r})", *(f"  {line}" for line in self._of_sites())]
        if any(kind != FULL_PRECISION for kind in self.linears):
            lines.append(f"  Linears: {', '.join(f'{count} {kind}' for kind, count in self.linears.items())}")
            lines.append(f"  infinities saturated so far: {self.infinities}")
        if self.fp8_bytes[0]:
            stored, before = self.fp8_bytes
            lines.append(f"  FP8 weights {stored / 2**20:.1f} MiB with their scales, {stored / before:.3f} of BF16")
        if self.lora_layers:
            active = f"active: {', '.join(self.lora_active)}" if self.lora_active else "none active"
            lines.append(f"  LoRA around {plural(self.lora_layers, 'Linear')}, {self.lora_parameters:,} parameters; {active}")
        lines += [f"  {line}" for line in (*self.whole, *self.notes)]
        lines.append(
            f"  parameters {self.parameters:,} + linear branches {self.branch_parameters:,}; trainable {self.trainable_parameters:,}; "
            + ", ".join(f"{size / 2**20:.1f} MiB {dtype}" for dtype, size in self.bytes_by_dtype.items())
            + ("" if self.peak_bytes is None else f"; peak on this GPU {self.peak_bytes / 2**20:.1f} MiB")
        )
        return "\n".join(lines)

    def __repr__(self) -> str:
        """One line."""
        calls = sum(s.calls.sparse for s in self.sites), sum(s.calls.dense + s.calls.host for s in self.sites)
        counts = f"{plural(sum(map(_is_sparse, self.sites)), 'sparse site')} of {len(self.sites)}"
        return f"<Lite3R on {self.model}: {counts}, {self.phase}, calls {calls[0]} sparse and {calls[1]} dense; print() tells all>"

    def _repr_html_(self) -> str:
        """What notebooks show: the text, and a table of the sites to unfold."""
        first, *rest = str(self).splitlines()
        lines = "".join(f"<li>{html.escape(line.strip())}</li>" for line in rest)
        head = "".join(f"<th>{name}</th>" for name in ("site", "scope", "runs", "keep_ratio", "calls sparse", "dense", "density"))
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in _cells(site))}</tr>" for site in self.sites)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        sites = f"<details><summary>{plural(len(self.sites), 'site')}</summary>{table}</details>"
        return f"<div><b>{html.escape(first)}</b><ul>{lines}</ul>{sites}</div>"

    def _of_sites(self) -> Iterator[str]:
        """What runs where, and what ran."""
        config = self.config
        sparse = [s for s in self.sites if s.sparse and s.left is None]
        shortened = [s for s in sparse if s.keep_ratio < 1]
        for (scope, ratio), count in sorted(Counter((s.scope, s.keep_ratio) for s in shortened).items()):
            yield (
                f"{plural(count, f'{scope} site')} sparse-linear: keep_ratio {ratio:g}, "
                + (f"negligible_ratio {config.negligible_ratio:g}, " if config.negligible_ratio else "")
                + f"blocks {config.block_q} x {config.block_k}, "
                f"linear branch {config.linear_branch} ({config.feature_map}), block means {_on(config.block_means)}"
                + (f", blocks chosen by {config.chosen_by}" if config.block_means else "")
            )
        if config.waits and sparse:
            yield f"{plural(len(sparse), 'site waits', 'sites wait')} for a keep ratio: choose_keep_ratios(model, inputs); a forward raises"
        if isinstance(config.keep_ratio, KeepRatioProfile):
            yield from config.keep_ratio.lines()
            yield from config.keep_ratio.differing(config)
        if shortened:
            pinned = dict.fromkeys(what for site in shortened for what in site.pinned)
            yield f"always kept: {', '.join(pinned) or 'nothing'}; backend {config.attention_backend}"
        branch = ", and the linear branch over all tokens" if config.linear_branch == "all" else ""
        yield from _counted((s for s in sparse if s.keep_ratio == 1), lambda s: f"{s.scope} site* dense: keep_ratio 1{branch}")
        dense = (s for s in self.sites if not s.sparse and s.left is None)
        yield from _counted(dense, lambda s: f"{s.scope} site* dense, norm and rotary embedding fused")
        left = (s for s in self.sites if s.left is not None)
        yield from _counted(left, lambda s: f"{s.scope} site* dense, in the host's own code: {s.left}")
        for reasons, what in ((self.skipped, "untouched"), (self.routed, "with q, k and v of the host's own code")):
            for reason, count in Counter(reasons.values()).items():
                yield f"{plural(count, 'site')} {what}: {reason}"
        yield from (f"rewritten exactly: {words}" for words in self.rewritten)
        yield from (f"not rewritten: {words}, because {reason}" for words, reason in self.not_rewritten.items())
        densities = [s.calls.density for s in sparse if s.calls.density is not None]
        calls = sum(s.calls.sparse for s in sparse), sum(s.calls.dense for s in sparse)
        ran = f"calls so far: {calls[0]} sparse, {calls[1]} dense" + (" (where sparse does not pay)" if shortened else "")
        yield ran + (f", density of the last {_on_average(densities)}" if densities else "")
        at_host = (s for s in self.sites if s.left is None and s.calls.host)
        yield from _counted(at_host, lambda s: f"{s.scope} site* ran calls dense in the host's own code: {s.calls.reason}")
        never = [s for s in self.sites if not _ran(s)]
        if len(never) < len(self.sites):
            yield from _counted(never, lambda s: f"{s.scope} site* not seen to run so far, which compiled code does not show")


def describe(model: nn.Module) -> Description:
    """What Lite3R did to `model`, as data; print it. Of a part of a model, what is in that part.

    Raises:
        ModelTypeError: `model` is no `torch.nn.Module`.
        NotAppliedError: the model carries no Lite3R, or several parts of it do on their own.

    Examples:
        >>> model = apply_lite3r(model, keep_ratio=0.1)
        >>> description = describe(model)  # print it; a notebook shows it as it is
        >>> {site.scope for site in description.sites if site.sparse}
        {'global'}
    """
    found = look_up(model)
    state, attention = found.require_one_state("describe"), found.attention
    modules = list(dict.fromkeys(found.modules.values()))
    parameters = list(model.parameters())
    branch = {id(p): p.numel() for m in attention.values() if "proj_lin" in m._modules for p in m.proj_lin.parameters()}
    lora = [module for module in modules if is_lora(module)]
    added = {id(p): p.numel() for m in lora for p in _beside_base(m)}
    sizes: Counter[str] = Counter()
    for tensor in (*parameters, *model.buffers()):
        sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel() * tensor.element_size()
    fp8_linears = [m for m in modules if isinstance(m, Fp8Linear)]
    device = parameters[0].device if parameters else torch.device("cpu")
    return Description(
        model=found.name,
        adapter=state.adapter,
        config=state.config,
        phase="fp8" if found.converted else state.phase,
        sites=tuple(_described(fqn, module) for fqn, module in attention.items()),
        skipped=dict(state.skipped),
        routed=dict(state.routed),
        rewritten=state.rewritten,
        not_rewritten=dict(state.not_rewritten),
        branch_parameters=sum(branch.values()),
        lora_layers=len(lora),
        lora_parameters=sum(added.values()),
        lora_active=tuple(sorted({name for module in lora for name in _active(module)})),
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        parameters=sum(p.numel() for p in parameters if id(p) not in branch and id(p) not in added),
        bytes_by_dtype=dict(sizes),
        linears=dict(Counter(_kind(linear.module) for linear in found.linears(state) if linear.known)),
        fp8_bytes=(
            sum(m.weight_data.nbytes + m.weight_scale.nbytes for m in fp8_linears),
            sum(2 * m.weight_data.numel() for m in fp8_linears),
        ),
        infinities=sum(int(m.infinities) for m in modules if isinstance(m, (Fp8Linear, FakeQuantLinear)) and not m.infinities.is_meta),
        whole=(
            *(fast.report() if (fast := fast_of(state)) is not None else ()),
            *(planner.report() if (planner := planner_of(state)) is not None else ()),
        ),
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        notes=(
            *_interrupted(found, state),
            *_rounded_apart(lora),
            *_changed(found, state),
            *(note for notes in state.notes.values() for note in notes),
        ),
    )


def _is_sparse(site: SiteDescription) -> bool:
    return site.sparse and site.left is None and site.keep_ratio < 1


def _cells(site: SiteDescription) -> tuple[str, ...]:
    """A row of the table for notebooks."""
    if math.isnan(site.keep_ratio):
        return site.fqn, site.scope, "waits for a keep ratio", "", str(site.calls.sparse), str(site.calls.dense + site.calls.host), ""
    runs = "sparse-linear" if _is_sparse(site) else "dense" if site.left is None else f"dense, in the host's own code: {site.left}"
    density = "" if site.calls.density is None else f"{site.calls.density:.3f}"
    return site.fqn, site.scope, runs, f"{site.keep_ratio:g}", str(site.calls.sparse), str(site.calls.dense + site.calls.host), density


def _counted(sites: Iterable[SiteDescription], words: Callable[[SiteDescription], str]) -> Iterator[str]:
    """What is true of several sites, ``frame site* dense``, with their number and the star as it wants it."""
    return (f"{count} {what.replace('*', '' if count == 1 else 's', 1)}" for what, count in sorted(Counter(map(words, sites)).items()))


def _ran(site: SiteDescription) -> bool:
    return any((site.calls.sparse, site.calls.dense, site.calls.host, site.calls.disabled))


def _described(fqn: str, module: SparseLinearAttention) -> SiteDescription:
    return SiteDescription(fqn, module.site.scope, module.sparse, module.keep_ratio, module.calls, module.left, _pinned(module))


def _pinned(module: SparseLinearAttention) -> tuple[str, ...]:
    """What `SparseLinearAttention` always keeps there."""
    tokens, pin = module.site.tokens, module.state.config.pin
    if not module.sparse or module.left is not None or module.keep_ratio == 1 or tokens is None or pin == "none":
        return ()
    special = ("special tokens",) if isinstance(tokens, LayoutFunction) or tokens.has_special_tokens else ()
    reference = {"reference": ("reference view",), "reference_keys": ("reference view as keys",)}.get(pin, ())
    has_reference = module.site.scope == "global" and (isinstance(tokens, LayoutFunction) or tokens.reference is not None)
    return special + (reference if has_reference else ())


def _interrupted(found: Inventory, state: ModelState) -> Iterator[str]:
    """What is half done."""
    if (unfinished := found.unfinished(state)) is not None:
        yield unfinished
    if bare := found.bare_hosts(state):
        are = plural(bare, "attention module is", "attention modules are")
        yield f"{are} those of the dense model, since something was interrupted; remove_lite3r takes out the rest"


def _on_average(densities: list[float]) -> str:
    """Their mean, with the least and the greatest where sites differ."""
    mean, least, greatest = (f"{x:.3f}" for x in (sum(densities) / len(densities), min(densities), max(densities)))
    return mean if least == greatest else f"{mean} on average, {least} to {greatest}"


def _changed(found: Inventory, state: ModelState) -> Iterator[str]:
    """Weights that are no longer those of the host."""
    if count := len(found.changed(state)):
        yield (
            f"the weights of {plural(count, 'module')} were trained, or had LoRA merged into them: without Lite3R the model is no longer "
            "the one that it was applied to"
        )


def _rounded_apart(lora: list[nn.Module]) -> Iterator[str]:
    """LoRA that training for FP8 does not see."""
    rounding = (module for module in lora if isinstance(module.base_layer, FakeQuantLinear))
    if count := sum(not getattr(module, "rounds_sum", False) for module in rounding):
        yield (
            f"{plural(count, 'Linear rounds', 'Linears round')} W to FP8 in training and not W + BA, as they will when LoRA is merged: put "
            "LoRA in by add_lora or Lite3RPeftConfig of lite3r_plugin.peft"
        )


def _beside_base(layer: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a LoRA layer that are not those of what it is around."""
    return (parameter for name, parameter in layer.named_parameters() if not name.startswith("base_layer."))


def _active(layer: Any) -> list[str]:
    """The adapters of a LoRA layer that count."""
    return [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]


def _kind(linear: nn.Module) -> str:
    if isinstance(linear, Fp8Linear):
        return f"in FP8 ({linear.backend})"
    return "rounded to FP8 in training" if isinstance(linear, FakeQuantLinear) else FULL_PRECISION


def _on(flag: bool) -> str:
    return "on" if flag else "off"
