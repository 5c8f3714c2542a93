"""``"emulated"``: the definition in plain torch, on any device, slow."""

from __future__ import annotations

import torch
from torch import Tensor

from ...config import Fp8Backend
from ...ops.fp8 import Quantized, naive
from .base import Backend, StoredLinear, in_fp8


class Emulated(Backend):
    """Inputs rounded to FP8, products in FP32."""

    name: Fp8Backend = "emulated"
    takes_fp8 = True
    needs_gpu = False

    @staticmethod
    def why_not(device: torch.device, inputs: int, outputs: int) -> str | None:
        return None

    def _run(self, linear: StoredLinear, x: Tensor | Quantized, dtype: torch.dtype) -> Tensor:
        return naive.linear(in_fp8(x, linear), linear.fp8_weight, linear.bias, dtype)
