"""``"scaled_mm"``: `torch._scaled_mm` on the FP8 matrix units, compute capability 8.9 and later."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...config import Fp8Backend
from ...ops.dispatch import under_trace
from ...ops.fp8 import Quantized, passes
from ..cache import TensorCache
from .base import UNIT, Backend, StoredLinear, in_fp8, why_no_fp8_units


class ScaledMM(Backend):
    """Inputs and weights in FP8, with one scale for each row."""

    name: Fp8Backend = "scaled_mm"
    takes_fp8 = True
    multiple = UNIT

    def __init__(self) -> None:
        self._bf16_bias: TensorCache[Tensor] = TensorCache()

    @staticmethod
    def why_not(device: torch.device, inputs: int, outputs: int) -> str | None:
        return why_no_fp8_units(device, inputs, outputs)

    def _run(self, linear: StoredLinear, x: Tensor | Quantized, dtype: torch.dtype) -> Tensor:
        bias: Tensor | None = linear.bias
        if bias is not None and dtype != torch.float32:  # a matrix product with scales by row takes no other
            bias = self._in_bf16(bias)
        return scaled_mm(in_fp8(x, linear), linear.fp8_weight, bias, dtype)

    def _in_bf16(self, bias: Tensor) -> Tensor:
        if bias.dtype == torch.bfloat16:
            return bias
        rounded = functools.partial(bias.to, torch.bfloat16)
        return rounded() if bias.requires_grad else self._bf16_bias.get(bias, rounded)


def scaled_mm(x: Quantized, weight: Quantized, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x weight^T + bias`` on the FP8 matrix units.

    With scales by row their result is BF16, bias and all. An FP32 model would lose by that what QAT has shown it, so its products
    come back in FP32, without scales, and the scales follow.

    Args:
        x: ``[..., C]``, one scale for each row.
        weight: ``[C_out, C]``, one scale for each row.
        bias: ``[C_out]`` or None.
        dtype: Of the result.

    Returns:
        ``[..., C_out]``.
    """
    outputs, inputs = weight.data.shape
    shape = (*x.data.shape[:-1], outputs)
    if not x.data.numel():
        return x.scale.new_empty(shape, dtype=dtype)
    if dtype == torch.float32:
        one = _one(x.scale.device)
        out = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            x.data.reshape(-1, inputs), weight.data.t(), scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=False
        )
        return passes(out).scale_products(out, x.scale, weight.scale, bias).view(shape)
    if bias is not None and bias.dtype != torch.bfloat16:
        bias = bias.to(torch.bfloat16)
    out = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        x.data.reshape(-1, inputs), weight.data.t(), scale_a=x.scale.reshape(-1, 1), scale_b=weight.scale.t(),
        bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip
    out = out.view(shape)
    return out if dtype == torch.bfloat16 else out.to(dtype)  # a call that does nothing takes 3 us of an eager forward


_ones: dict[torch.device, Tensor] = {}


def _one(device: torch.device) -> Tensor:
    """A scale of 1, FP32, kept for each device; not what is made inside of a graph, whose memory is the graph's, or under a mode."""
    if under_trace():
        return torch.ones((), device=device)
    found = _ones.get(device)
    if found is None:
        with torch.inference_mode(False):
            found = torch.ones((), device=device)
        if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            _ones[device] = found
    return found
