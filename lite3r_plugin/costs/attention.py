"""From which length on sparse attention pays on this machine.

The times of both kinds of attention follow from four numbers for each chip, `AttentionCosts`. They are known for the
H100 (benchmarks/results); on another GPU they are measured once, by `measure`, and kept in the user's cache.
`Lite3RConfig.dense_below` overrides all of this.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..config import Lite3RConfig
from ..errors import InputError
from ..files import write_atomically
from ..ops.dispatch import constant_in_graphs

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class AttentionCosts:
    """Milliseconds of attention with 16 heads of 64 in BF16 over N tokens.

    Dense attention takes ``dense * N**2``, sparse attention
    ``slowdown * share * dense * N**2 + per_token * N + per_call``, where `share` of the scores is computed. Pooling, the
    block map and the linear branch are linear in N, launches are constant. Both follow the number of heads and their size.
    """

    dense: float
    slowdown: float
    per_token: float
    per_call: float


H100 = AttentionCosts(dense=1.0e-8, slowdown=1.0, per_token=1.2e-5, per_call=0.4)
CPU = AttentionCosts(dense=4e-5, slowdown=1.2, per_token=0.0, per_call=100.0)
KNOWN = {"H100": H100, "H200": H100, "GH200": H100}  # by a word of the name of the GPU; all three are the same chip


class BreakEven(NamedTuple):
    """Sparse attention pays where ``width * (gain * free**2 - loss * N**2 - tokens * N) > call``, `free` of N tokens not pinned.

    The numbers are whole and know no size of a tensor, so that a graph of `torch.compile` is guarded by arithmetic on sizes alone.
    """

    gain: int
    loss: int
    tokens: int
    call: int

    def pays(self, width: int, tokens: int, pinned: int) -> bool:
        """Whether it does for `tokens` tokens, `pinned` of which are always kept; `width` is batch times heads times head dimension."""
        free = tokens - pinned
        return width * (self.gain * free * free - self.loss * tokens * tokens - self.tokens * tokens) > self.call


def shares_of(config: Lite3RConfig, fqn: str) -> str:
    """Keep ratio of the site `fqn`, and keys that block means add, as a share of N: in words, which compilers never take for symbols."""
    return f"{config.keep_ratio_of(fqn)!r} {1 / config.block_k if config.block_means else 0.0!r}"


@constant_in_graphs
def break_even(device: torch.device, shares: str, may_measure: bool) -> BreakEven:
    """When sparse attention pays at a site.

    Args:
        device: Where it would run.
        shares: See `shares_of`.
        may_measure: Whether an unknown GPU may be measured now: not while a graph is captured or compiled.
    """
    keep_ratio, mean_share = map(float, shares.split())
    return _break_even(costs_of(device, may_measure), keep_ratio, mean_share)


@functools.lru_cache(maxsize=256)
def _break_even(costs: AttentionCosts, keep_ratio: float, mean_share: float) -> BreakEven:
    unit = 1000 / costs.dense  # the whole numbers count thousandths of what a dense score costs
    return BreakEven(
        gain=round(1000 * costs.slowdown * (1 - mean_share) * (1 - keep_ratio)),
        loss=round(1000 * (costs.slowdown - 1)),
        tokens=round(unit * costs.per_token),
        call=round(unit * costs.per_call * 16 * 64),
    )


def costs_of(device: torch.device, may_measure: bool = True) -> AttentionCosts:
    """The costs on `device`: known, measured before, or measured now; where that may not be, those of the H100."""
    if device.type != "cuda":
        return CPU
    found = _found.get(device)
    if found is not None:
        return found
    name = torch.cuda.get_device_name(device)
    found = next((costs for word, costs in KNOWN.items() if word in name.split()), None) or _load(name)
    if found is None and may_measure:
        logger.warning("Lite3R measures once when sparse attention pays on %s; this takes some seconds", name)
        found = measure(device)
        _save(name, found)
    if found is None:
        logger.warning(
            "When sparse attention pays on %s was never measured, and cannot be while a graph is compiled or captured: it is taken "
            "for an H100. Run the model once before that, or set Lite3RConfig.dense_below", name
        )  # fmt: skip
        return H100
    _found[device] = found
    return found


_found: dict[torch.device, AttentionCosts] = {}


def measure(device: torch.device) -> AttentionCosts:
    """Time dense and sparse attention on a GPU: some milliseconds, after Triton compiled its kernels."""
    from ..ops.sla import sparse_linear_attention

    generator = torch.Generator(device).manual_seed(0)
    proj = torch.zeros(64, 64, device=device)

    def milliseconds(tokens: int, keep_ratio: float | None) -> float:
        q, k, v = torch.randn(3, 1, 16, tokens, 64, device=device, dtype=torch.bfloat16, generator=generator).unbind(0)
        if keep_ratio is None:
            return _time(lambda: F.scaled_dot_product_attention(q, k, v), device)
        return _time(lambda: sparse_linear_attention(q, k, v, keep_ratio=keep_ratio, linear="all", proj=proj), device)

    with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device):
        return fit(
            milliseconds(LONG, None), milliseconds(LONG, FEW), milliseconds(LONG, MANY), milliseconds(SHORT, FEW)
        )  # fmt: skip


SHORT, LONG = 2048, 32768  # tokens; so many that an H100 takes longer than Python even for the few
FEW, MANY = 0.1, 0.5  # keep ratios


def fit(dense: float, few: float, many: float, few_short: float) -> AttentionCosts:
    """The costs that explain times of dense and of sparse attention: of LONG sequences, the last of a SHORT one."""
    dense /= LONG**2
    slowdown = max(0.1, (many - few) / ((MANY - FEW) * dense * LONG**2))
    few -= slowdown * FEW * dense * LONG**2
    few_short -= slowdown * FEW * dense * SHORT**2
    per_token = max(0.0, (few - few_short) / (LONG - SHORT))
    return AttentionCosts(dense, slowdown, per_token, max(0.0, few_short - per_token * SHORT))


def _time(call: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Median milliseconds of `call` on a GPU that never waits for Python."""
    for _ in range(3):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for event in events[:-1]:
        event.record()
        call()
    events[-1].record()
    torch.cuda.synchronize(device)
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def _file(name: str) -> Path:
    from huggingface_hub import cached_assets_path

    return cached_assets_path("lite3r-plugin", namespace="attention_costs") / f"{name.replace('/', '-')}.json"


def _versions() -> dict[str, str]:
    from ..version import __version__

    return {"lite3r": __version__, "torch": torch.__version__}


def _load(name: str) -> AttentionCosts | None:
    try:
        stored = json.loads(_file(name).read_text())
        return AttentionCosts(**stored["costs"]) if stored["versions"] == _versions() else None
    except (OSError, ValueError, KeyError, TypeError):  # none, or damaged: it is measured again
        return None


def _save(name: str, costs: AttentionCosts) -> None:
    try:
        write_atomically(_file(name), json.dumps({"versions": _versions(), "costs": dataclasses.asdict(costs)}, indent=1) + "\n")
    except (OSError, InputError) as error:
        logger.warning("The measurement cannot be kept, so the next process repeats it: %s", error)
