"""What the launches take: one call of the operator over ordered, padded tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...block_map.kernel_mask import KernelMask
from ...block_map.kernels import BlockMap
from ...sizes import power_of_2
from ..signature import Arguments
from .linear import LINEAR, precision

LARGE = 1 << 30  # kept scores of a call


class Operands(NamedTuple):
    """One call of the operator, as its kernels see it.

    Attributes:
        q: ``[B, H, padded, D]`` contiguous, zeros after `queries` tokens; padded is a multiple of `block_q`.
        k, v: ``[B, H, padded, D]``, likewise, zeros after `tokens` tokens; where these are other tokens, padded is another number.
        kv_indices: ``[B, H, query blocks, kept]`` int32, the critical key blocks; with a mask, ``[B, H, query blocks, key blocks]``.
        bits: The same as a bit set, see `BlockMap`; needed for a backward pass.
        skipped: A bit for each key block that is not marginal, see `BlockMap`; needed with `means`, for the branch over marginal
            blocks and for a backward pass.
        negligible: Key blocks that are neither critical nor marginal for a query block that is not pinned.
        means: Mean keys and values ``[B, H, key blocks, D]``, or None without block means.
        proj: ``[D, D]``, or None without a linear branch.
        order: ``[M]`` int32 or int64: the host row of each query, or None.
        key_order: ``[N]``, that of each key.
        queries, tokens: M and N.
        pinned: The number of query blocks that attend to all keys.
        scale: Factor of the scores.
        linear, feature_map, block_q, block_k: As in the naive twin.
        mask: What queries may see, or None: all. It says how many blocks are critical, of which there are maps of pinned query blocks too.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    kv_indices: Tensor
    bits: Tensor | None
    skipped: Tensor | None
    negligible: int
    means: tuple[Tensor, Tensor] | None
    proj: Tensor | None
    order: Tensor | None
    key_order: Tensor | None
    queries: int
    tokens: int
    pinned: int
    scale: float
    linear: str
    feature_map: str
    block_q: int
    block_k: int
    mask: KernelMask | None

    @classmethod
    def of(
        cls, arguments: Arguments, qkv: tuple[Tensor, ...], means: tuple[Tensor, ...], chosen: BlockMap, negligible: int,
        mask: KernelMask | None,
    ) -> Operands:  # fmt: skip
        """Of a call of the whole operator, whose q, k, v are prepared.

        Args:
            arguments: The call, contiguous.
            qkv, means: In order, padded; mean keys and values.
            chosen: The block map.
            negligible, mask: See `Operands`.
        """
        q, k, v = qkv
        k_mean, v_mean = means
        return cls(
            q, k, v, kv_indices=chosen.kv_indices, bits=chosen.bits, skipped=chosen.skipped, negligible=negligible,
            means=(k_mean, v_mean) if arguments.block_means else None, proj=arguments.proj, order=arguments.order,
            key_order=arguments.key_order if arguments.cross else arguments.order, queries=arguments.q.shape[-2],
            tokens=arguments.tokens, pinned=arguments.pinned_queries,
            scale=arguments.factor, linear=arguments.linear,
            feature_map=arguments.feature_map, block_q=arguments.block_q, block_k=arguments.block_k,
            mask=mask,
        )  # fmt: skip

    @property
    def rows(self) -> int:
        """Number of query blocks."""
        return self.kv_indices.shape[-2]

    @property
    def columns(self) -> int:
        """Number of key blocks."""
        return -(-self.tokens // self.block_k)

    @property
    def marginal(self) -> int:
        """Key blocks that are marginal for a query block that is not pinned; with a mask, at most so many."""
        if self.mask is not None:
            return self.columns
        return self.columns - self.kv_indices.shape[-1] - self.negligible

    @property
    def per_row(self) -> bool:
        """Whether the linear branch has a state of each query block, not of each head."""
        return self.linear == "marginal" or (self.linear == "all" and self.mask is not None)

    def state_bits(self) -> Tensor:
        """A bit for each key block that has no part in the state of a query block: ``[B, H, query blocks, words]`` int32."""
        if self.linear == "all":
            assert self.mask is not None
            return self.mask.not_whole().expand(*self.q.shape[:2], -1, -1).contiguous()
        assert self.skipped is not None
        return self.skipped

    @property
    def typical(self) -> int:
        """About how many key blocks are critical for a query block that is not pinned."""
        return self.kv_indices.shape[-1] if self.mask is None else max(1, self.columns // 8)

    @property
    def is_large(self) -> bool:
        """Whether a GPU takes longer than Python. Streams and tensor descriptors, which cost Python some time, then pay."""
        return self.kv_indices.numel() * self.block_q * self.block_k >= LARGE

    @property
    def sizes(self) -> dict[str, object]:
        """Constants of all backward kernels."""
        dim = self.q.shape[-1]
        return dict(D=dim, DP=power_of_2(dim), BLOCK_Q=self.block_q, BLOCK_K=self.block_k)

    @property
    def branch(self) -> dict[str, object]:
        """Constants of backward kernels that know of the linear branch."""
        return dict(
            LINEAR=LINEAR["marginal" if self.per_row else self.linear], SOFTMAX=self.feature_map == "softmax", PRECISION=precision(self.q)
        )
