"""One call of the operator, as its backward pass sees it."""

from __future__ import annotations

from typing import NamedTuple

import triton
from torch import Tensor

from .kernels import LINEAR
from .linear_kernels import _precision

LARGE = 1 << 30  # kept scores of a problem


class Problem(NamedTuple):
    """One call of the operator, as its forward pass saw it.

    Attributes:
        q, k, v: ``[B, H, padded, D]`` contiguous, zeros after the first `tokens` tokens.
        kv_indices, critical: The critical key blocks, as indices and as a bit set.
        bits: A bit for each key block that is not marginal.
        negligible: Key blocks that are neither critical nor marginal for a query block that is not pinned.
        means: Mean keys and values ``[B, H, ceil(tokens / block_k), D]`` (`backward` pads them), or None without block means.
        proj: ``[D, D]``, or None without a linear branch.
        order: ``[N]`` int32, or None.
        tokens, pinned: N, and the number of query blocks that attend to all keys.
        scale, linear, feature_map, block_q, block_k: As in the naive twin.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    kv_indices: Tensor
    critical: Tensor
    bits: Tensor
    negligible: int
    means: tuple[Tensor, Tensor] | None
    proj: Tensor | None
    order: Tensor | None
    tokens: int
    pinned: int
    scale: float
    linear: str
    feature_map: str
    block_q: int
    block_k: int

    @property
    def columns(self) -> int:
        """Number of key blocks."""
        return -(-self.tokens // self.block_k)

    @property
    def marginal(self) -> int:
        """Key blocks that are marginal for a query block that is not pinned."""
        return self.columns - self.kv_indices.shape[-1] - self.negligible

    @property
    def is_large(self) -> bool:
        """Whether a GPU takes longer than Python. Streams and tensor descriptors, which cost Python some time, then pay."""
        return self.kv_indices.numel() * self.block_q * self.block_k >= LARGE

    @property
    def sizes(self) -> dict[str, object]:
        """Constants of all backward kernels."""
        dim = self.q.shape[-1]
        return dict(D=dim, DP=triton.next_power_of_2(dim), BLOCK_Q=self.block_q, BLOCK_K=self.block_k)

    @property
    def branch(self) -> dict[str, object]:
        """Constants of kernels that know of the linear branch."""
        return dict(LINEAR=LINEAR[self.linear], SOFTMAX=self.feature_map == "softmax", PRECISION=_precision(self.q))
