"""``"weight_only"``: FP8 weights, inputs as they are; compute capability 8.0 and later, for memory and not for speed."""

from __future__ import annotations

import torch
from torch import Tensor

from ...config import Fp8Backend
from ...ops import weight_only
from ...ops.dispatch import triton_installed
from ...ops.fp8 import Quantized
from .base import Backend, StoredLinear


class WeightOnly(Backend):
    """A Triton kernel that widens the weight on its way to the matrix units."""

    name: Fp8Backend = "weight_only"

    @staticmethod
    def why_not(device: torch.device, inputs: int, outputs: int) -> str | None:
        if device.type != "cuda":
            return f"the model is on {device}, not on a CUDA GPU"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "the GPU is older than compute capability 8.0"
        return None if triton_installed() else "triton is not installed"

    def _run(self, linear: StoredLinear, x: Tensor | Quantized, dtype: torch.dtype) -> Tensor:
        assert isinstance(x, Tensor)
        return weight_only.linear(x.to(dtype), linear.fp8_weight, linear.bias, triton=True)
