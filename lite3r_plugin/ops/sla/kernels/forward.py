"""Triton twin of `naive`: one kernel for the sparse softmax, the block means and the linear branch.

A program holds one query block, or a tile of it, and streams its critical key blocks through a softmax (`softmax_kernels.py`)
whose reference is fixed. A second launch runs those tiles again, online, whose sums came near to an overflow: mostly none. q, k, v
come padded with zeros to whole query blocks, so only the scores of the last key block are masked. Programs of pinned query
blocks, which stream all keys, start first: they take longest.

The linear branch needs a D x D state: over all tokens one for each head (`linear_kernels.py`), over marginal blocks one for
each query block (`marginal_kernels.py`). Proj is folded into it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .linear_kernels import LOG2_E, _phi, _precision, linear_state
from .marginal_kernels import marginal_states
from .softmax_kernels import LARGEST_SUM, attend, far_blocks, host_rows, load_rows, places

LINEAR = {"none": 0, "all": 1, "marginal": 2}


class Residuals(NamedTuple):
    """What a backward pass needs of a forward pass.

    Attributes:
        lse: ``[B, H, padded]`` FP32, base-2 logarithm of the softmax denominator of each ordered query; None unless asked for.
        linear: ``[B, N, H, D]``, the linear branch before Proj in host order; None unless asked for.
        state, total: The linear state over all tokens, divided by their number; over marginal blocks the states of all query
            blocks, of values less `mu`, as `marginal_states` returns them. None without a linear branch.
        mu: ``[B * H, D]`` FP32: what values are centred on in states of query blocks.
    """

    lse: Tensor | None = None
    linear: Tensor | None = None
    state: Tensor | None = None
    total: Tensor | None = None
    mu: Tensor | None = None


# Sizes must not specialise the kernel: any number of views and any image size run the same binary.
@triton.jit(do_not_specialize=["N", "rows", "columns", "kept", "far_rows", "words", "pinned"])
def _sparse_linear_kernel(
    Q, K, V, Indices, AllIndices, Bits, KFar, VFar, State, Total, Mu, Proj, Order, Out, Lse, Linear, Failed,
    N, padded, heads, rows, columns, kept, far_rows, words, pinned, scale_log2,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    LINEAR: tl.constexpr, SOFTMAX: tl.constexpr, CENTRED: tl.constexpr, MEANS: tl.constexpr, ORDERED: tl.constexpr,
    SAVE_LSE: tl.constexpr, SAVE_LINEAR: tl.constexpr, FIXED: tl.constexpr, AGAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if AGAIN:  # noqa: SIM102 (decided when it is compiled; what follows, on the GPU)
        if tl.load(Failed + tl.program_id(0)) == 0:
            return
    TILES: tl.constexpr = BLOCK_Q // TILE_Q
    pid = tl.program_id(0) // TILES
    programs = tl.num_programs(0) // TILES // rows * pinned  # those of pinned query blocks come first
    if pid < programs:
        head = (pid // pinned).to(tl.int64)
        row = pid % pinned
        near = columns
    else:
        head = ((pid - programs) // (rows - pinned)).to(tl.int64)
        row = pinned + (pid - programs) % (rows - pinned)
        near = kept
    d = tl.arange(0, DP)
    live = d < D
    n = row * BLOCK_Q + tl.program_id(0) % TILES * TILE_Q + tl.arange(0, TILE_Q)
    dtype: tl.constexpr = V.dtype.element_ty
    keys = K + head * padded * D
    values = V + head * padded * D
    queries = Q + head * padded * D
    chosen = Indices + (head * rows + row) * kept
    if row < pinned:
        chosen = AllIndices
    q = load_rows(queries, n, d, D)
    k_means = KFar
    v_means = VFar
    bits = Bits
    far = 0
    if MEANS:
        k_means = KFar + head * far_rows * D
        v_means = VFar + head * far_rows * D
        bits = Bits + (head * rows + row) * words
        far = tl.where(near < columns, far_rows, 0)
    acc, weight, top = attend(
        q, keys, values, chosen, near, k_means, v_means, bits, far, N, columns, words, scale_log2, d,
        D, BLOCK_K, TILE_K, MEANS, FIXED, PRECISION,
    )  # fmt: skip
    if FIXED:
        tl.store(Failed + tl.program_id(0), tl.max(tl.where(weight < LARGEST_SUM, 0, 1), 0))  # also where it is NaN
    out = acc / weight[:, None]
    if SAVE_LSE:
        tl.store(Lse + head * padded + n, top + tl.log2(weight))
    to = host_rows(places(Order, n, N, ORDERED), head, heads, N)
    inside = (n < N)[:, None] & live[None, :]
    if LINEAR == 1 or (LINEAR == 2 and row >= pinned):
        # Loaded again: kept in registers through the loops, it would push others out.
        features = _phi(load_rows(queries, n, d, D).to(tl.float32), live[None, :], SOFTMAX, 1)
        both = live[:, None] & live[None, :]
        owner = head if LINEAR == 1 else head * rows + row
        state = tl.load(State + (owner * D + d)[:, None] * D + d[None, :], mask=both, other=0.0)
        total = tl.load(Total + owner * D + d, mask=live, other=0.0)
        norm = tl.maximum(tl.sum(features * total[None, :], 1), 1e-37)
        linear = tl.dot(features.to(dtype), state.to(dtype), input_precision=PRECISION) / norm[:, None]
        if CENTRED:
            linear += tl.load(Mu + head * D + d, mask=live, other=0.0)[None, :]
        if SAVE_LINEAR:
            tl.store(Linear + to[:, None] * D + d[None, :], linear.to(dtype), mask=inside)
        if SAVE_LINEAR or CENTRED:
            proj = tl.load(Proj + d[None, :] * D + d[:, None], mask=both, other=0.0)
            linear = tl.dot(linear.to(dtype), proj.to(dtype), input_precision=PRECISION)
        out += linear
    elif SAVE_LINEAR:
        tl.store(Linear + to[:, None] * D + d[None, :], tl.zeros([TILE_Q, DP], dtype), mask=inside)
    tl.store(Out + to[:, None] * D + d[None, :], out.to(dtype), mask=inside)


def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_indices: Tensor,
    *,
    tokens: int,
    bits: Tensor | None = None,
    negligible: int = 0,
    means: tuple[Tensor, Tensor] | None = None,
    order: Tensor | None = None,
    pinned: int = 0,
    scale: float | None = None,
    linear: str = "none",
    feature_map: str = "softmax",
    proj: Tensor | None = None,
    block_q: int = 128,
    block_k: int = 64,
) -> Tensor:
    """`forward` without residuals."""
    return forward(
        q, k, v, kv_indices, tokens=tokens, bits=bits, negligible=negligible, means=means, order=order, pinned=pinned, scale=scale,
        linear=linear, feature_map=feature_map, proj=proj, block_q=block_q, block_k=block_k,
    )[0]  # fmt: skip


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_indices: Tensor,
    *,
    tokens: int,
    bits: Tensor | None,
    negligible: int,
    means: tuple[Tensor, Tensor] | None,
    order: Tensor | None,
    pinned: int,
    scale: float | None,
    linear: str,
    feature_map: str,
    proj: Tensor | None,
    block_q: int,
    block_k: int,
    save_lse: bool = False,
    save_linear: bool = False,
    mu: Tensor | None = None,
) -> tuple[Tensor, Residuals]:
    """As `naive.sparse_linear_attention`, on padded tensors and with the output scattered back to host order.

    Args:
        q, k, v: ``[B, H, padded, D]`` contiguous, zeros after the first `tokens` tokens, padded a multiple of `block_q`.
        kv_indices: ``[B, H, ceil(tokens / block_q), kept]`` int32.
        tokens: N.
        bits: A bit for each key block that is not marginal; needed with `means` and for the branch over marginal blocks. See
            `BlockMap.skipped`.
        negligible: Key blocks that are neither critical nor marginal for a query block that is not pinned.
        means: Mean keys and values ``[B, H, ceil(tokens / block_k), D]`` for marginal blocks, or None.
        order: ``[N]`` int32: output row of each token, or None.
        pinned, scale, linear, feature_map, proj, block_q, block_k: As in the naive twin.
        save_lse, save_linear: Which residuals to store.
        mu: ``[B * H, D]`` FP32, about the mean value of each head: states of query blocks are to be made of values less this, and
            returned. Only for the branch over marginal blocks.

    Returns:
        ``[B, H, N, D]``, a view of ``[B, N, H, D]``, and the residuals.
    """
    batch, heads, padded, dim = q.shape
    rows, kept = kv_indices.shape[-2:]
    columns = -(-tokens // block_k)
    pinned = min(pinned, rows)
    marginal = columns - kept - negligible if pinned < rows else 0
    out = torch.empty(batch, tokens, heads, dim, device=q.device, dtype=v.dtype)
    lse = torch.empty(batch, heads, padded, device=q.device, dtype=torch.float32) if save_lse else None
    save_linear = save_linear and linear != "none"
    branch = torch.empty_like(out) if save_linear else None
    nothing = out
    state = total = None
    source: tuple[Tensor, Tensor] = nothing, nothing
    folded = None if save_linear or mu is not None else proj
    if linear == "all":
        assert proj is not None
        state, total = linear_state(k, v, tokens, feature_map, block_k)
        source = (state if folded is None else state @ folded.to(state.dtype).mT), total
    elif linear == "marginal" and marginal:
        assert bits is not None
        source = marginal_states(k, v, bits, tokens=tokens, marginal=marginal, feature_map=feature_map, block_k=block_k, mu=mu, proj=folded)
        if mu is not None:
            state, total = source
    else:
        linear = "none"
    everything = torch.arange(columns, device=q.device, dtype=torch.int32) if pinned else kv_indices
    options = launch_options(block_q, block_k, dim, q.dtype)
    far = None if means is None else far_blocks(*means, options["TILE_K"], v.dtype)
    programs = rows * batch * heads * (block_q // options["TILE_Q"])
    fixed = q.dtype != torch.float16
    failed = torch.empty(programs, device=q.device, dtype=torch.int32) if fixed else nothing
    for again in (False, True) if fixed else (False,):
        _sparse_linear_kernel[(programs,)](
            q, k, v, kv_indices, everything, nothing if means is None else bits, *(far or (nothing, nothing)), *source,
            *(nothing if x is None else x for x in (mu, proj, order, out, lse, branch, failed)),
            tokens, padded, heads, rows, columns, kept, 0 if far is None else far[0].shape[2], 0 if far is None else bits.shape[-1], pinned,
            (dim**-0.5 if scale is None else scale) * LOG2_E.value,
            D=dim, DP=triton.next_power_of_2(dim), BLOCK_Q=block_q, BLOCK_K=block_k, LINEAR=LINEAR[linear],
            SOFTMAX=feature_map == "softmax", CENTRED=mu is not None, MEANS=means is not None, ORDERED=order is not None,
            SAVE_LSE=save_lse, SAVE_LINEAR=save_linear, FIXED=fixed and not again, AGAIN=again, PRECISION=_precision(q), **options,
        )  # fmt: skip
    return out.transpose(1, 2), Residuals(lse, branch, state, total, mu)


def launch_options(block_q: int, block_k: int, dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles, warps and pipeline stages of the sparse kernel. FP32 operands take up to six times the shared memory of BF16."""
    if dtype == torch.float32:
        wide = dim > 64
        return dict(TILE_Q=min(block_q, 32 if wide else 128), TILE_K=min(block_k, 16 if wide else 64), num_warps=8, num_stages=1)
    options = dict(TILE_Q=block_q, TILE_K=min(block_k, 64), num_warps=4 if block_q <= 64 else 8, num_stages=3 if dim <= 64 else 2)
    if dim <= 64 and block_q > 64:
        # Two programs on an SM, of two warp groups each. A warp group then holds 64 queries, which lets the compiler put the
        # exponentials of one tile of keys between the matrix products of the next.
        options["maxnreg"] = 128
    return options
