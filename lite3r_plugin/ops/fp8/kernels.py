"""Triton twin of `naive`: one pass over each row, whatever comes before its quantisation.

A program holds one row in registers, so a row is read once and written once, in FP8. The passes are bound by memory,
and on a row of this kind `erf` alone costs more than the bytes do: GELU is x times a sigmoid of an odd polynomial whose
relative error (1.6e-3 in the negative tail, 3e-4 above zero) is far below the 6e-2 of an FP8 rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import register, under_trace
from ..launch import launch
from ..sizes import cover, power_of_2
from . import naive
from .naive import E4M3, Quantized, sum_dtype

ACTIVATIONS = {None: 0, "none": 1, "tanh": 2, "swiglu": 3}


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """GELU, its tanh form or SiLU (1, 2, 3), as x * sigmoid(slope * x * ln 2)."""
    if ACTIVATION == 0:
        return x
    # Below, the result is zero in FP8 whatever the row holds; the limit at minus infinity comes out without 0 * inf.
    bottom: tl.constexpr = -80.0 if ACTIVATION == 3 else -9.0
    x = tl.where(x < bottom, bottom, x)
    if ACTIVATION == 1:
        square = tl.minimum(x * x, 30.0)
        # log2(Phi(x) / Phi(-x)) / x, a minimax fit over x^2 <= 30
        slope = 2.2986018 + square * (0.10913188 + square * (-0.0014039165 + square * 1.2611449e-05))
    elif ACTIVATION == 2:
        slope = 2.3022082 + 0.10294324 * x * x
    else:
        slope = 1.4426950408889634
    return x / (1.0 + tl.exp2(-x * slope))


@triton.jit
def _to_e4m3(x, INTERPRETED: tl.constexpr):
    """x in E4M3, saturating; NaN stays NaN."""
    if not INTERPRETED:
        return x.to(tl.float8e4nv)
    # The interpreter's conversion drops the carry out of a mantissa, does not saturate and has no NaN: leave it exact numbers.
    x = tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x))
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    rounded = tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, normal)
    codes = tl.where(x == x, rounded, 0.0).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return tl.where(x == x, codes, 0x7F).to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit(do_not_specialize=["tokens", "eps"])
def _rows_kernel(
    X, Update, Gain, Weight, Bias, Total, Data, Scale, Infinities,
    tokens, x_stride_b, x_stride_h, x_stride_n, update_stride, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, RESIDUAL: tl.constexpr, GAIN: tl.constexpr,
    NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, COUNT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One row in FP8, after a residual sum, a norm or an activation function; a program for each row.

        X                 [rows, C or 2 C (ACTIVATION 3)], a stride of x_stride_n from row to row and of 1 in it; or, with HEAD_DIM,
                          [B, C / HEAD_DIM, tokens, HEAD_DIM] of strides x_stride_b, x_stride_h, x_stride_n and 1, a row for each token
        Update            [rows, C] of strides update_stride and 1: added to X, times Gain [C] (GAIN) (RESIDUAL)
        Weight, Bias      [C]: of a LayerNorm (NORM, with WEIGHT and BIAS)
        Total             [rows, C] contiguous: the sum, in any dtype (RESIDUAL)
        Data, Scale       [rows, C] E4M3 and [rows] FP32, contiguous
        Infinities        [1] i64: the number of infinities is added to it (COUNT)

    ACTIVATION is of `ACTIVATIONS`. BLOCK is C up to a power of two. INTERPRETED: not compiled.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    live = lane < C
    at = X + row * x_stride_n
    entry = lane
    if HEAD_DIM != 0:
        at = X + (row // tokens) * x_stride_b + (row % tokens) * x_stride_n
        entry = (lane // HEAD_DIM) * x_stride_h + lane % HEAD_DIM
    x = tl.load(at + entry, mask=live, other=0.0).to(tl.float32)
    if RESIDUAL:
        update = tl.load(Update + row * update_stride + lane, mask=live, other=0.0).to(tl.float32)
        if GAIN:
            update *= tl.load(Gain + lane, mask=live, other=0.0).to(tl.float32)
        total = (x + update).to(Total.dtype.element_ty)
        tl.store(Total + row * C + lane, total, mask=live)
        x = total.to(tl.float32)
    if NORM:
        x = tl.where(live, x - tl.sum(x, 0) / C, 0.0)
        x *= tl.rsqrt(tl.sum(x * x, 0) / C + eps)
        if WEIGHT:
            x *= tl.load(Weight + lane, mask=live, other=0.0).to(tl.float32)
        if BIAS:
            x += tl.load(Bias + lane, mask=live, other=0.0).to(tl.float32)
    x = _activate(x, ACTIVATION)
    if ACTIVATION == 3:
        x *= tl.load(at + C + lane, mask=live, other=0.0).to(tl.float32)
    magnitude = tl.maximum(tl.abs(x), 0.0)  # NaN becomes 0
    amax = tl.max(magnitude, 0)
    if amax == float("inf"):  # rare, so the usual row pays for one reduction only
        finite = magnitude != float("inf")  # older interpreters of Triton leave NaN as it is: not to be counted
        amax = tl.max(tl.where(finite, magnitude, 0.0), 0)
        if COUNT:
            tl.atomic_add(Infinities, tl.sum(tl.where(finite, 0, 1), 0).to(tl.int64))
    amax = tl.maximum(amax, 1e-8)
    tl.store(Scale + row, amax / 448.0)
    tl.store(Data + row * C + lane, _to_e4m3(x * (448.0 / amax), INTERPRETED), mask=live)


def quantize(x: Tensor, infinities: Tensor | None = None) -> Quantized:
    """As `naive.quantize`, to E4M3."""
    return _pass(x, infinities=infinities)[0]


def layer_norm_quantize(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, infinities: Tensor | None = None) -> Quantized:
    """As `naive.layer_norm_quantize`."""
    return _pass(x, norm=(weight, bias, eps), infinities=infinities)[0]


def residual_norm_quantize(
    x: Tensor,
    update: Tensor,
    gain: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    infinities: Tensor | None = None,
) -> tuple[Tensor, Quantized]:
    """As `naive.residual_norm_quantize`."""
    rows, total = _pass(x, norm=(weight, bias, eps), residual=(update, gain), infinities=infinities)
    return total, rows._replace(dtype=total.dtype)


def gelu_quantize(x: Tensor, approximate: str = "none", infinities: Tensor | None = None) -> Quantized:
    """As `naive.gelu_quantize`."""
    return _pass(x, activation=approximate, infinities=infinities)[0]


def swiglu_quantize(x: Tensor, infinities: Tensor | None = None) -> Quantized:
    """As `naive.swiglu_quantize`."""
    return _pass(x, activation="swiglu", infinities=infinities)[0]


def heads_quantize(x: Tensor, infinities: Tensor | None = None) -> Quantized:
    """As `naive.heads_quantize`."""
    return _pass(x, heads=True, infinities=infinities)[0]


def warps(width: int) -> int:
    """Warps for a row of `width` entries: 32 entries a thread keep enough bytes in flight without a long reduction."""
    return min(16, max(1, power_of_2(width) // 1024))


def _pass(
    x: Tensor,
    *,
    norm: tuple[Tensor | None, Tensor | None, float] | None = None,
    residual: tuple[Tensor | None, Tensor | None] = (None, None),
    activation: str | None = None,
    heads: bool = False,
    infinities: Tensor | None = None,
) -> tuple[Quantized, Tensor]:
    """The quantised rows, and the sum that they were made of; where there is no residual, nothing of use."""
    weight, bias, eps = norm or (None, None, 0.0)
    arguments = (x, *residual, weight, bias, infinities, norm is not None, eps, activation, heads)
    data, scale, total = rows_operator(*arguments) if under_trace() else _launch_rows(*arguments)
    return Quantized(data, scale, x.dtype), x if total is None else total


def _launch_rows(
    x: Tensor, update: Tensor | None, gain: Tensor | None, weight: Tensor | None, bias: Tensor | None, infinities: Tensor | None,
    norm: bool, eps: float, activation: str | None, heads: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Data, scales and, with an `update`, the sum."""
    data, scale = _empty_rows(x, activation, heads)
    total = None if update is None else x.new_empty(x.shape, dtype=sum_dtype(x, update, gain))
    x = x if x.stride(-1) == 1 else x.contiguous()
    if heads:
        tokens, dim, strides = x.shape[2], x.shape[3], x.stride()[:3]
    else:
        x = x.reshape(-1, x.shape[-1])
        tokens, dim, strides = 1, 0, (0, 0, x.stride(0))
    width = data.shape[-1]
    if update is not None:
        update = update.reshape(-1, width)
        update = update if update.stride(-1) == 1 else update.contiguous()
    launch(
        _rows_kernel, (scale.numel(),),
        x, *(x if p is None else p for p in (update, gain, weight, bias)), x if total is None else total,
        data, scale, scale if infinities is None else infinities,
        tokens, *strides, 0 if update is None else update.stride(0), eps,
        C=width, BLOCK=power_of_2(width), HEAD_DIM=dim, RESIDUAL=update is not None, GAIN=gain is not None,
        NORM=norm, WEIGHT=weight is not None, BIAS=bias is not None, ACTIVATION=ACTIVATIONS[activation],
        COUNT=infinities is not None, INTERPRETED=not x.is_cuda, num_warps=warps(width),
    )  # fmt: skip
    return data, scale, total


