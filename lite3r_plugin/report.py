"""`describe`: what Lite3R did to a model, as data and as text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from .apply import require_lite3r
from .attention import CallCounts
from .config import Lite3RConfig


@dataclass(frozen=True)
class SiteReport:
    """One swapped site: its name, scope, keep ratio (1: dense, only norm and rotary embedding fused) and calls so far."""

    fqn: str
    scope: str
    sparse: bool
    keep_ratio: float
    calls: CallCounts


@dataclass(frozen=True)
class Report:
    """The state of a model with Lite3R; `str()` prints it.

    Attributes:
        model: Class of the model.
        adapter: Name of the model adapter.
        config: The configuration.
        sites: The swapped sites.
        skipped: Sites that were not swapped, with the reason.
        branch_parameters: Parameters of the linear branches.
        trainable_parameters: Parameters of the model with ``requires_grad``.
        parameters: All parameters of the model.
        bytes_by_dtype: Bytes of parameters and buffers, by dtype.
    """

    model: str
    adapter: str
    config: Lite3RConfig
    sites: tuple[SiteReport, ...]
    skipped: dict[str, str]
    branch_parameters: int
    trainable_parameters: int
    parameters: int
    bytes_by_dtype: dict[str, int]

    def __str__(self) -> str:
        config = self.config
        sparse = [s for s in self.sites if s.sparse]
        lines = [f"Lite3R on {self.model} (adapter {self.adapter!r})"]
        for scope, ratio in sorted({(s.scope, s.keep_ratio) for s in sparse}):
            count = sum((s.scope, s.keep_ratio) == (scope, ratio) for s in sparse)
            lines.append(
                f"  {count} {scope} sites sparse-linear: keep_ratio {ratio:g}, blocks {config.block_q} x {config.block_k}, "
                f"linear branch {config.linear_branch} ({config.feature_map}), block means {_on(config.block_means)}"
            )
        always = {"special tokens": config.keep_special_tokens, "reference view": config.keep_reference_view}
        pinned = [name for name, kept in always.items() if kept]
        lines.append(f"  always kept: {', '.join(pinned) or 'nothing'}; backend {config.backend}")
        for scope, count in sorted(Counter(s.scope for s in self.sites if not s.sparse).items()):
            lines.append(f"  {count} {scope} sites dense, norm and rotary embedding fused")
        for reason, count in Counter(self.skipped.values()).items():
            lines.append(f"  {count} sites untouched: {reason}")
        densities = [s.calls.density for s in sparse if s.calls.density is not None]
        calls = sum(s.calls.sparse for s in sparse), sum(s.calls.dense for s in sparse)
        ran = f"calls so far: {calls[0]} sparse, {calls[1]} dense (shorter than break-even)"
        lines.append(f"  {ran}" + (f", density of the last {max(densities):.3f}" if densities else ""))
        lines.append(
            f"  parameters {self.parameters:,} + linear branches {self.branch_parameters:,}; trainable {self.trainable_parameters:,}; "
            + ", ".join(f"{size / 2**20:.1f} MiB {dtype}" for dtype, size in self.bytes_by_dtype.items())
        )
        return "\n".join(lines)


def describe(model: nn.Module) -> Report:
    """What Lite3R did to `model`; print it.

    Raises:
        NotAppliedError: the model carries no Lite3R.
    """
    modules = require_lite3r(model)
    state = next(iter(modules.values())).state
    parameters = list(model.parameters())
    branch = {id(p): p.numel() for m in modules.values() if "proj_lin" in m._modules for p in m.proj_lin.parameters()}
    sizes: Counter[str] = Counter()
    for tensor in (*parameters, *model.buffers()):
        sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel() * tensor.element_size()
    return Report(
        model=type(model).__name__,
        adapter=state.adapter,
        config=state.config,
        sites=tuple(SiteReport(fqn, m.site.scope, m.sparse, m.keep_ratio, m.calls) for fqn, m in modules.items()),
        skipped=dict(state.skipped),
        branch_parameters=sum(branch.values()),
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        parameters=sum(p.numel() for p in parameters) - sum(branch.values()),
        bytes_by_dtype=dict(sizes),
    )


def _on(flag: bool) -> str:
    return "on" if flag else "off"
