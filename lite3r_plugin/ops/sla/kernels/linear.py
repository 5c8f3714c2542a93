"""The linear branch in Triton: its feature map, and its state over all tokens of a head or of each key block.

Proj is zero until it is calibrated or trained, and so is the branch then. Whether it is, is looked up on the GPU in every call: nothing
waits for the answer, and a recorded graph sees weights that were changed since.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import launch
from ...sizes import power_of_2

LINEAR = {"none": 0, "all": 1, "marginal": 2}  # what kernels call the branches
LARGEST_TILE = 64  # keys that the linear-state kernel holds at once
LOG2_E = tl.constexpr(1.4426950408889634)  # powers of two take half the instructions of `tl.exp`


@triton.jit
def phi(x, live, SOFTMAX: tl.constexpr, AXIS: tl.constexpr):
    """The feature map over axis AXIS of x (FP32); `live`, of x's rank, marks the true head dimensions."""
    if SOFTMAX:
        x = tl.where(live, x, float("-inf"))
        x = tl.exp2((x - tl.max(x, AXIS, keep_dims=True)) * LOG2_E)
        return x * (1.0 / tl.sum(x, AXIS, keep_dims=True))
    return tl.where(live, tl.where(x > 0, x + 1.0, tl.exp2(tl.minimum(x, 0.0) * LOG2_E)), 0.0)


@triton.jit
def _is_used_kernel(Proj, Used, D: tl.constexpr, DP: tl.constexpr):
    """Whether any number of Proj [D, D] is not zero, as 1 or 0 into Used [1] i32; one program."""
    d = tl.arange(0, DP)
    both = (d < D)[:, None] & (d < D)[None, :]
    proj = tl.load(Proj + d[:, None] * D + d[None, :], mask=both, other=0.0)
    tl.store(Used, tl.max(tl.max(tl.where(proj == 0, 0, 1), 1), 0))


def is_used(proj: Tensor) -> Tensor:
    """Whether a branch through `proj` ``[D, D]``, contiguous, can be other than zero: 1 or 0, ``[1]`` int32."""
    used = torch.empty(1, device=proj.device, dtype=torch.int32)
    dim = proj.shape[-1]
    launch(_is_used_kernel, (1,), proj, used, D=dim, DP=power_of_2(dim), num_warps=4)
    return used


# Sizes must not specialise the kernels: any number of views and any image size run the same binary.
@triton.jit(do_not_specialize=["N", "tiles_per_split"])
def _linear_state_kernel(
    K, V, Mu, Proj, State, Total, Used, N, padded, tiles_per_split, scale,
    D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr, SOFTMAX: tl.constexpr, CENTRED: tl.constexpr, FOLDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """phi(k)^T v and phi(k), summed over `tiles_per_split` times TILE keys of one head, times `scale`; programs [splits, heads].

        K, V            [heads, padded, D], zeros after N tokens
        Mu              [heads, D] FP32: the state is that of v - mu (CENTRED)
        Proj            [D, D]: the state goes through it (FOLDED)
        State, Total    [heads, splits, D, D] in any dtype and [heads, splits, D] FP32
        Used            [1] i32: where it is zero nothing is written; or None

    All are contiguous. DP is D up to a power of two; SOFTMAX: the feature map is softmax, not elu + 1.
    """
    if Used is not None:  # noqa: SIM102 (decided when it is compiled; what follows, on the GPU)
        if tl.load(Used) == 0:
            return
    split = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, DP)
    live = d < D
    state = tl.zeros([DP, DP], tl.float32)
    total = tl.zeros([DP], tl.float32)
    for i in range(0, tiles_per_split):
        rows = (split * tiles_per_split + i) * TILE + tl.arange(0, TILE)
        inside = (rows < N)[:, None] & live[None, :]
        at = (head * padded + rows)[:, None] * D + d[None, :]
        k = tl.load(K + at, mask=inside, other=0.0)
        v = tl.load(V + at, mask=inside, other=0.0)
        features = tl.where((rows < N)[:, None], phi(k.to(tl.float32), live[None, :], SOFTMAX, 1), 0.0).to(v.dtype)
        state = tl.dot(tl.trans(features), v, state, input_precision=PRECISION)
        total += tl.sum(features.to(tl.float32), 0)
    out = head * tl.num_programs(0) + split
    both = live[:, None] & live[None, :]
    state *= scale
    total *= scale
    if CENTRED:
        state -= total[:, None] * tl.load(Mu + head * D + d, mask=live, other=0.0)[None, :]
    if FOLDED:
        proj = tl.load(Proj + d[None, :] * D + d[:, None], mask=both, other=0.0)
        state = tl.dot(state.to(V.dtype.element_ty), proj.to(V.dtype.element_ty), input_precision=PRECISION)
    tl.store(State + (out * D + d)[:, None] * D + d[None, :], state.to(State.dtype.element_ty), mask=both)
    tl.store(Total + out * D + d, total, mask=live)