def _empty_rows(x: Tensor, activation: str | None, heads: bool) -> tuple[Tensor, Tensor]:
    """Data and scales, to be filled."""
    if heads:
        batch, count, tokens, dim = x.shape
        shape = (batch, tokens, count * dim)
    else:
        shape = (*x.shape[:-1], x.shape[-1] // (2 if activation == "swiglu" else 1))
    return x.new_empty(shape, dtype=E4M3), x.new_empty(*shape[:-1], 1, dtype=torch.float32)


def _rows(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As `_launch_rows`, with an empty tensor in the place of no sum."""
    data, scale, total = _launch_rows(x, *others)
    return data, scale, x.new_empty(0) if total is None else total


def _empty(x: Tensor, update: Tensor | None, gain: Tensor | None, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors like those of `_rows`."""
    total = x.new_empty(0) if update is None else x.new_empty(x.shape, dtype=sum_dtype(x, update, gain))
    return *_empty_rows(x, *others[-2:]), total


rows_operator = register(
    "fp8_rows",
    "(Tensor x, Tensor? update, Tensor? gain, Tensor? weight, Tensor? bias, Tensor(a!)? infinities, bool norm, float eps, "
    "str? activation, bool heads) -> (Tensor, Tensor, Tensor)",
    _rows,
    _empty,
)


@triton.jit(do_not_specialize=["rows"])
def _scale_kernel(
    Out, RowScale, ColumnScale, Bias, rows, N, ROWS: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """ROWS rows and BLOCK columns of Out [rows, N] FP32, contiguous, times RowScale [rows] and ColumnScale [N], plus Bias [N] (BIAS);
    in place, programs [row blocks, column blocks]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = (row < rows)[:, None] & (column < N)[None, :]
    at = Out + row[:, None] * N + column[None, :]
    out = tl.load(at, mask=live, other=0.0)
    out = out * tl.load(RowScale + row, mask=row < rows, other=0.0)[:, None]
    out = out * tl.load(ColumnScale + column, mask=column < N, other=0.0)[None, :]
    if BIAS:
        out += tl.load(Bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    tl.store(at, out, mask=live)


def scale_products(products: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    """As `naive.scale_products`, into `products` itself where nothing is compiled."""
    if torch.compiler.is_compiling():  # one fused pass of the compiler's own
        return naive.scale_products(products, rows, columns, bias)
    (scale_operator if under_trace() else _scale)(products, rows, columns, bias)
    return products


def _scale(products: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None) -> None:
    _scale_products(products, rows, columns, bias)


scale_operator = register(
    "fp8_scale_products_", "(Tensor(a!) products, Tensor rows, Tensor columns, Tensor? bias) -> ()", _scale, lambda *_: None
)


def _scale_products(
    products: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, shape: tuple[int, int, int] = (2, 1024, 4)
) -> Tensor:
    """`shape`: rows and columns of a program, and its warps."""
    count, width = products.shape
    height, block, warp_count = shape
    launch(
        _scale_kernel, (cover(count, height), cover(width, block)),
        products, rows, columns, products if bias is None else bias, count, width,
        ROWS=height, BLOCK=block, BIAS=bias is not None, num_warps=warp_count,
    )  # fmt: skip
    return products


@triton.jit(do_not_specialize=["rows"])
def _residual_kernel(
    X, Update, Gain, Total, rows, x_stride, update_stride,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    """ROWS rows of X + Gain * Update, summed in FP32; a program for each.

    X, Update         [rows, C] of strides x_stride, update_stride and 1
    Gain              [C] (GAIN)
    Total             [rows, C] contiguous, in any dtype
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    live = (row < rows) & (lane < C)
    total = tl.load(Update + row * update_stride + lane, mask=live, other=0.0).to(tl.float32)
    if GAIN:
        total *= tl.load(Gain + lane, mask=lane < C, other=0.0).to(tl.float32)
    total += tl.load(X + row * x_stride + lane, mask=live, other=0.0).to(tl.float32)
    tl.store(Total + row * C + lane, total.to(Total.dtype.element_ty), mask=live)


def residual(x: Tensor, update: Tensor, gain: Tensor | None) -> Tensor:
    """As `naive.residual`."""
    return (residual_operator if under_trace() else _residual)(x, update, gain)


def _residual(x: Tensor, update: Tensor, gain: Tensor | None, shape: tuple[int, int] = (1, 1)) -> Tensor:
    """`shape`: rows of a program, and its warps."""
    width = x.shape[-1]
    height, warp_count = shape
    total = x.new_empty(x.shape, dtype=sum_dtype(x, update, gain))
    x, update = (t.reshape(-1, width) for t in (x, update))
    x, update = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, update))
    launch(
        _residual_kernel, (cover(len(x), height),),
        x, update, x if gain is None else gain, total, len(x), x.stride(0), update.stride(0),
        C=width, ROWS=height, BLOCK=power_of_2(width), GAIN=gain is not None, num_warps=warp_count,
    )  # fmt: skip
    return total


residual_operator = register(
    "residual",
    "(Tensor x, Tensor update, Tensor? gain) -> Tensor",
    lambda x, update, gain: _residual(x, update, gain),
    lambda x, update, gain: x.new_empty(x.shape, dtype=sum_dtype(x, update, gain)),
)
