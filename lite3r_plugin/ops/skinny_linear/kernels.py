"""Triton twin of `naive`: the weight is read once, at the speed of memory, whatever the rows are.

Sums are made in one order for given sizes, so results are the same bits in every call. Up to `LANES_ROWS` rows, a thread holds four
consecutive inputs of some rows of the weight and multiplies them by those of all rows of x; what its warp and its program have summed meets
once, at the end. More rows are a product of blocks whose inputs are split over programs, as few outputs would leave most of a GPU idle,
and a second launch adds up the parts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sizes import cover, power_of_2

LANES_ROWS = 8


@triton.jit(do_not_specialize=["M"])
def _lanes_kernel(
    X, W, Bias, Out, M, N, x_stride, w_stride,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of all M <= ROWS rows; a program for each.

    X         [M, K] of strides x_stride and 1
    W         [N, K] of strides w_stride and 1
    Bias      [N] (BIAS)
    Out       [M, N] contiguous
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :, None]
    m = tl.arange(0, ROWS)[:, None, None]
    k = tl.arange(0, BLOCK_K)[None, None, :]
    x_at = X + m * x_stride + k
    w_at = W + n.to(tl.int64) * w_stride + k
    total = tl.zeros([ROWS, BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        live = start + k < K if K % BLOCK_K else k >= 0
        w = tl.load(w_at, mask=(n < N) & live, other=0.0)
        x = tl.load(x_at, mask=(m < M) & live, other=0.0)
        total += x * w
        x_at += BLOCK_K
        w_at += BLOCK_K
    out = tl.sum(total, 2)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    m = tl.arange(0, ROWS)[:, None]
    if BIAS:
        out += tl.load(Bias + n, mask=n < N, other=0.0)
    tl.store(Out + m * N + n, out, mask=(m < M) & (n < N))


@triton.jit(do_not_specialize=["M"])
def _blocks_kernel(
    X, W, Parts, M, N, x_stride, w_stride,
    K: tl.constexpr, PART: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sum over PART inputs of BLOCK_N outputs of BLOCK_M rows; programs [output blocks, parts, row blocks].

    X         [M, K] of strides x_stride and 1
    W         [N, K] of strides w_stride and 1
    Parts     [parts, M, N] contiguous
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * PART
    k = first + tl.arange(0, BLOCK_K)
    x_at = X + m[None, :] * x_stride + k[:, None]
    w_at = W + n.to(tl.int64)[:, None] * w_stride + k[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in tl.range(0, PART, BLOCK_K, num_stages=STAGES):
        if K % PART == 0:
            w = tl.load(w_at, mask=(n < N)[:, None], other=0.0)
            x = tl.load(x_at, mask=(m < M)[None, :], other=0.0)
        else:
            w = tl.load(w_at, mask=(n < N)[:, None] & (start + k < K)[None, :], other=0.0)
            x = tl.load(x_at, mask=(m < M)[None, :] & (start + k < K)[:, None], other=0.0)
        total = tl.dot(w, x, total, input_precision="ieee")
        x_at += BLOCK_K
        w_at += BLOCK_K
    at = Parts + (tl.program_id(1).to(tl.int64) * M + m[None, :]) * N + n[:, None]
    tl.store(at, total, mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit(do_not_specialize=["size", "N"])
def _sum_kernel(Parts, Bias, Out, size, N, PARTS: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr):
    """BLOCK entries of the sum over the first dimension of Parts [PARTS, size], plus Bias [N] where BIAS, into Out [size]."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = entry < size
    total = tl.load(Parts + entry, mask=live, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(Parts + part * size + entry, mask=live, other=0.0)
    if BIAS:
        total += tl.load(Bias + entry % N, mask=live, other=0.0)
    tl.store(Out + entry, total, mask=live)


class Launch(NamedTuple):
    """How a product is launched.

    Attributes:
        block_n: Outputs of a program.
        block_k: Inputs of a step.
        warps: Of a program.
        block_m: Rows of a program; 0: all of them, in the kernel of lanes.
        parts: Into how many the inputs are split, in the kernel of blocks.
        stages: Of its loads.
    """

    block_n: int
    block_k: int
    warps: int
    block_m: int = 0
    parts: int = 1
    stages: int = 3


def launch_of(rows: int, outputs: int, inputs: int) -> Launch:
    """What is fastest on an H200 for these sizes (benchmarks/operators/bench_small.py)."""
    if rows <= LANES_ROWS:
        return Launch(block_n=4, block_k=512, warps=4)
    block_m = min(64, max(16, power_of_2(rows)))
    parts = max(1, min(inputs // 128, 512 // cover(outputs, 64)))
    return Launch(block_n=64, block_k=32, warps=4, block_m=block_m, parts=parts)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, launch: Launch | None = None) -> Tensor:
    """As `naive.linear`, FP32 alone, of at least one row; `launch`: for benchmarks."""
    outputs, inputs = weight.shape
    rows = x.reshape(-1, inputs)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    count = len(rows)
    launch = launch or launch_of(count, outputs, inputs)
    out = torch.empty(*x.shape[:-1], outputs, device=x.device, dtype=torch.float32)
    nothing = out if bias is None else bias
    blocks = cover(outputs, launch.block_n)
    if not launch.block_m:
        _lanes_kernel[(blocks,)](
            rows, weight, nothing, out, count, outputs, rows.stride(0), weight.stride(0),
            K=inputs, ROWS=power_of_2(count), BLOCK_N=launch.block_n, BLOCK_K=launch.block_k, BIAS=bias is not None,
            num_warps=launch.warps,
        )  # fmt: skip
        return out
    part = cover(cover(inputs, launch.parts), launch.block_k) * launch.block_k
    parts = cover(inputs, part)
    sums = torch.empty(parts, count, outputs, device=x.device, dtype=torch.float32)
    _blocks_kernel[(blocks, parts, cover(count, launch.block_m))](
        rows, weight, sums, count, outputs, rows.stride(0), weight.stride(0),
        K=inputs, PART=part, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k, STAGES=launch.stages,
        num_warps=launch.warps,
    )  # fmt: skip
    size = count * outputs
    _sum_kernel[(cover(size, 512),)](sums, nothing, out, size, outputs, PARTS=parts, BLOCK=512, BIAS=bias is not None, num_warps=4)
    return out
