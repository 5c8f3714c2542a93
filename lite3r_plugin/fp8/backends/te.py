"""``"te"``: TransformerEngine, where it can run: probed when it is asked for, never required.

Its FP8 is `Float8CurrentScaling`: one scale for a whole tensor, computed from the tensor itself, so there is no state
to store and nothing of its own reaches a checkpoint.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import Fp8Backend
from ...errors import BackendError
from ...ops.fp8 import Quantized, dequantize, quantize
from .base import Backend, StoredLinear, why_no_fp8_units

MULTIPLE = 16  # of rows; it takes 8, and 16 also serves its weight gradient


@functools.cache
def _library() -> SimpleNamespace | str:
    """What we use of TransformerEngine, or the reason why there is none."""
    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    try:
        import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]
        from transformer_engine.common.recipe import Float8CurrentScaling  # pyright: ignore[reportMissingImports]

        return SimpleNamespace(Linear=te.Linear, autocast=te.autocast, quantized=te.quantized_model_init, recipe=Float8CurrentScaling())
    except Exception as error:  # a broken installation fails in many ways, some of them no ImportError
        return f"TransformerEngine cannot be imported ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"


def why_no_library() -> str | None:
    """The reason why there is no TransformerEngine, or None when there is one. The first call imports it."""
    library = _library()
    return library if isinstance(library, str) else None


def why_not_projection(weight: Tensor, linear_branch: str) -> str | None:
    """The reason why `TeProjection` cannot train the projection `weight` of a linear branch, or None when it can."""
    if linear_branch != "all":
        return f"it takes the linear branch over all tokens (linear_branch='all') as a tensor, which {linear_branch!r} never makes"
    if any(size % MULTIPLE for size in weight.shape):
        return f"it needs head dimensions that are multiples of {MULTIPLE}, not {weight.shape[0]}"
    if weight.device.type != "cuda" or torch.cuda.get_device_capability(weight.device) < (8, 9):
        return f"the model is on {weight.device}, not on a GPU with FP8"
    return why_no_library()


def _te() -> SimpleNamespace:
    library = _library()
    if isinstance(library, str):
        raise BackendError(f"{library}; pip install 'lite3r-plugin[te]', or use another fp8_backend")
    return library


class TransformerEngine(Backend):
    """Runs the FP8 weight of a converted Linear in `te.Linear`. Copies and pickles of it start anew."""

    name: Fp8Backend = "te"
    splits = False

    def __init__(self) -> None:
        self._layer: Any = None
        self._data: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_layer": None, "_data": None}

    @staticmethod
    def why_not(device: torch.device, inputs: int, outputs: int) -> str | None:
        reason = why_no_fp8_units(device, inputs, outputs)
        return why_no_library() if reason is None else reason

    @staticmethod
    def quantize(weight: Tensor) -> Quantized:
        """A weight ``[C_out, C]`` with one scale for all rows, as TransformerEngine has it."""
        data, scale, dtype = quantize(weight.reshape(1, -1))
        return Quantized(data.view(weight.shape), scale.expand(len(weight), 1).contiguous(), dtype)

    def _run(self, linear: StoredLinear, x: Tensor | Quantized, dtype: torch.dtype) -> Tensor:
        assert isinstance(x, Tensor)
        if self._layer is None or linear.weight_data is not self._data:
            self._layer = self._build(linear)
        te = _te()
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        with te.autocast(enabled=True, recipe=te.recipe):
            out = self._layer(F.pad(rows, (0, 0, 0, -len(rows) % MULTIPLE)), is_first_microbatch=False)
        return out[: len(rows)].view(*x.shape[:-1], out.shape[-1]).to(dtype)

    def _build(self, linear: StoredLinear) -> Any:
        te = _te()
        outputs, inputs = linear.weight_data.shape
        same = self.quantize(dequantize(Quantized(linear.weight_data, linear.weight_scale, torch.float32)))
        with torch.no_grad(), te.quantized(enabled=True, recipe=te.recipe):
            layer = te.Linear(inputs, outputs, bias=linear.bias is not None, params_dtype=torch.bfloat16, device=linear.weight_data.device)
            layer.weight.copy_(dequantize(same))
            if linear.bias is not None:
                layer.bias.copy_(linear.bias)
        layer.requires_grad_(False).eval()
        # One copy of the codes, theirs, which the buffers of the Linear now show.
        stored = getattr(layer.weight, "_data", None)
        linear.weight_data = same.data if stored is None else stored.view(same.data.dtype).view(outputs, inputs)
        linear.weight_scale = same.scale
        self._data = linear.weight_data
        return layer


class TeProjection:
    """A trainable projection under `te.autocast`: its weight, FP32, is the caller's parameter and the only state."""

    def __init__(self) -> None:
        self._layer: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_layer": None}

    def __call__(self, x: Tensor, weight: nn.Parameter) -> Tensor:
        """``x weight^T`` with gradients for both. x: ``[..., D]``, weight: ``[D_out, D]``. Returns x's dtype."""
        te = _te()
        if self._layer is None or self._layer.weight is not weight:
            self._layer = te.Linear(weight.shape[1], weight.shape[0], bias=False, params_dtype=weight.dtype, device=weight.device)
            self._layer.weight = weight
        rows = x.reshape(-1, x.shape[-1])
        rows = F.pad(rows, (0, 0, 0, -len(rows) % MULTIPLE)).to(torch.bfloat16)
        with torch.autocast("cuda", torch.bfloat16), te.autocast(enabled=True, recipe=te.recipe):
            out = self._layer(rows)
        return out[: x.numel() // x.shape[-1]].view(*x.shape[:-1], out.shape[-1]).to(x.dtype)
