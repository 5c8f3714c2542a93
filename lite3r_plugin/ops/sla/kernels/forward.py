"""One kernel for the sparse softmax, the block means and the linear branch, and its launch.

A program holds one query block, or a tile of it, and streams its critical key blocks through a softmax (`softmax.py`) whose
reference is fixed. A second launch retries those tiles, online, whose sums came near to an overflow: mostly none. q, k, v
come padded with zeros to whole query blocks, so only the scores of the last key block are masked. Programs of pinned query
blocks, which stream all keys, start first: they take longest.

The linear branch needs a D x D state: over all tokens one for each head (`linear.py`), over marginal blocks one for each query
block (`marginal.py`). Proj is folded into it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import launch
from ...sizes import power_of_2
from .linear import LINEAR, LOG2_E, is_used, linear_state, phi, precision
from .linear_pairs import pairs_of
from .marginal import marginal_states
from .operands import Operands
from .softmax import attend, host_rows, is_lost, load_rows, padded_means, places


class Residuals(NamedTuple):
    """What a backward pass needs of a forward pass.

    Attributes:
        lse: ``[B, H, padded queries]`` FP32, base-2 logarithm of the softmax denominator of each ordered query; None unless asked for.
        linear: ``[B, M, H, D]``, the linear branch before Proj in host order; None unless asked for.
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
@triton.jit(do_not_specialize=["M", "N", "rows", "columns", "kept", "mean_rows", "words", "pinned"])
def _sparse_linear_kernel(
    Q, K, V, Indices, AllIndices, Bits, KMeans, VMeans, State, Total, Mu, Proj, Order, Out, Lse, Linear, Failed, Mask, Pairs, Used,
    M, N, padded, heads, rows, columns, kept, mean_rows, words, pinned, scale_log2,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    LINEAR: tl.constexpr, SOFTMAX: tl.constexpr, CENTRED: tl.constexpr, MEANS: tl.constexpr, ORDERED: tl.constexpr,
    SAVE_LSE: tl.constexpr, SAVE_LINEAR: tl.constexpr, FIXED: tl.constexpr, RETRY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The whole operator for TILE_Q queries of one head; a program for each, in one dimension.

    Pointers to contiguous tensors, whose strides follow from their shapes. What a constant switches off is not read.

        Q                       [B * heads, rows * BLOCK_Q, D], zeros after M tokens
        K, V                    [B * heads, padded, D], zeros after N tokens
        Indices                 [B * heads, rows, kept] i32: the critical key blocks of each query block, ascending
        AllIndices              [columns] i32: those of a pinned one
        Bits                    [B * heads, rows, words] i32: a bit for each key block that is not marginal (MEANS)
        KMeans, VMeans          [B * heads, mean_rows, D] in V's dtype, zeros after `columns` rows (MEANS)
        State, Total            LINEAR == 1: [B * heads, D, D] and [B * heads, D], FP32; LINEAR == 2, and with a Mask: [B * heads, rows,
                                D, D] in V's dtype and [B * heads, rows, D] FP32, of marginal blocks, or of those that are wholly allowed.
                                Proj is in State unless SAVE_LINEAR or CENTRED, or LINEAR == 1 with a Mask
        Mu                      [B * heads, D] FP32: what the values in State are centred on (CENTRED)
        Proj                    [D, D] (SAVE_LINEAR or CENTRED, or LINEAR == 1 with a Mask)
        Order                   [M]: the host row of each query (ORDERED)
        Out, Linear             [B, M, heads, D] in V's dtype, in host order: the output, the branch before Proj (SAVE_LINEAR)
        Lse                     [B * heads, rows * BLOCK_Q] FP32 (SAVE_LSE)
        Failed                  [programs] i32: FIXED writes which tiles are to be retried, RETRY reads it
        Mask                    a `KernelMask`, or None: then Indices holds those of all query blocks, with kept for a stride alone
        Pairs                   `Pairs` of LINEAR == 1 with a Mask, centred if CENTRED; or None
        Used                    [1] i32: where it is zero there is no branch; or None: there is one

    Sizes: M queries; N keys, `padded` with padding; `rows` query blocks, the first `pinned` of which attend to all of `columns` key
    blocks and the others to `kept`; `words` of 32 bits. Scores are multiplied by `scale_log2`, the scale times log2(e). DP is D up to a
    power of two. LINEAR: 0 no branch, 1 over all tokens, 2 over marginal blocks. SOFTMAX: the feature map is softmax, not elu + 1.
    """
    if RETRY:  # noqa: SIM102 (decided when it is compiled; what follows, on the GPU)
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
    queries = Q + head * rows * BLOCK_Q * D
    chosen = Indices + (head * rows + row) * kept
    if Mask is not None:
        near = tl.load(Mask.near + row)
    elif row < pinned:
        chosen = AllIndices
    q = load_rows(queries, n, d, D)
    k_means = KMeans
    v_means = VMeans
    bits = Bits
    means = 0
    if MEANS:
        k_means = KMeans + head * mean_rows * D
        v_means = VMeans + head * mean_rows * D
        bits = Bits + (head * rows + row) * words
        means = tl.where(near < columns, mean_rows, 0)
    first_mean = 0
    if MEANS and Mask is not None:
        first_mean = tl.load(Mask.means + rows + row)
        means = tl.load(Mask.means + 2 * rows + row)
    acc, weight, top = attend(
        q, keys, values, chosen, near, k_means, v_means, bits, first_mean, means, Mask, row, n, N, columns, words, scale_log2, d,
        D, BLOCK_K, TILE_K, MEANS, FIXED, PRECISION,
    )  # fmt: skip
    if FIXED:
        tl.store(Failed + tl.program_id(0), tl.max(is_lost(weight, Mask is not None), 0))
    if Mask is not None:  # of a query that sees nothing the output is zero, and the logarithm -inf
        top = tl.where(weight == 0.0, float("-inf"), top)
        weight = tl.where(weight == 0.0, 1.0, weight)
    out = acc / weight[:, None]
    if SAVE_LSE:
        tl.store(Lse + head * rows * BLOCK_Q + n, top + tl.log2(weight))
    to = host_rows(places(Order, n, M, ORDERED), head, heads, M)
    inside = (n < M)[:, None] & live[None, :]
    used = row >= pinned if LINEAR == 2 else LINEAR == 1
    if LINEAR != 0 and Used is not None:
        used &= tl.load(Used) != 0
    if used:
        # Loaded again: kept in registers through the loops, it would push others out.
        features = phi(load_rows(queries, n, d, D).to(tl.float32), live[None, :], SOFTMAX, 1)
        both = live[:, None] & live[None, :]
        PAIRS: tl.constexpr = Pairs is not None
        owner = head if LINEAR == 1 and not PAIRS else head * rows + row
        state = tl.load(State + (owner * D + d)[:, None] * D + d[None, :], mask=both, other=0.0)
        total = tl.load(Total + owner * D + d, mask=live, other=0.0)
        norm = tl.sum(features * total[None, :], 1)
        if PAIRS:
            at = head * rows * BLOCK_Q + n
            norm += tl.load(Pairs.norm + at)
        norm = tl.maximum(norm, 1e-37)
        linear = tl.dot(features.to(dtype), state.to(dtype), input_precision=PRECISION)
        if PAIRS:
            linear += load_rows(Pairs.numerator, at, d, D)
        linear = linear / norm[:, None]
        if CENTRED:
            mu = tl.load(Mu + head * D + d, mask=live, other=0.0)
            if PAIRS:
                linear += tl.where(norm[:, None] > 1e-37, mu[None, :], 0.0)
            else:
                if Mask is not None:
                    mu = tl.where(tl.load(Mask.means + row) > 0, mu, 0.0)
                linear += mu[None, :]
        if SAVE_LINEAR:
            tl.store(Linear + to[:, None] * D + d[None, :], linear.to(dtype), mask=inside)
        if SAVE_LINEAR or CENTRED or PAIRS:
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
    queries: int | None = None,
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
    """As `naive.sparse_linear_attention`, on padded tensors and with the output scattered back to host order: `forward` alone.

    Args:
        q, k, v, tokens, negligible, means, order: See `Operands`.
        queries: M; as many as keys by default.
        kv_indices: ``[B, H, query blocks, kept]`` int32, the critical key blocks.
        bits: A bit for each key block that is not marginal; needed with `means` and for the branch over marginal blocks.
        pinned, scale, linear, feature_map, proj, block_q, block_k: As in the naive twin.

    Returns:
        ``[B, H, M, D]`` in v's dtype, a view of ``[B, M, H, D]``.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    operands = Operands(
        q, k, v, kv_indices, bits=None, skipped=bits, negligible=negligible, means=means, proj=proj, order=order, key_order=None,
        queries=tokens if queries is None else queries, tokens=tokens, pinned=pinned, scale=scale, linear=linear, feature_map=feature_map,
        block_q=block_q, block_k=block_k, mask=None,
    )  # fmt: skip
    return forward(operands, infers=True)[0]


