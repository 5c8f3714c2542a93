"""The signature of the whole operator, declared once: `Arguments`. The rest is derived from it.

`torch.library` takes flat arguments of a few types, so norms and the linear branch come in parts. Types of `Arguments` give the
schema of its operators; what is marked `Learns` gives `Needed` and `Gradients`, which hold one thing for each such input, by name.
"""

from __future__ import annotations

import types
from collections import namedtuple
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from ..block_map import KeySpread, SegmentMask, kept_blocks, key_spread, negligible_blocks
from ..block_map.kernel_mask import KernelMask
from ..qk_norm_rope import HeadNorm, Prepared, Tokens, prepare_qkv

Learns = Annotated[Tensor, "may need a gradient"]
SymInt = Annotated[int, "a symbol in a graph"]  # any number of tokens, and of pinned ones, is served by one graph


class Arguments(NamedTuple):
    """All arguments of the whole operator; see `api.sparse_linear_attention`.

    Attributes:
        q: ``[B, H, M, D]``, any strides.
        k, v: ``[B, H, N, D]``, any strides; M is N unless `cross`.
        q_weight, q_bias, k_weight, k_bias: ``[D]``, of the norms of queries and keys.
        proj: ``[D, D]``, or None without a linear branch.
        order: ``[M]`` int32 or int64.
        positions: ``[B or 1, M, 2]``.
        q_kind, q_eps, k_kind, k_eps: The rest of the norms, as in `HeadNorm`.
        pinned_tokens, key_pinned_tokens: Of queries and of keys.
        cross: Whether keys are other tokens than queries. Else `order` and `positions` are those of keys too.
        key_order, key_positions: Those of keys, where they are other tokens.
        return_lse: Whether the log-sum-exp of queries is wanted.
        mask_queries, mask_keys, mask_before, mask_after, mask_sink: The fields of a `SegmentMask`; without a mask all are None.
        block_choice: ``"mean"`` or ``"error"``, see `block_map.naive`.
    """

    q: Learns
    k: Learns
    v: Learns
    q_weight: Learns | None
    q_bias: Learns | None
    k_weight: Learns | None
    k_bias: Learns | None
    proj: Learns | None
    order: Tensor | None
    positions: Tensor | None
    pinned_tokens: SymInt
    keep_ratio: float
    negligible_ratio: float
    q_kind: str | None
    q_eps: float
    k_kind: str | None
    k_eps: float
    rope_base: float | None
    scale: float | None
    linear: str
    feature_map: str
    block_means: bool
    block_q: int
    block_k: int
    backend: str
    cross: bool = False
    key_order: Tensor | None = None
    key_positions: Tensor | None = None
    key_pinned_tokens: SymInt = 0
    return_lse: bool = False
    mask_queries: Tensor | None = None
    mask_keys: Tensor | None = None
    mask_before: int | None = None
    mask_after: int | None = None
    mask_sink: int | None = None
    block_choice: str = "mean"

    def contiguous(self) -> Arguments:
        """With those tensors contiguous that kernels read as they lie in memory: a user, a compiler or a hook may have changed that."""
        changed = {name: x.contiguous() for name in READ_AS_THEY_LIE if (x := getattr(self, name)) is not None and not x.is_contiguous()}
        return self._replace(**changed) if changed else self

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Those that may need a gradient, as `Needed` and `Gradients` name them."""
        return self[: len(INPUTS)]

    @property
    def options(self) -> tuple[Any, ...]:
        """All but `inputs`."""
        return self[len(INPUTS) :]

    @property
    def q_norm(self) -> HeadNorm:
        """Of queries."""
        return HeadNorm(self.q_kind, self.q_weight, self.q_bias, self.q_eps)  # type: ignore[arg-type]

    @property
    def k_norm(self) -> HeadNorm:
        """Of keys."""
        return HeadNorm(self.k_kind, self.k_weight, self.k_bias, self.k_eps)  # type: ignore[arg-type]

    @property
    def has_norm(self) -> bool:
        """Whether queries or keys are normed."""
        return self.q_kind is not None or self.k_kind is not None

    @property
    def changes_qk(self) -> bool:
        """Whether queries and keys are normed or rotated, not only put in order."""
        rotated = self.positions is not None or self.key_positions is not None
        return self.has_norm or (rotated and self.rope_base is not None)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return self.v.numel() == 0 or self.q.numel() == 0

    @property
    def keys(self) -> Tokens:
        """Order and positions of keys."""
        return Tokens(self.key_order, self.key_positions) if self.cross else Tokens(self.order, self.positions)

    @property
    def tokens(self) -> int:
        """N."""
        return self.v.shape[-2]

    @property
    def mask(self) -> SegmentMask | None:
        """Which keys queries may see, in host order; None: all."""
        if self.mask_queries is None:
            return None
        return SegmentMask(self.mask_queries, self.mask_keys, self.mask_before, self.mask_after, self.mask_sink)

    @property
    def rows(self) -> int:
        """Number of query blocks."""
        return -(-self.q.shape[-2] // self.block_q)

    @property
    def columns(self) -> int:
        """Number of key blocks."""
        return -(-self.v.shape[-2] // self.block_k)

    @property
    def pinned_queries(self) -> int:
        """Query blocks that attend to all keys."""
        return -(-self.pinned_tokens // self.block_q)

    @property
    def pinned_keys(self) -> int:
        """Key blocks that all queries attend to."""
        return -(-self.key_pinned_tokens // self.block_k)

    @property
    def leaves_out(self) -> bool:
        """Whether it matters what is negligible and what is marginal, and a share is to be negligible."""
        return self.negligible_ratio > 0 and (self.block_means or self.linear == "marginal")

    @property
    def per_row(self) -> bool:
        """Whether the linear branch has a state of each query block, not of each head."""
        return self.linear == "marginal" or (self.linear == "all" and self.mask_queries is not None)

    @property
    def skips(self) -> bool:
        """Whether other blocks than critical ones are not marginal."""
        return self.leaves_out or self.mask_queries is not None

    @property
    def factor(self) -> float:
        """Of the scores."""
        return self.v.shape[-1] ** -0.5 if self.scale is None else self.scale

    def by_error(self, prepared: Prepared, triton: bool) -> KeySpread | None:
        """What choosing by error reads of prepared k; None where blocks are chosen by means."""
        if self.block_choice == "mean":
            return None
        k = prepared.k.detach()
        if triton:
            from ..block_map import kernels

            return kernels.key_spread(k, tokens=self.tokens, scale=self.factor, block_k=self.block_k)
        return key_spread(k[:, :, : self.tokens], scale=self.factor, block_k=self.block_k)

    def block_counts(self) -> BlockCounts:
        """How many blocks the map is to choose."""
        columns, pinned = self.columns, self.pinned_keys
        kept = kept_blocks(columns, self.keep_ratio, pinned)
        negligible = negligible_blocks(columns, self.negligible_ratio, kept, pinned) if self.leaves_out else 0
        return BlockCounts(kept, pinned, negligible)

    def kernel_mask(self) -> KernelMask | None:
        """The mask as kernels read it."""
        if self.mask is None:
            return None
        return KernelMask.of(
            self.mask.ordered(self.order, self.keys.order), keep_ratio=self.keep_ratio,
            negligible_ratio=self.negligible_ratio if self.leaves_out else 0.0, pinned_queries=self.pinned_queries,
            pinned_keys=self.pinned_keys, block_q=self.block_q, block_k=self.block_k, over_all=self.linear == "all",
        )  # fmt: skip

    def prepared(self, triton: bool) -> Prepared:
        """q, k and v, normed, rotated, in order, and their means over blocks; padded to whole query blocks if `triton`."""
        return prepare_qkv(
            self.q, self.k, self.v, order=self.order, q_norm=self.q_norm, k_norm=self.k_norm, positions=self.positions,
            rope_base=self.rope_base, keys=self.keys if self.cross else None, block_q=self.block_q, block_k=self.block_k, triton=triton,
        )  # fmt: skip


class BlockCounts(NamedTuple):
    """How many key blocks of each kind there are for a query block that is not pinned.

    Attributes:
        kept: Critical ones, pinned ones included.
        pinned: Those that all queries attend to: the first ones.
        negligible: Those that are left out, where that matters.
    """

    kept: int
    pinned: int
    negligible: int


READ_AS_THEY_LIE = ("q_weight", "q_bias", "k_weight", "k_bias", "proj", "order", "key_order")
_TYPES = get_type_hints(Arguments, include_extras=True)
INPUTS = tuple(name for name, kind in _TYPES.items() if Learns in (kind, *get_args(kind)))
assert Arguments._fields[: len(INPUTS)] == INPUTS, "inputs that may need a gradient come first"


class Needed(namedtuple("Needed", INPUTS)):
    """Whether each input needs a gradient (bool)."""

    __slots__ = ()

    @property
    def queries(self) -> bool:
        """Whether anything that makes queries does."""
        return self.q or self.q_weight or self.q_bias

    @property
    def keys(self) -> bool:
        """Whether anything that makes keys does."""
        return self.k or self.k_weight or self.k_bias

    @property
    def attention(self) -> bool:
        """Whether anything but Proj does, which needs the linear branch before Proj alone."""
        return self.queries or self.keys or self.v


class Gradients(namedtuple("Gradients", INPUTS, defaults=(None,) * len(INPUTS))):
    """Gradient of each input (`Tensor`), None where it is not needed."""

    __slots__ = ()


def _schema_type(kind: Any) -> str:
    """What `torch.library` calls a type: ``Tensor | None`` is ``Tensor?``."""
    if get_origin(kind) in (Union, types.UnionType):
        return f"{_schema_type(get_args(kind)[0])}?"
    words = {Learns: "Tensor", Tensor: "Tensor", SymInt: "SymInt", int: "int", float: "float", bool: "bool", str: "str"}
    return words[kind]


def schema(of: type, prefix: str = "") -> str:
    """The arguments of an operator of `torch.library` that takes the fields of a NamedTuple, in order: ``Tensor q, Tensor k, ...``."""
    return ", ".join(f"{_schema_type(kind)} {prefix}{name}" for name, kind in get_type_hints(of, include_extras=True).items())
