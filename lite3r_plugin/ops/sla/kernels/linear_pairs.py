"""The linear branch over all tokens with a mask: what of it has no states.

The state of a query block is the sum of those of the key blocks that are wholly allowed (`marginal.py`). Keys of blocks that are partly
allowed are added to it pair by pair. With f = phi(q_i), g = phi(k_j), c the scale of the states and n the norm of the branch:

    numerator += c sum_j (f . g) (v_j - mu)      n += c sum_j (f . g)

and backward, with u = dO / n, a = c u Proj and b = -c (dO . (O_linear - mu Proj^T)) / n, for each pair that may be seen:

    df += (a . (v_j - mu) + b) g      dg += (a . (v_j - mu) + b) f      dv_j += (f . g) a
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...sizes import power_of_2
from .linear import phi, precision
from .operands import Operands
from .softmax import is_partly, is_seen, load_rows
from .softmax_backward import phi_backward


class Pairs(NamedTuple):
    """What pairs add to the branch.

    Attributes:
        numerator: ``[B * H, padded, D]`` in v's dtype.
        norm: ``[B * H, padded]`` FP32.
    """

    numerator: Tensor
    norm: Tensor


class PairGradients(NamedTuple):
    """What the gradients of pairs are made of, see the module's docstring; the pass over rows writes it.

    Attributes:
        u, a: ``[B * H, padded, D]`` in v's dtype.
        b: ``[B * H, padded]`` FP32.
        scales: ``[rows]`` FP32: c of each query block.
    """

    u: Tensor
    a: Tensor
    b: Tensor
    scales: Tensor

    @classmethod
    def empty(cls, operands: Operands) -> PairGradients:
        """With nothing written but `scales`."""
        batch, heads, padded, dim = operands.q.shape
        u, a = (torch.empty(batch * heads, padded, dim, device=operands.q.device, dtype=operands.v.dtype) for _ in range(2))
        b = torch.empty(batch * heads, padded, device=operands.q.device, dtype=torch.float32)
        assert operands.mask is not None
        return cls(u, a, b, operands.mask.scales / operands.block_k)


@triton.jit(do_not_specialize=["rows", "columns"])
def _pairs_kernel(
    Q, K, V, Mu, Mask, Numerator, Norm, rows, columns, padded,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`Pairs` of TILE_Q queries, of values less Mu unless it is None; programs [tiles of query blocks, B * H].

        Q, Numerator        [B * H, rows * BLOCK_Q, D]
        K, V                [B * H, padded, D]
        Mu                  [B * H, D] FP32, or None
        Mask                a `KernelMask`
        Norm                [B * H, rows * BLOCK_Q] FP32

    All are contiguous.
    """
    STEPS: tl.constexpr = BLOCK_K // TILE_K
    dtype: tl.constexpr = V.dtype.element_ty
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) // (BLOCK_Q // TILE_Q)
    n = tl.program_id(0) * TILE_Q + tl.arange(0, TILE_Q)
    lanes = tl.arange(0, TILE_K)
    d = tl.arange(0, DP)
    live = d < D
    at = head * rows * BLOCK_Q + n
    q = phi(load_rows(Q, at, d, D).to(tl.float32), live[None, :], SOFTMAX, 1).to(dtype)
    total = tl.zeros([TILE_Q], tl.float32)
    acc = tl.zeros([TILE_Q, DP], tl.float32)
    for i in range(tl.load(Mask.partly + row) * STEPS, tl.load(Mask.partly + rows + row) * STEPS):
        if is_partly(Mask, row, i // STEPS, columns):
            key = i * TILE_K + lanes
            k = phi(load_rows(K, head * padded + key, d, D).to(tl.float32), live[None, :], SOFTMAX, 1)
            weights = tl.dot(q, tl.trans(k.to(dtype)), input_precision=PRECISION)
            weights = tl.where(is_seen(Mask, n, key, False), weights, 0.0)
            total += tl.sum(weights, 1)
            acc = tl.dot(weights.to(dtype), load_rows(V, head * padded + key, d, D), acc, input_precision=PRECISION)
    if Mu is not None:
        acc -= total[:, None] * tl.load(Mu + head * D + d, mask=live, other=0.0)[None, :]
    scale = tl.load(Mask.scales + row) / BLOCK_K
    tl.store(Numerator + at[:, None] * D + d[None, :], (acc * scale).to(dtype), mask=live[None, :])
    tl.store(Norm + at, total * scale)


@triton.jit(do_not_specialize=["rows", "columns"])
def _pairs_dq_kernel(
    Q, K, V, Mu, Mask, A, B, DQ, rows, columns, padded,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to DQ the gradient of TILE_Q queries by way of their pairs; programs [tiles of query blocks, B * H].

    A and DQ ``[B * H, rows * BLOCK_Q, D]`` and B ``[B * H, rows * BLOCK_Q]``, see `PairGradients`; the rest as in `_pairs_kernel`.
    """
    STEPS: tl.constexpr = BLOCK_K // TILE_K
    dtype: tl.constexpr = V.dtype.element_ty
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) // (BLOCK_Q // TILE_Q)
    n = tl.program_id(0) * TILE_Q + tl.arange(0, TILE_Q)
    lanes = tl.arange(0, TILE_K)
    d = tl.arange(0, DP)
    live = d < D
    at = head * rows * BLOCK_Q + n
    features = phi(load_rows(Q, at, d, D).to(tl.float32), live[None, :], SOFTMAX, 1)
    a = load_rows(A, at, d, D)
    b = tl.load(B + at)
    mu = tl.load(Mu + head * D + d, mask=live, other=0.0)[None, :]
    grad = tl.zeros([TILE_Q, DP], tl.float32)
    for i in range(tl.load(Mask.partly + row) * STEPS, tl.load(Mask.partly + rows + row) * STEPS):
        if is_partly(Mask, row, i // STEPS, columns):
            key = i * TILE_K + lanes
            k = phi(load_rows(K, head * padded + key, d, D).to(tl.float32), live[None, :], SOFTMAX, 1).to(dtype)
            v = (load_rows(V, head * padded + key, d, D).to(tl.float32) - mu).to(dtype)
            dp = tl.dot(a, tl.trans(v), input_precision=PRECISION) + b[:, None]
            dp = tl.where(is_seen(Mask, n, key, False), dp, 0.0)
            grad = tl.dot(dp.to(dtype), k, grad, input_precision=PRECISION)
    to = DQ + at[:, None] * D + d[None, :]
    share = tl.load(to, mask=live[None, :], other=0.0).to(tl.float32)
    tl.store(to, (share + phi_backward(features, grad, SOFTMAX)).to(DQ.dtype.element_ty), mask=live[None, :])


@triton.jit(do_not_specialize=["rows", "columns"])
def _pairs_dkv_kernel(
    Q, K, V, Mu, Mask, A, B, DK, DV, rows, columns, padded,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of TILE_K keys and values by way of their pairs; programs [tiles of key blocks, B * H].

    DK and DV are ``[B * H, padded, D]`` FP32; the rest as in `_pairs_dq_kernel`.
    """
    STEPS: tl.constexpr = BLOCK_Q // TILE_Q
    dtype: tl.constexpr = V.dtype.element_ty
    head = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) // (BLOCK_K // TILE_K)
    key = tl.program_id(0) * TILE_K + tl.arange(0, TILE_K)
    lanes = tl.arange(0, TILE_Q)
    d = tl.arange(0, DP)
    live = d < D
    features = phi(load_rows(K, head * padded + key, d, D).to(tl.float32), live[None, :], SOFTMAX, 1)
    k = features.to(dtype)
    mu = tl.load(Mu + head * D + d, mask=live, other=0.0)[None, :]
    v = (load_rows(V, head * padded + key, d, D).to(tl.float32) - mu).to(dtype)
    dk = tl.zeros([TILE_K, DP], tl.float32)
    dv = tl.zeros([TILE_K, DP], tl.float32)
    for i in range(tl.load(Mask.partly_rows + column) * STEPS, tl.load(Mask.partly_rows + columns + column) * STEPS):
        if is_partly(Mask, i // STEPS, column, columns):
            n = i * TILE_Q + lanes
            at = head * rows * BLOCK_Q + n
            q = phi(load_rows(Q, at, d, D).to(tl.float32), live[None, :], SOFTMAX, 1).to(dtype)
            a = load_rows(A, at, d, D)
            seen = is_seen(Mask, n, key, True)
            weights = tl.where(seen, tl.dot(k, tl.trans(q), input_precision=PRECISION), 0.0)
            dv = tl.dot(weights.to(dtype), a, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(a), input_precision=PRECISION) + tl.load(B + at)[None, :]
            dk = tl.dot(tl.where(seen, dp, 0.0).to(dtype), q, dk, input_precision=PRECISION)
    to = (head * padded + key)[:, None] * D + d[None, :]
    tl.store(DK + to, phi_backward(features, dk, SOFTMAX), mask=live[None, :])
    tl.store(DV + to, dv, mask=live[None, :])


def pairs_of(operands: Operands, mu: Tensor | None) -> Pairs:
    """The pairs of a call, of values less `mu` ``[B * H, D]``."""
    batch, heads, padded, dim = operands.q.shape
    numerator = torch.empty(batch * heads, padded, dim, device=operands.q.device, dtype=operands.v.dtype)
    norm = torch.empty(batch * heads, padded, device=operands.q.device, dtype=torch.float32)
    _launch(_pairs_kernel, operands, *_query_tiles(operands), mu, numerator, norm)
    return Pairs(numerator, norm)


def add_query_gradient(operands: Operands, mu: Tensor, grads: PairGradients, dq: Tensor) -> None:
    """Add to `dq` ``[B, H, padded, D]`` what goes by way of pairs."""
    _launch(_pairs_dq_kernel, operands, *_query_tiles(operands), mu, grads.a, grads.b, dq)


def key_gradients(operands: Operands, mu: Tensor, grads: PairGradients) -> tuple[Tensor, Tensor]:
    """Of keys and values, by way of pairs: ``[B * H, padded, D]`` FP32, of whole key blocks."""
    batch, heads, padded, dim = operands.k.shape
    dk, dv = torch.empty(2, batch * heads, padded, dim, device=operands.q.device, dtype=torch.float32)
    tiles = operands.block_k // pairs_options(operands)["TILE_K"]
    _launch(_pairs_dkv_kernel, operands, operands.columns, tiles, mu, grads.a, grads.b, dk, dv)
    return dk, dv


def _launch(kernel: triton.JITFunction, operands: Operands, blocks: int, tiles: int, mu: Tensor | None, *tensors: Tensor) -> None:
    """For `tiles` tiles of each of `blocks` blocks, of queries or of keys."""
    dim = operands.q.shape[-1]
    kernel[(blocks * tiles, operands.q.shape[0] * operands.q.shape[1])](
        operands.q, operands.k, operands.v, mu, operands.mask, *tensors, operands.rows, operands.columns, operands.k.shape[2],
        D=dim, DP=power_of_2(dim), BLOCK_Q=operands.block_q, BLOCK_K=operands.block_k, SOFTMAX=operands.feature_map == "softmax",
        PRECISION=precision(operands.q), **pairs_options(operands),
    )  # fmt: skip


def _query_tiles(operands: Operands) -> tuple[int, int]:
    return operands.rows, operands.block_q // pairs_options(operands)["TILE_Q"]


def pairs_options(operands: Operands) -> dict[str, int]:
    """Tiles, warps and pipeline stages of the kernels of pairs."""
    largest = 32 if operands.q.dtype == torch.float32 else 64
    return dict(TILE_Q=min(operands.block_q, largest), TILE_K=min(operands.block_k, largest), num_warps=4, num_stages=1)
