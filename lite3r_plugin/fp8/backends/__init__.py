"""What runs an FP8 Linear: which backends a machine has, and the computation of each."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from ...config import Fp8Backend
from ...errors import BackendError
from ...ops import weight_only
from ...ops.dispatch import triton_installed
from ...ops.fp8 import Quantized, naive, passes
from . import te

QUANTISES_INPUT = ("scaled_mm", "emulated")  # backends that take an input that is in FP8 already


def why_not(backend: Fp8Backend, device: torch.device, inputs: int, outputs: int) -> str | None:
    """The reason why `backend` cannot run a Linear of this size on `device`, or None when it can."""
    if backend in ("emulated", "auto"):
        return None
    if device.type != "cuda":
        return f"the model is on {device}, not on a CUDA GPU"
    capability = torch.cuda.get_device_capability(device)
    if backend == "weight_only":
        if capability < (8, 0):
            return "the GPU is older than compute capability 8.0"
        return None if triton_installed() else "triton is not installed"
    if capability < (8, 9):
        return "the GPU is older than compute capability 8.9 and has no FP8"
    if inputs % 16 or outputs % 16:
        return f"its FP8 matrix products need multiples of 16, not {inputs} -> {outputs}"
    return te.why_not() if backend == "te" else None


def choose(requested: Fp8Backend, device: torch.device, inputs: int, outputs: int) -> Fp8Backend:
    """`requested`, or for ``"auto"`` the fastest backend that can run.

    Raises:
        BackendError: the requested backend cannot run; it says why.
    """
    if requested != "auto":
        if (reason := why_not(requested, device, inputs, outputs)) is not None:
            raise BackendError(
                f'fp8_backend="{requested}" cannot run a Linear {inputs} -> {outputs} here: {reason}. Use fp8_backend="auto", which '
                f"chooses for each Linear, or one of {get_args(Fp8Backend)[1:]}"
            )
        return requested
    # TransformerEngine was slower than torch at every size measured (benchmarks/results), so only an explicit wish gets it.
    order: tuple[Fp8Backend, ...] = ("scaled_mm", "weight_only", "emulated")
    return next(backend for backend in order if why_not(backend, device, inputs, outputs) is None)


def run(backend: Fp8Backend, x: Tensor | Quantized, weight: Quantized, bias: Tensor | None, dtype: torch.dtype, count: Tensor) -> Tensor:
    """One FP8 Linear.

    Args:
        backend: ``"scaled_mm"``, ``"weight_only"`` or ``"emulated"``.
        x: ``[..., C]``; in FP8 already, only where the backend is one of `QUANTISES_INPUT`.
        weight: ``[C_out, C]``.
        bias: ``[C_out]`` or None.
        dtype: Of the result.
        count: Where saturated infinities are counted.

    Returns:
        ``[..., C_out]``.

    Raises:
        BackendError: the tensors are where the backend, chosen at conversion, cannot run.
    """
    where = x.data.device if isinstance(x, Quantized) else x.device
    if backend != "emulated" and where.type != "cuda":
        raise BackendError(
            f'the Linears were converted for the backend "{backend}" on a GPU and got a tensor on {where}; convert(model) again'
        )
    if backend == "weight_only":
        if isinstance(x, Quantized):
            raise BackendError('the backend "weight_only" takes no input in FP8')
        return weight_only.linear(x.to(dtype), weight, bias, triton=True)
    rows = x if isinstance(x, Quantized) else passes(x).quantize(x, infinities=count)
    return _scaled_mm(rows, weight, bias, dtype) if backend == "scaled_mm" else naive.linear(rows, weight, bias, dtype)


def _scaled_mm(x: Quantized, weight: Quantized, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`naive.linear` on the FP8 matrix units.

    With scales by row their result is BF16, bias and all. An FP32 model would lose by that what QAT has shown it, so its products
    come back in FP32, without scales, and the scales follow.
    """
    outputs, inputs = weight.data.shape
    shape = (*x.data.shape[:-1], outputs)
    if not x.data.numel():
        return x.scale.new_empty(shape, dtype=dtype)
    if dtype == torch.float32:
        one = torch.ones((), device=x.scale.device)
        out = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            x.data.reshape(-1, inputs), weight.data.t(), scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=False
        )
        out = out.mul_(x.scale.reshape(-1, 1)).mul_(weight.scale.t())
        return (out if bias is None else out.add_(bias)).view(shape)
    out = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        x.data.reshape(-1, inputs), weight.data.t(), scale_a=x.scale.reshape(-1, 1), scale_b=weight.scale.t(),
        bias=None if bias is None else bias.to(torch.bfloat16), out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip
    return out.view(shape).to(dtype)
