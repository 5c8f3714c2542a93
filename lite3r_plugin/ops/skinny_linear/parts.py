"""A Linear in FP32 by a weight in BF16 on BF16 matrix units: nothing is lost, and the weight is read once, as it is stored.

A number in FP32 has 24 digits, BF16 has 8: it is the sum of three numbers in BF16, without a rounding. Products of BF16 are exact in FP32,
in which matrix units sum them: with an error of 2e-6 on an H200, where cuBLAS in FP32 has 4e-7. The idea is that of products in FP32 from
narrower ones (Henry, Tang and Heinecke, arXiv 1904.06376); three are enough where the weight is narrow already.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import register

_UPPER = -65536  # of the 32 bits of a number those that BF16 has


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `naive.linear`, of `x` ``[..., C]`` in FP32 and a finite `weight` in BF16: of an infinite one the result is NaN.

    A compiler may fuse what is before and after the product.
    """
    outputs, inputs = weight.shape
    parts = in_parts(x.reshape(-1, inputs))
    products = (products_operator if torch.compiler.is_compiling() else _products)(parts, weight)
    high, middle, low = products.chunk(3)
    out = low + middle + high
    return (out if bias is None else out + bias).view(*x.shape[:-1], outputs)


def in_parts(x: Tensor) -> Tensor:
    """``[rows, C]`` in FP32 as ``[3 rows, C]`` in BF16: numbers whose sum is that of x, the largest first; infinities are in the first.
    Of numbers below 1e-33 the last digits are lost, where BF16 has no smaller ones.

    The digits are cut, and not rounded: compilers leave out what only rounds (BF16 and back), and what is cut is in BF16 already.
    """
    high = _cut(x)
    rest = torch.where(x == high, 0.0, x - high)  # infinity less itself is no number
    middle = _cut(rest)
    return torch.cat((high, middle, rest - middle)).to(torch.bfloat16)


def _cut(x: Tensor) -> Tensor:
    return (x.view(torch.int32) & _UPPER).view(torch.float32)


def _products(x: Tensor, weight: Tensor) -> Tensor:
    """``x weight^T`` of BF16 in FP32."""
    if x.is_cuda:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return x.float() @ weight.float().t()


products_operator = register(
    "products_in_fp32", "(Tensor x, Tensor weight) -> Tensor", _products,
    lambda x, weight: x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32),  # not len(x), which would fix the rows
)  # fmt: skip
