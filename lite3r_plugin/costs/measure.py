"""Measures what attention costs on a GPU."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..ops.sla import sparse_linear_attention
from .model import AttentionCosts

SHORT, LONG = 2048, 32768  # tokens; so many that an H100 takes longer than Python even for the few
FEW, MANY = 0.1, 0.5  # keep ratios


def measure(device: torch.device) -> AttentionCosts:
    """Time dense and sparse attention on a GPU: some milliseconds, after Triton compiled its kernels."""
    generator = torch.Generator(device).manual_seed(0)
    proj = torch.eye(64, device=device)  # not zero: a branch that is takes no time

    def milliseconds(tokens: int, keep_ratio: float | None) -> float:
        q, k, v = torch.randn(3, 1, 16, tokens, 64, device=device, dtype=torch.bfloat16, generator=generator).unbind(0)
        if keep_ratio is None:
            return _time(lambda: F.scaled_dot_product_attention(q, k, v), device)
        return _time(lambda: sparse_linear_attention(q, k, v, keep_ratio=keep_ratio, linear="all", proj=proj), device)

    with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device):
        return fit(milliseconds(LONG, None), milliseconds(LONG, FEW), milliseconds(LONG, MANY), milliseconds(SHORT, FEW))


def fit(dense: float, few: float, many: float, few_short: float) -> AttentionCosts:
    """The costs that explain four times in milliseconds.

    Args:
        dense: Of dense attention over `LONG` tokens.
        few, many: Of sparse attention over `LONG` tokens, of which `FEW` and `MANY` are kept.
        few_short: Of sparse attention over `SHORT` tokens, of which `FEW` are kept.
    """
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
