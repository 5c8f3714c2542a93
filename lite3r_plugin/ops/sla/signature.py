"""The flat arguments of the whole operator, as `torch.library` takes them, and what follows from them alone."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..block_map import kept_blocks, negligible_blocks
from ..qk_norm_rope import HeadNorm, Prepared, prepare_qkv

DIFFERENTIABLE = 8  # arguments that may need a gradient: the first ones


class Call(NamedTuple):
    """All arguments but the backend; see `sparse_linear_attention` of the package. Norms and branch are in parts."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_weight: Tensor | None
    q_bias: Tensor | None
    k_weight: Tensor | None
    k_bias: Tensor | None
    proj: Tensor | None
    order: Tensor | None
    positions: Tensor | None
    pinned_tokens: int
    keep_ratio: float
    negligible_ratio: float
    q_kind: Any
    q_eps: float
    k_kind: Any
    k_eps: float
    rope_base: float | None
    scale: float | None
    linear: str
    feature_map: str
    block_means: bool
    block_q: int
    block_k: int

    @classmethod
    def of(cls, *arguments: Any) -> Call:
        """With those tensors contiguous that kernels read as they lie in memory: a user, a compiler or a hook may have turned them."""
        call = cls(*arguments)
        names = ("q_weight", "q_bias", "k_weight", "k_bias", "proj", "order")
        return call._replace(**{name: x.contiguous() for name in names if (x := getattr(call, name)) is not None})

    @property
    def norms(self) -> dict[str, HeadNorm]:
        """Of queries and keys."""
        return dict(
            q_norm=HeadNorm(self.q_kind, self.q_weight, self.q_bias, self.q_eps),
            k_norm=HeadNorm(self.k_kind, self.k_weight, self.k_bias, self.k_eps),
        )

    @property
    def turned(self) -> dict[str, Any]:
        """What besides a norm is done to queries and keys."""
        return dict(order=self.order, positions=self.positions, rope_base=self.rope_base)

    @property
    def is_turned(self) -> bool:
        """Whether queries and keys are normed or rotated, not only put in order."""
        return self.q_kind is not None or self.k_kind is not None or (self.positions is not None and self.rope_base is not None)

    @property
    def pinned_queries(self) -> int:
        """Query blocks that attend to all keys."""
        return -(-self.pinned_tokens // self.block_q)

    @property
    def pinned_keys(self) -> int:
        """Key blocks that all queries attend to."""
        return -(-self.pinned_tokens // self.block_k)

    @property
    def kept(self) -> int:
        """Key blocks that a query block keeps, pinned ones included."""
        return kept_blocks(-(-self.v.shape[-2] // self.block_k), self.keep_ratio, self.pinned_keys)

    @property
    def leaves_out(self) -> bool:
        """Whether it matters what is negligible and what is marginal, and a share is to be negligible."""
        return self.negligible_ratio > 0 and (self.block_means or self.linear == "marginal")

    @property
    def negligible(self) -> int:
        """Key blocks that a query block leaves out, where that matters."""
        if not self.leaves_out:
            return 0
        return negligible_blocks(-(-self.v.shape[-2] // self.block_k), self.negligible_ratio, self.kept, self.pinned_keys)

    @property
    def blocks(self) -> dict[str, Any]:
        """How many blocks the map is to choose."""
        return dict(kept=self.kept, pinned=self.pinned_keys, negligible=self.negligible)

    def prepared(self, triton: bool) -> Prepared:
        """q, k and v, normed, rotated, in order, and their means over blocks."""
        blocks = dict(block_q=self.block_q, block_k=self.block_k)
        return prepare_qkv(self.q, self.k, self.v, **self.norms, **self.turned, **blocks, triton=triton)
