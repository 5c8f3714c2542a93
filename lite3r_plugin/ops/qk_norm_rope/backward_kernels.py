"""Gradients of the pass before attention: one pass that rotates back, puts back in host order and undoes the norm.

With y = x_hat w + b the norm's output and g its gradient after the rotation is undone:

    dw = sum g x_hat      db = sum g      dx = (g w - mean(g w) - x_hat mean(g w x_hat)) / deviation

where the RMS norm has no mean(g w). Programs and halves of a head are as in `kernels`; there is a launch for each tensor.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sizes import power_of_2
from .kernels import NORMS, broadcast_stride, norm_affine, rotation
from .naive import HeadNorm


class InputGradient(NamedTuple):
    """Gradient of one of q, k, v ``[B, H, N, D]`` in its dtype; those of its norm's weight and bias ``[D]`` FP32, or None."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None


@triton.jit(do_not_specialize=["N", "p_stride_b", "p_stride_n", "p_stride_c"])
def _undo_kernel(
    X, G, DX, W, DAffine, Order, Positions,
    x_stride_b, x_stride_h, x_stride_n, g_stride_b, g_stride_h, g_stride_n, p_stride_b, p_stride_n, p_stride_c,
    N, H, log2_base, eps,
    D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
    NORM: tl.constexpr, ROPE: tl.constexpr, ORDERED: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """Gradient of one input of the pass, for ROWS tokens of HEADS heads; programs [token blocks, groups of heads, B].

        X                [B, H, N, D] in host order, of strides x_stride_b, x_stride_h, x_stride_n and 1: the input (NORM)
        G                [B, H, at least N, D] in token order, of strides g_stride_b, g_stride_h, g_stride_n and 1: the output's gradient
        DX               [B, N, H, D] contiguous, in host order: its gradient, in any dtype
        W                [D]: the norm's weight (NORM)
        DAffine          [programs, 2, D] FP32: sums for the gradients of the norm's weight and bias (AFFINE)
        Order            [N]: the host row of each token (ORDERED)
        Positions        [B, N, 2] of strides p_stride_b, p_stride_n, p_stride_c (ROPE)

    `log2_base` is log2 of the base of the rotary frequencies; HALF is D / 2 up to a power of two; NORM: 0 none, 1 layer, 2 RMS.
    """
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < N
    source = rows
    if ORDERED:
        source = tl.load(Order + rows, mask=live, other=0)
    source = source.to(tl.int64)
    lane = tl.arange(0, HALF)
    live_lane = lane < D // 2
    lanes1 = (lane // (D // 4)) * (D // 2) + lane % (D // 4)
    lanes2 = lanes1 + D // 4
    inside = live[:, None] & live_lane[None, :]
    if ROPE:
        cos, sin = rotation(Positions + batch * p_stride_b + source * p_stride_n, p_stride_c, live, lane, log2_base, D)
    if AFFINE:
        dw1 = tl.zeros([HALF], tl.float32)
        dw2 = dw1
        db1 = dw1
        db2 = dw1
    for i in range(HEADS):
        head = (tl.program_id(1) * HEADS + i).to(tl.int64)
        at = G + batch * g_stride_b + head * g_stride_h + rows.to(tl.int64)[:, None] * g_stride_n
        g1 = tl.load(at + lanes1[None, :], mask=inside, other=0.0).to(tl.float32)
        g2 = tl.load(at + lanes2[None, :], mask=inside, other=0.0).to(tl.float32)
        if ROPE:
            rotated_back = g1 * cos + g2 * sin
            g2 = g2 * cos - g1 * sin
            g1 = rotated_back
        if NORM != 0:
            at = X + batch * x_stride_b + head * x_stride_h + source[:, None] * x_stride_n
            x1 = tl.load(at + lanes1[None, :], mask=inside, other=0.0).to(tl.float32)
            x2 = tl.load(at + lanes2[None, :], mask=inside, other=0.0).to(tl.float32)
            if NORM == 1:
                mean = (tl.sum(x1, 1) + tl.sum(x2, 1)) / D
                x1 = tl.where(inside, x1 - mean[:, None], 0.0)
                x2 = tl.where(inside, x2 - mean[:, None], 0.0)
            scale = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / D + eps)
            scale = tl.where(live, scale, 0.0)[:, None]
            x1 *= scale
            x2 *= scale
            if AFFINE:
                dw1 += tl.sum(g1 * x1, 0)
                dw2 += tl.sum(g2 * x2, 0)
                db1 += tl.sum(g1, 0)
                db2 += tl.sum(g2, 0)
            g1 *= tl.load(W + lanes1, mask=live_lane, other=0.0).to(tl.float32)[None, :]
            g2 *= tl.load(W + lanes2, mask=live_lane, other=0.0).to(tl.float32)[None, :]
            along = ((tl.sum(g1 * x1, 1) + tl.sum(g2 * x2, 1)) / D)[:, None]
            if NORM == 1:
                mean = (tl.sum(g1, 1) + tl.sum(g2, 1)) / D
                g1 -= mean[:, None]
                g2 -= mean[:, None]
            g1 = (g1 - x1 * along) * scale
            g2 = (g2 - x2 * along) * scale
        to = DX + ((batch * N + source) * H + head)[:, None] * D  # [B, N, H, D]
        tl.store(to + lanes1[None, :], g1.to(DX.dtype.element_ty), mask=inside)
        tl.store(to + lanes2[None, :], g2.to(DX.dtype.element_ty), mask=inside)
    if AFFINE:
        program = (batch * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
        to = DAffine + program * 2 * D
        tl.store(to + lanes1, dw1, mask=live_lane)
        tl.store(to + lanes2, dw2, mask=live_lane)
        tl.store(to + D + lanes1, db1, mask=live_lane)
        tl.store(to + D + lanes2, db2, mask=live_lane)


def input_gradient(
    x: Tensor,
    grad: Tensor,
    *,
    order: Tensor | None = None,
    norm: HeadNorm | None = None,
    positions: Tensor | None = None,
    rope_base: float | None = None,
    affine: bool = False,
) -> InputGradient:
    """Gradient of one input of `prepare_qkv` or `norm_rope`, from that of its output.

    Args:
        x: ``[B, H, N, D]`` q, k or v, any strides.
        grad: ``[B, H, at least N, D]``, the gradient in token order; those of the means are already in it.
        order, norm, positions, rope_base: What was done to `x`.
        affine: Whether the gradients of the norm's weight and bias are wanted.

    Returns:
        The gradient of `x` as a view of ``[B, N, H, D]``; that of an RMS norm's bias, which is not added, is zero.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    batch, heads, tokens, dim = x.shape
    rows = 64 if dim <= 64 else 32
    blocks = -(-tokens // rows)
    rope = positions is not None and rope_base is not None
    norm = norm or HeadNorm(None, None, None, 0.0)
    affine = affine and norm.kind is not None
    per_program = next(n for n in (4, 2, 1) if heads % n == 0)
    out = torch.empty(batch, tokens, heads, dim, device=x.device, dtype=x.dtype)
    daffine = torch.empty(batch * heads // per_program * blocks, 2, dim, device=x.device) if affine else out
    weight = norm_affine(norm, dim, x.device)[0]
    _undo_kernel[(blocks, heads // per_program, batch)](
        x, grad, out, out if weight is None else weight, daffine, out if order is None else order, positions if rope else out,
        *x.stride()[:3], *grad.stride()[:3], *((broadcast_stride(positions, batch), *positions.stride()[1:]) if rope else (0, 0, 0)),
        tokens, heads, math.log2(rope_base) if rope else 0.0, norm.eps,
        D=dim, HALF=power_of_2(dim // 2), ROWS=rows, HEADS=per_program,
        NORM=NORMS[norm.kind], ROPE=rope, ORDERED=order is not None, AFFINE=affine, num_warps=4,
    )  # fmt: skip
    dweight, dbias = daffine.sum(0) if affine else (None, None)
    if dbias is not None and norm.kind == "rms":  # which adds no bias
        dbias = torch.zeros_like(dbias)
    return InputGradient(out.transpose(1, 2), dweight, dbias)