def forward(
    operands: Operands, *, save_lse: bool = False, save_linear: bool = False, mu: Tensor | None = None, infers: bool = False
) -> tuple[Tensor, Residuals]:
    """The output in host order, and what a backward pass needs.

    Args:
        operands: The call.
        save_lse, save_linear: Which residuals to store.
        mu: ``[B * H, D]`` FP32, about the mean value of each head: states of query blocks are to be made of values less this, and
            returned. Only for the branch over marginal blocks.
        infers: Of the residuals `lse` alone is wanted. A branch whose Proj is zero is not computed then, but for its pairs with a mask.

    Returns:
        ``[B, H, M, D]`` in v's dtype, a view of ``[B, M, H, D]``, and the residuals.
    """
    q, k, v, bits, means = operands.q, operands.k, operands.v, operands.skipped, operands.means
    proj, order, linear, mask = operands.proj, operands.order, operands.linear, operands.mask
    queries, tokens, block_q, block_k = operands.queries, operands.tokens, operands.block_q, operands.block_k
    batch, heads, _, dim = q.shape
    rows, kept = operands.kv_indices.shape[-2:]
    columns = operands.columns
    pinned = min(operands.pinned, rows)
    marginal = operands.marginal if pinned < rows else 0
    out = torch.empty(batch, queries, heads, dim, device=q.device, dtype=v.dtype)
    lse = torch.empty(batch, heads, rows * block_q, device=q.device, dtype=torch.float32) if save_lse else None
    save_linear = save_linear and linear != "none"
    branch = torch.empty_like(out) if save_linear else None
    nothing = out
    state = total = None
    source: tuple[Tensor, Tensor] = nothing, nothing
    folded = None if save_linear or mu is not None else proj
    if linear == "marginal" and not marginal:
        linear = "none"
    used = is_used(proj) if infers and proj is not None and linear != "none" else None
    if linear == "all" and mask is None:
        assert proj is not None
        state, total = linear_state(k, v, tokens, operands.feature_map, block_k, used)
        source = (state if folded is None else state @ folded.to(state.dtype).mT), total
    elif linear != "none":
        source = marginal_states(
            k, v, operands.state_bits(), tokens=tokens, marginal=marginal, feature_map=operands.feature_map, block_k=block_k, mu=mu,
            proj=None if linear == "all" else folded,
            scales=None if mask is None else mask.scales, used=used,
        )  # fmt: skip
        if mu is not None:
            state, total = source
    pairs = pairs_of(operands, mu) if linear == "all" and mask is not None else None
    everything = torch.arange(columns, device=q.device, dtype=torch.int32) if pinned else operands.kv_indices
    options = launch_options(block_q, block_k, dim, q.dtype)
    padded_mean = None if means is None else padded_means(*means, options["TILE_K"], v.dtype)
    mean_rows, words = (0, 0) if padded_mean is None else (padded_mean[0].shape[2], bits.shape[-1])
    programs = rows * batch * heads * (block_q // options["TILE_Q"])
    fixed = q.dtype != torch.float16
    failed = torch.empty(programs, device=q.device, dtype=torch.int32) if fixed else nothing
    arguments = (
        q, k, v, operands.kv_indices, everything, nothing if means is None else bits, *(padded_mean or (nothing, nothing)), *source,
        *(nothing if x is None else x for x in (mu, proj, order, out, lse, branch, failed)), mask, pairs, used,
        queries, tokens, k.shape[2], heads, rows, columns, kept, mean_rows, words, pinned, operands.scale * LOG2_E.value,
    )  # fmt: skip
    constants = dict(
        D=dim, DP=power_of_2(dim), BLOCK_Q=block_q, BLOCK_K=block_k, LINEAR=LINEAR[linear], SOFTMAX=operands.feature_map == "softmax",
        CENTRED=mu is not None, MEANS=means is not None, ORDERED=order is not None, SAVE_LSE=save_lse, SAVE_LINEAR=save_linear,
        PRECISION=precision(q), **options,
    )  # fmt: skip
    for retry in (False, True) if fixed else (False,):
        launch(_sparse_linear_kernel, (programs,), *arguments, FIXED=fixed and not retry, RETRY=retry, **constants)
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
