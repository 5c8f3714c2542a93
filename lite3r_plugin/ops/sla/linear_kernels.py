"""The linear branch in Triton: its feature map, and its state over all tokens of a head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _phi(x, live, SOFTMAX: tl.constexpr, AXIS: tl.constexpr):
    """The feature map over axis AXIS of x (FP32); `live`, of x's rank, marks the true head dimensions."""
    if SOFTMAX:
        x = tl.where(live, x, float("-inf"))
        x = tl.exp(x - tl.max(x, AXIS, keep_dims=True))
        return x / tl.sum(x, AXIS, keep_dims=True)
    return tl.where(live, tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0))), 0.0)


# Sizes must not specialise the kernels: any number of views and any image size run the same binary.
@triton.jit(do_not_specialize=["N", "blocks_per_split"])
def _linear_state_kernel(
    K, V, State, Total, N, padded, blocks_per_split,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_K: tl.constexpr, SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums of phi(k)^T v and of phi(k) over `blocks_per_split` key blocks of one head."""
    split = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, DP)
    live = d < D
    state = tl.zeros([DP, DP], tl.float32)
    total = tl.zeros([DP], tl.float32)
    for i in range(0, blocks_per_split):
        rows = (split * blocks_per_split + i) * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (rows < N)[:, None] & live[None, :]
        at = (head * padded + rows)[:, None] * D + d[None, :]
        k = tl.load(K + at, mask=inside, other=0.0)
        v = tl.load(V + at, mask=inside, other=0.0)
        features = tl.where((rows < N)[:, None], _phi(k.to(tl.float32), live[None, :], SOFTMAX, 1), 0.0).to(v.dtype)
        state = tl.dot(tl.trans(features), v, state, input_precision=PRECISION)
        total += tl.sum(features.to(tl.float32), 0)
    out = head * tl.num_programs(0) + split
    both = live[:, None] & live[None, :]
    tl.store(State + (out * D + d)[:, None] * D + d[None, :], state / N, mask=both)
    tl.store(Total + out * D + d, total / N, mask=live)


def linear_state(k: Tensor, v: Tensor, tokens: int, feature_map: str, block_k: int = 64) -> tuple[Tensor, Tensor]:
    """As `naive.linear_state` over the first `tokens` tokens of k, v ``[B, H, padded, D]``, both divided by `tokens`."""
    batch, heads, padded, dim = k.shape
    blocks = -(-tokens // block_k)
    splits = min(blocks, max(1, 1024 // (batch * heads)))
    per_split = -(-blocks // splits)
    splits = -(-blocks // per_split)
    state = torch.empty(batch, heads, splits, dim, dim, device=k.device, dtype=torch.float32)
    total = torch.empty(batch, heads, splits, dim, device=k.device, dtype=torch.float32)
    _linear_state_kernel[(splits, batch * heads)](
        k, v, state, total, tokens, padded, per_split,
        D=dim, DP=triton.next_power_of_2(dim), BLOCK_K=block_k, SOFTMAX=feature_map == "softmax", PRECISION=_precision(k),
        **state_options(k.dtype),
    )  # fmt: skip
    return state.sum(2), total.sum(2)


def state_options(dtype: torch.dtype) -> dict[str, int]:
    """Warps and pipeline stages of the linear-state kernel."""
    return dict(num_warps=4, num_stages=1 if dtype == torch.float32 else 3)


def _precision(x: Tensor) -> str:
    """FP32 operands are multiplied in three TF32 products, which is FP32 accuracy; others in their own precision."""
    return "tf32x3" if x.dtype == torch.float32 else "ieee"
