"""Where a Linear is faster in FP8."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Fp8Costs:
    """What FP8 saves and costs in one Linear, in milliseconds.

    It saves ``per_product`` for each multiplication; it costs ``per_call``, and where no operation before it quantises the
    input on the way, a pass over the input: ``per_pass + per_byte * bytes``, BF16 read and FP8 written.
    """

    per_product: float
    per_call: float
    per_pass: float
    per_byte: float


# Single Linears of VGGT's sizes at 2,748 to 43,968 tokens on an H100 (benchmarks/results/h100_fp8.json), a launch from Python for
# a pass of its own included; no size that was slower in FP8 is predicted to be faster.
H100_FP8 = Fp8Costs(per_product=1.2e-12, per_call=0.005, per_pass=0.01, per_byte=3.8e-10)


def fp8_pays(device: torch.device, tokens: int, inputs: int, outputs: int, fused: bool) -> bool:
    """Whether a Linear is expected to be faster in FP8 than in BF16.

    Args:
        device: GPUs with FP8 are judged by the measurements on an H100; elsewhere FP8 saves memory only.
        tokens: Rows of the input.
        inputs, outputs: Its size.
        fused: Whether the operation before it quantises its input.
    """
    return fp8_saves(device, tokens, inputs, outputs, fused) > 0


def fp8_saves(device: torch.device, tokens: int, inputs: int, outputs: int, fused: bool) -> float:
    """Milliseconds that a Linear is expected to take less in FP8 than in BF16; below 0 where it takes more. Arguments as of `fp8_pays`."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return 0.0
    costs = H100_FP8
    extra = 0.0 if fused else costs.per_pass + costs.per_byte * 3 * tokens * inputs
    return costs.per_product * tokens * inputs * outputs - costs.per_call - extra