def linear_state(
    k: Tensor, v: Tensor, tokens: int, feature_map: str, block_k: int = 64, used: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `naive.linear_state` over the first `tokens` tokens of k, v ``[B, H, padded, D]``, both divided by `tokens`.

    Where `used` is zero, of `is_used`, what comes back is anything.
    """
    batch, heads, _, dim = k.shape
    blocks = -(-tokens // block_k)
    splits = min(blocks, max(1, 1024 // (batch * heads)))
    per_split = -(-blocks // splits)
    splits = -(-blocks // per_split)
    state = torch.empty(batch, heads, splits, dim, dim, device=k.device, dtype=torch.float32)
    total = torch.empty(batch, heads, splits, dim, device=k.device, dtype=torch.float32)
    _launch(k, v, state, total, tokens, feature_map, block_k, per_split, 1 / tokens, used=used)
    return state.sum(2), total.sum(2)


def block_states(
    k: Tensor, v: Tensor, tokens: int, feature_map: str, block_k: int, *, mu: Tensor | None = None, proj: Tensor | None = None,
    used: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The state of each key block, a sum over its tokens divided by `block_k`: that keeps it in the range of FP16.

    Args:
        k, v: ``[heads, padded, D]``.
        tokens: Of which the first are tokens.
        feature_map, block_k: As in the naive twin.
        mu: ``[heads, D]`` FP32: the state is that of v - mu.
        proj: ``[D, D]``: the state goes through it.
        used: Of `is_used`: where it is zero, what comes back is anything.

    Returns:
        ``[heads, blocks, D, D]`` in v's dtype and ``[heads, blocks, D]`` FP32.
    """
    heads, _, dim = k.shape
    blocks = -(-tokens // block_k)
    state = torch.empty(heads, blocks, dim, dim, device=k.device, dtype=v.dtype)
    total = torch.empty(heads, blocks, dim, device=k.device, dtype=torch.float32)
    _launch(k, v, state, total, tokens, feature_map, block_k, 1, 1 / block_k, mu, proj, used)
    return state, total


def _launch(
    k: Tensor, v: Tensor, state: Tensor, total: Tensor, tokens: int, feature_map: str, block_k: int, per_split: int, scale: float,
    mu: Tensor | None = None, proj: Tensor | None = None, used: Tensor | None = None,
) -> None:  # fmt: skip
    padded, dim = k.shape[-2:]
    tile = min(block_k, LARGEST_TILE)
    tiles = per_split * block_k // tile
    launch(
        _linear_state_kernel, (total.shape[-2], k.numel() // (padded * dim)),
        k, v, k if mu is None else mu, k if proj is None else proj, state, total, used, tokens, padded, tiles, scale,
        D=dim, DP=power_of_2(dim), TILE=tile, SOFTMAX=feature_map == "softmax",
        CENTRED=mu is not None, FOLDED=proj is not None, PRECISION=precision(k), **state_options(k.dtype, tiles),
    )  # fmt: skip


def state_options(dtype: torch.dtype, tiles: int) -> dict[str, int]:
    """Warps and pipeline stages of the linear-state kernel, of which a program has so many `tiles` of keys: of one nothing overlaps."""
    return dict(num_warps=4, num_stages=1 if dtype == torch.float32 or tiles == 1 else 3)


def precision(x: Tensor) -> str:
    """FP32 operands are multiplied in three TF32 products, which is FP32 accuracy; others in their own precision."""
    return "tf32x3" if x.dtype == torch.float32 else "ieee"
