"""Decisions that depend on the machine: when sparse attention and FP8 pay."""

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


@dataclass(frozen=True)
class Fp8Costs:
    """What FP8 saves and costs in one Linear, in milliseconds.

    It saves ``per_product`` for each multiplication; it costs ``per_call``, and where no operation before it quantises the
    input on the way, a pass over the input: ``per_pass + per_byte * bytes``, BF16 read and FP8 written.
    """

    per_product: float
    per_call: float
    per_pass: float
    per_byte: float


# Single Linears of VGGT's sizes at 2,748 to 43,968 tokens on an H100, launches included; rounded to FP8's disadvantage.
H100_FP8 = Fp8Costs(per_product=1.0e-12, per_call=0.02, per_pass=0.01, per_byte=5e-10)


def fp8_pays(device: torch.device, tokens: int, inputs: int, outputs: int, fused: bool) -> bool:
    """Whether a Linear is expected to be faster in FP8 than in BF16.

    Args:
        device: GPUs with FP8 are judged by the measurements on an H100; elsewhere FP8 saves memory only.
        tokens: Rows of the input.
        inputs, outputs: Its size.
        fused: Whether the operation before it quantises its input.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return False
    costs = H100_FP8
    extra = 0.0 if fused else costs.per_pass + costs.per_byte * 3 * tokens * inputs
    return costs.per_product * tokens * inputs * outputs > costs.per_call + extra
