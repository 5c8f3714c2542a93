"""Decisions that depend on the machine: when sparse attention pays."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionCosts:
    """Milliseconds of attention with 16 heads of 64 over N tokens, fitted to measurements (benchmarks/results).

    Dense attention takes ``dense * N**2``, sparse attention ``SLOWDOWN * density * dense * N**2 + per_token * N + per_call``:
    pooling, the block map and the linear branch are linear in N, launches are constant.
    """

    dense: float
    per_token: float
    per_call: float


SLOWDOWN = 1.2  # a kept score costs this much more than one of dense attention
H100 = AttentionCosts(dense=1.0e-8, per_token=8e-6, per_call=0.4)
CPU = AttentionCosts(dense=4e-5, per_token=0.0, per_call=100.0)


def sparse_pays(device: torch.device, tokens: int, heads: int, head_dim: int, density: float) -> bool:
    """Whether sparse attention is expected to beat dense attention.

    Args:
        device: GPUs are judged by the measurements on an H100.
        tokens: N.
        heads: Batch times heads.
        head_dim: D.
        density: Share of the scores that sparse attention computes, pinned blocks included.
    """
    costs = H100 if device.type == "cuda" else CPU
    work = heads * head_dim / (16 * 64)
    saved = costs.dense * tokens**2 * (1 - SLOWDOWN * density)
    return work * (saved - costs.per_token * tokens) > costs.per_call
