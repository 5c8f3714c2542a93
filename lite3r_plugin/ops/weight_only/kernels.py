"""Triton twin of `naive`: a matrix product that reads the weight in FP8 and never stores it in another dtype.

The codes are taken apart with integer operations, because GPUs before compute capability 8.9 convert no FP8: an E4M3
code, shifted, is the FP16 number of 2^-8 times its value, subnormal numbers included. The factor goes into the scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fp8 import Quantized
from ..launch import launch
from ..sizes import cover, power_of_2


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    X, W, Scale, Bias, Out, M, N, K, x_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows and BLOCK_N columns of X W^T; a program for each, in one dimension.

    X         [M, K] of strides x_stride and 1
    W         [N, K] u8 contiguous: E4M3 codes
    Scale     [N] FP32
    Bias      [N] (BIAS)
    Out       [M, N] contiguous
    """
    # Programs that run together share columns of the weight and rows of x in the L2 cache.
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    first = program // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    inside = program % (GROUP * columns)
    m = (first + inside % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = inside // height * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_at = X + m.to(tl.int64)[:, None] * x_stride + k[None, :]
    w_at = W + n.to(tl.int64)[:, None] * K + k[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_at, mask=(m < M)[:, None] & (start + k < K)[None, :], other=0.0)
        code = tl.load(w_at, mask=(n < N)[:, None] & (start + k < K)[None, :], other=0).to(tl.uint16)
        w = (((code & 0x80) << 8) | ((code & 0x7F) << 7)).to(tl.float16, bitcast=True).to(x.dtype)
        # The weight is the left operand: that one may stay in registers, where it was just made.
        total = tl.dot(w, tl.trans(x), total, input_precision=PRECISION)
        x_at += BLOCK_K
        w_at += BLOCK_K
    total *= tl.load(Scale + n, mask=n < N, other=0.0)[:, None] * 256.0
    if BIAS:
        total += tl.load(Bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    out_at = Out + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_at, tl.trans(total).to(Out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def launch_options(rows: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes for `rows` rows of x; few rows need narrow tiles, FP32 needs short ones to fit into shared memory."""
    block_m = min(128, max(16, power_of_2(rows)))
    block_k = 32 if dtype == torch.float32 else 64
    return dict(BLOCK_M=block_m, BLOCK_N=128, BLOCK_K=block_k, GROUP=8, num_warps=8 if block_m == 128 else 4, num_stages=3)


def linear(x: Tensor, weight: Quantized, bias: Tensor | None) -> Tensor:
    """As `naive.linear`; FP32 x is rounded to TF32."""
    outputs, inputs = weight.data.shape
    rows = x.reshape(-1, inputs)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    out = torch.empty(*x.shape[:-1], outputs, device=x.device, dtype=x.dtype)
    options = launch_options(len(rows), x.dtype)
    grid = (cover(len(rows), options["BLOCK_M"]) * cover(outputs, options["BLOCK_N"]),)
    launch(
        _linear_kernel, grid,
        rows, weight.data.view(torch.uint8), weight.scale, weight.scale if bias is None else bias, out,
        len(rows), outputs, inputs, rows.stride(0), BIAS=bias is not None, PRECISION="tf32" if x.is_cuda else "ieee", **options,
    )  # fmt: skip
    return out
