"""Triton twin of `naive`: the weight is read once for every `GROUP` rows, at the speed of memory, whatever the rows are.

Sums are made in one order for given sizes, so results are the same bits in every call. A thread holds four consecutive inputs of some rows
of the weight and multiplies them by those of all rows of x; what its warp and its program have summed meets once, at the end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..sizes import cover, power_of_2

GROUP = 8  # rows of a program at most: more would not fit into registers


@triton.jit(do_not_specialize=["M", "groups"])
def _linear_kernel(
    X, W, Bias, Out, M, groups, N, x_stride, w_stride,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of ROWS rows; a program for each. Those of all groups of rows follow each other, and find the weight in the cache.

    X         [M, K] of strides x_stride and 1
    W         [N, K] of strides w_stride and 1, in FP32 or less
    Bias      [N] (BIAS)
    Out       [M, N] contiguous
    """
    first_n = tl.program_id(0) // groups * BLOCK_N
    first_m = tl.program_id(0) % groups * ROWS
    n = first_n + tl.arange(0, BLOCK_N)[None, :, None]
    m = first_m + tl.arange(0, ROWS)[:, None, None]
    k = tl.arange(0, BLOCK_K)[None, None, :]
    x_at = X + m * x_stride + k
    w_at = W + n.to(tl.int64) * w_stride + k
    total = tl.zeros([ROWS, BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        live = start + k < K if K % BLOCK_K else k >= 0
        w = tl.load(w_at, mask=(n < N) & live, other=0.0).to(tl.float32)
        x = tl.load(x_at, mask=(m < M) & live, other=0.0)
        total += x * w
        x_at += BLOCK_K
        w_at += BLOCK_K
    out = tl.sum(total, 2)
    n = first_n + tl.arange(0, BLOCK_N)[None, :]
    m = first_m + tl.arange(0, ROWS)[:, None]
    if BIAS:
        out += tl.load(Bias + n, mask=n < N, other=0.0)
    tl.store(Out + m * N + n, out, mask=(m < M) & (n < N))


class Launch(NamedTuple):
    """How a product is launched.

    Attributes:
        block_n: Outputs of a program.
        block_k: Inputs of a step.
        warps: Of a program.
    """

    block_n: int
    block_k: int
    warps: int


LAUNCH = Launch(block_n=4, block_k=512, warps=4)  # benchmarks/operators/small_passes.py tries others


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, shape: Launch = LAUNCH) -> Tensor:
    """As `naive.linear`, in FP32, of at least one row; `shape`: for benchmarks."""
    outputs, inputs = weight.shape
    rows = x.reshape(-1, inputs)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    count = len(rows)
    group = min(power_of_2(count), GROUP)
    groups = cover(count, group)
    out = torch.empty(*x.shape[:-1], outputs, device=x.device, dtype=torch.float32)
    launch(
        _linear_kernel, (cover(outputs, shape.block_n) * groups,),
        rows, weight, out if bias is None else bias.contiguous(), out, count, groups, outputs, rows.stride(0), weight.stride(0),
        K=inputs, ROWS=group, BLOCK_N=shape.block_n, BLOCK_K=shape.block_k, BIAS=bias is not None, num_warps=shape.warps,
    )  # fmt: skip
    return out
