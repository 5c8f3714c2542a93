"""Definition of FP8 rows, of the operations that end in them, and of the Linear between two of them.

Every row of the last dimension (a token of an activation, an output channel of a weight) has one FP32 scale:

    amax  = max |x| over the finite entries of the row, at least 1e-8
    scale = amax / MAX                                   MAX = 448 for E4M3, 57344 for E5M2
    data  = FP8(clamp(x * (MAX / amax), -MAX, MAX))      rounded to nearest, ties to even
    x'    = data * scale
    Y     = X' W'^T + bias                               products and sums in FP32, rounded once at the end

This is the quantiser of Lite3R (arXiv 2605.11354, Eqs. 6 to 11) with what its text leaves open: an infinity saturates
to the largest finite entry of its row (and can be counted), NaN stays NaN and spoils nothing but itself, a row of zeros
stays zero. Formats as in FP8-LM's and NVIDIA's common specification (arXiv 2209.05433): E4M3 for weights and activations,
E5M2, with more range and less precision, for gradients.

What comes before the quantisation (a norm, an activation function, a residual sum) is done in FP32 (FP64 for FP64
input) and not rounded in between. GELU and SiLU take infinities at their limits, 0 and infinity, which torch does on some
devices and in some lengths of vectors only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3 = torch.float8_e4m3fn
"""Of weights and activations: 3 bits of mantissa, up to 448."""
E5M2 = torch.float8_e5m2
"""Of gradients: 2 bits of mantissa, up to 57344."""
EPS = 1e-8


class Quantized(NamedTuple):
    """Rows in FP8.

    Attributes:
        data: ``[..., C]``, `E4M3` or `E5M2`.
        scale: ``[..., 1]``, FP32.
        dtype: Of the tensor that was quantised: what a computation continues in.
    """

    data: Tensor
    scale: Tensor
    dtype: torch.dtype


def quantize(x: Tensor, format: torch.dtype = E4M3, infinities: Tensor | None = None) -> Quantized:
    """Quantise the rows of x.

    Args:
        x: ``[..., C]``, floating point.
        format: `E4M3` or `E5M2`.
        infinities: A tensor of one integer to which the number of infinities in x is added, or None.

    Returns:
        ``[..., C]`` in FP8 with a scale ``[..., 1]`` for each row (Lite3R, arXiv 2605.11354, Eqs. 6 to 8). It has no gradient.
    """
    if infinities is not None:
        infinities += x.isinf().sum()
    dtype, x = x.dtype, _wide(x.detach())  # a gradient through the conversion would itself be cut to FP8
    largest = torch.finfo(format).max
    magnitude = x.abs()
    finite = magnitude.masked_fill(~(magnitude < torch.inf), 0)
    # amax over no entries has no value
    amax = (finite.amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)).clamp_min(EPS)
    data = (x * (largest / amax)).clamp(-largest, largest).to(format)
    return Quantized(data, (amax / largest).float(), dtype)


def dequantize(x: Quantized, dtype: torch.dtype | None = None) -> Tensor:
    """``[..., C]`` in `dtype`, by default that of the quantised tensor; rounded once."""
    dtype = dtype or x.dtype
    wide = x.data.to(torch.promote_types(dtype, torch.float32)) * x.scale
    # torch 2.11 compiles an autograd function that ends with a conversion to the same dtype into one without gradients.
    return wide if wide.dtype == dtype else wide.to(dtype)


def fake_quantize(x: Tensor, format: torch.dtype = E4M3, infinities: Tensor | None = None) -> Tensor:
    """x ``[..., C]`` rounded to FP8 rows and back, in x's dtype; its gradient is passed straight through (Eq. 9).

    `format` and `infinities` as in `quantize`.
    """
    if infinities is not None:
        infinities += x.detach().isinf().sum()
    if torch.compiler.is_compiling():  # which cannot trace a function of autograd's everywhere, nor fuse it with what is around it
        rounded = dequantize(quantize(x, format))
        return rounded + (x - x.detach()).nan_to_num() if torch.is_grad_enabled() else rounded  # 0, and a gradient of 1
    through: Any = _StraightThrough.apply(x, format)
    return through


def linear(x: Quantized, weight: Quantized, bias: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """``x' weight'^T + bias``.

    Args:
        x: ``[..., C]``.
        weight: ``[C_out, C]``.
        bias: ``[C_out]`` or None.
        dtype: Of the result, by default x's.

    Returns:
        ``[..., C_out]``.
    """
    dtype = dtype or x.dtype
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast(x.data.device.type, enabled=False):
        out = F.linear(x.data.to(wide), weight.data.to(wide)) * x.scale * weight.scale.flatten()
    return (out if bias is None else out + bias).to(dtype)


def layer_norm_quantize(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, infinities: Tensor | None = None) -> Quantized:
    """LayerNorm over the last dimension of x ``[..., C]``, then `quantize`."""
    wide = _wide(x)
    weight, bias = (None if p is None else p.to(wide.dtype) for p in (weight, bias))
    with torch.autocast(x.device.type, enabled=False):
        normed = F.layer_norm(wide, x.shape[-1:], weight, bias, eps)
    return quantize(normed, infinities=infinities)._replace(dtype=x.dtype)


def residual_norm_quantize(
    x: Tensor,
    update: Tensor,
    gain: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    infinities: Tensor | None = None,
) -> tuple[Tensor, Quantized]:
    """The residual sum ``x + gain * update`` and `layer_norm_quantize` of it.

    Args:
        x, update: ``[..., C]``.
        gain: ``[C]``, a layer scale, or None for 1.
        weight, bias, eps: Of the LayerNorm.
        infinities: See `quantize`.

    Returns:
        The sum, in the dtype to which x, update and gain promote, and the norm of that rounded sum in FP8: a norm that
        the host computed afterwards would see the rounded sum too.
    """
    total = residual(x, update, gain)
    return total, layer_norm_quantize(total, weight, bias, eps, infinities)


def residual(x: Tensor, update: Tensor, gain: Tensor | None) -> Tensor:
    """The residual sum of `residual_norm_quantize` alone: ``x + gain * update``, rounded once."""
    scaled = _wide(update) if gain is None else _wide(update) * gain
    return (_wide(x) + scaled).to(sum_dtype(x, update, gain))


def scale_products(products: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    """``products * rows * columns^T + bias``, what a product of FP8 rows without their scales lacks; it may be written into `products`.

    Args:
        products: ``[M, N]`` FP32, contiguous.
        rows: Scales of x ``[M]`` or ``[M, 1]``, FP32, contiguous.
        columns: Scales of the weight ``[N, 1]``, likewise.
        bias: ``[N]`` or None.

    Returns:
        ``[M, N]`` FP32.
    """
    out = products * rows.reshape(-1, 1) * columns.reshape(1, -1)
    return out if bias is None else out + bias.float()


def sum_dtype(x: Tensor, update: Tensor, gain: Tensor | None) -> torch.dtype:
    """The dtype of ``x + gain * update``."""
    dtype = torch.promote_types(x.dtype, update.dtype)
    return dtype if gain is None else torch.promote_types(dtype, gain.dtype)


def gelu_quantize(x: Tensor, approximate: str = "none", infinities: Tensor | None = None) -> Quantized:
    """`torch.nn.functional.gelu` of x ``[..., C]``, then `quantize`."""
    wide = _wide(x)
    activated = _at_limits(wide, F.gelu(wide, approximate=approximate))
    return quantize(activated, infinities=infinities)._replace(dtype=x.dtype)


def swiglu_quantize(x: Tensor, infinities: Tensor | None = None) -> Quantized:
    """``silu(gate) * value`` of x ``[..., 2C] = (gate, value)``, then `quantize`: ``[..., C]``."""
    gate, value = _wide(x).chunk(2, -1)
    return quantize(_at_limits(gate, F.silu(gate)) * value, infinities=infinities)._replace(dtype=x.dtype)


def heads_quantize(x: Tensor, infinities: Tensor | None = None) -> Quantized:
    """An attention output ``[B, H, N, D]``, its heads put side by side, then `quantize`: ``[B, N, H * D]``."""
    return quantize(x.transpose(1, 2).flatten(2), infinities=infinities)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, format: torch.dtype) -> Tensor:
        return dequantize(quantize(x, format))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _at_limits(x: Tensor, activated: Tensor) -> Tensor:
    return torch.where(x.isinf(), F.relu(x), activated)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
