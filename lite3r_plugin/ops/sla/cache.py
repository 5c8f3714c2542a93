"""Keys and values that come part by part, each part prepared once: what a stream of frames attends to.

Preparing (norm, rotary embedding, order, means of blocks) is linear in the number of keys, and for a frame that sees all frames before it
that is nearly all of the work once attention is sparse. So a part is prepared when it comes, and what is done for it then does not depend
on how many came before:

    tokens   [ pinned of part 1 | pinned of part 2 | ... ][ the others of part 1 | of part 2 | ... ]

Pinned tokens have to come first (`naive`). Those of a new part take the places of the first tokens behind the pinned ones, which go to the
end, before the other tokens of that part: any order is right, and a handful of tokens of another image in a block leaves it about as
compact as it was. Means are made again of the blocks that changed: those at both seams.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError
from ..dispatch import on_device_of, require_one_device, use_triton, without_autocast
from ..options import check_block_choice
from ..qk_norm_rope import NO_NORM, HeadNorm, Prepared, norm_tensors, prepare_qkv
from ..qk_norm_rope.naive import block_means as mean_over_blocks
from . import forward, naive
from .api import KeyTokens, check_blocks, check_options, check_tensors
from .signature import Arguments

SPARE = 8  # room is made for one in so many tokens more than there are


class Queries(NamedTuple):
    """The queries of the part that came last.

    Attributes:
        q: ``[B, H, M, D]`` as they were given, whose shape counts.
        prepared: Normed, rotated, in order; padded where kernels run.
        order: ``[M]`` int, or None.
    """

    q: Tensor
    prepared: Prepared
    order: Tensor | None

    @property
    def keys(self) -> Tensor:
        """The keys of the same tokens ``[B, H, M, D]``, normed and rotated, in host order."""
        return forward.in_host_order(self.prepared.k[:, :, : self.q.shape[-2]], self.order, -2)


class KeyCache:
    """Prepared keys and values of the parts that came so far. It has no gradients.

    Args:
        block_q, block_k: Tokens per block.

    Attributes:
        tokens: N, how many there are.
        pinned_tokens: How many of them come first, to which all queries attend.
    """

    def __init__(self, block_q: int = 128, block_k: int = 64) -> None:
        check_blocks(block_q, block_k)
        self.block_q, self.block_k = block_q, block_k
        self.tokens = self.pinned_tokens = 0
        self._keys: tuple[Tensor, ...] = ()  # k and v, [B, H, room, D], zeros after N tokens
        self._means: tuple[Tensor, ...] = ()  # of both, [B, H, room / block_k, D] FP32

    @property
    def k(self) -> Tensor:
        """``[B, H, N, D]``, normed, rotated and in order."""
        return self._keys[0][:, :, : self.tokens]

    @property
    def v(self) -> Tensor:
        """``[B, H, N, D]``, in the same order."""
        return self._keys[1][:, :, : self.tokens]

    def takes(self, v: Tensor) -> bool:
        """Whether values ``[B, H, n, D]`` are like those that are kept."""
        kept = self._keys[1] if self._keys else v
        return (*v.shape[:2], v.shape[3], v.dtype, v.device) == (*kept.shape[:2], kept.shape[3], kept.dtype, kept.device)

    @torch.no_grad()
    def extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        order: Tensor | None = None,
        pinned_tokens: int = 0,
        q_norm: HeadNorm | None = None,
        k_norm: HeadNorm | None = None,
        positions: Tensor | None = None,
        rope_base: float | None = None,
        backend: str = "auto",
    ) -> Queries:
        """Prepare a part, and keep its keys and values.

        Args:
            q, k, v: ``[B, H, n, D]``, any strides, of the tokens of the part.
            order: ``[n]`` int permutation that makes blocks of consecutive tokens compact, pinned tokens first; or None.
            pinned_tokens: How many of them, in that order, all queries attend to from now on.
            q_norm, k_norm, positions, rope_base, backend: As of `sparse_linear_attention`.

        Returns:
            The queries, for `attend` and `attend_to_all`.

        Raises:
            ConfigError: tensors do not fit each other, or what is kept already.
            BackendError: the backend cannot run.
        """
        check_tensors(q, k, v, order, positions, None, pinned_tokens, None)
        if self._keys and not self.takes(v):
            batch, heads, _, dim = self._keys[1].shape
            raise ConfigError(
                f"the cache holds keys of shape [{batch}, {heads}, N, {dim}] {self._keys[1].dtype}, got {list(v.shape)} {v.dtype}: begin "
                "another one"
            )
        q_norm, k_norm = q_norm or NO_NORM, k_norm or NO_NORM
        require_one_device(v, queries=q, keys=k, order=order, positions=positions, **norm_tensors(q_norm, k_norm))
        triton = use_triton(backend, v)
        with without_autocast(v), on_device_of(v):
            prepared = prepare_qkv(
                q, k, v, order=order, q_norm=q_norm, k_norm=k_norm, positions=positions, rope_base=rope_base, block_q=self.block_q,
                block_k=self.block_k, triton=triton,
            )  # fmt: skip
            self._append(prepared.k[:, :, : k.shape[-2]], prepared.v[:, :, : k.shape[-2]], pinned_tokens)
        return Queries(q, prepared, order)

    @torch.no_grad()
    def attend_to_all(self, queries: Queries, *, scale: float | None = None) -> Tensor:
        """Attention of the queries to all keys: ``[B, H, M, D]`` in v's dtype, in host order."""
        q = queries.prepared.q[:, :, : queries.q.shape[-2]]
        return forward.in_host_order(F.scaled_dot_product_attention(q, self.k, self.v, scale=scale), queries.order, -2)

    @torch.no_grad()
    def attend(
        self,
        queries: Queries,
        *,
        keep_ratio: float,
        negligible_ratio: float = 0.0,
        pinned_tokens: int = 0,
        scale: float | None = None,
        linear: str = "none",
        feature_map: str = "softmax",
        proj: Tensor | None = None,
        block_means: bool = False,
        block_choice: str = "mean",
        backend: str = "auto",
    ) -> Tensor:
        """Sparse-linear attention of the queries to the keys, as `sparse_linear_attention` with ``keys=``.

        Args:
            queries: What `extend` returned last.
            pinned_tokens: How many of the first of them, in order, attend to all keys. Those alone do, not the rest of their block:
                for a few of them that would be a block that takes longer than all others together.
            keep_ratio, negligible_ratio, scale, linear, feature_map, proj, block_means, block_choice, backend: As of
                `sparse_linear_attention`.

        Returns:
            ``[B, H, M, D]`` in v's dtype, in host order.

        Raises:
            BackendError, ConfigError: As of `sparse_linear_attention`.
        """
        check_options(keep_ratio, negligible_ratio, scale, None, linear, feature_map, backend)
        check_block_choice(block_choice, block_means, negligible_ratio)
        check_tensors(queries.q, self.k, self.v, queries.order, None, proj, pinned_tokens, KeyTokens(pinned_tokens=self.pinned_tokens))
        proj = naive.needed_proj(linear, proj)
        arguments = Arguments(
            queries.q, self.k, self.v, None, None, None, None, proj, order=None, positions=None, pinned_tokens=0, keep_ratio=keep_ratio,
            negligible_ratio=negligible_ratio, q_kind=None, q_eps=0.0, k_kind=None, k_eps=0.0, rope_base=None, scale=scale, linear=linear,
            feature_map=feature_map, block_means=block_means, block_q=self.block_q, block_k=self.block_k, backend=backend, cross=True,
            key_pinned_tokens=self.pinned_tokens, block_choice=block_choice,
        )  # fmt: skip
        columns = arguments.columns
        k, v = self._keys if forward.on_triton(arguments) else (self.k, self.v)
        k_mean, v_mean = (mean[:, :, :columns].contiguous() for mean in self._means)
        prepared = queries.prepared._replace(k=k, v=v, k_mean=k_mean, v_mean=v_mean)
        out, _ = forward.run(arguments, prepared=prepared)
        if pinned_tokens:
            q = queries.prepared.q[:, :, :pinned_tokens]
            exact = F.scaled_dot_product_attention(q, self.k, self.v, scale=scale)
            if linear == "all" and proj is not None:
                exact = exact + naive.linear_attention(q, self.k, self.v, proj=proj, feature_map=feature_map)
            out = torch.cat((exact, out[:, :, pinned_tokens:]), 2)
        return forward.in_host_order(out, queries.order, -2)

    def _append(self, k: Tensor, v: Tensor, pinned: int) -> None:
        """Of a part in order, whose first `pinned` tokens are to be pinned."""
        behind, end = self.pinned_tokens, self.tokens
        moved = min(pinned, end - behind)
        self._make_room(k, v, end + k.shape[2])
        tail = max(end, behind + pinned)
        for kept, new in zip(self._keys, (k, v), strict=True):
            away = kept[:, :, behind : behind + moved].clone()
            kept[:, :, behind : behind + pinned] = new[:, :, :pinned]
            kept[:, :, tail : tail + moved] = away
            kept[:, :, tail + moved : end + k.shape[2]] = new[:, :, pinned:]
        self.tokens, self.pinned_tokens = end + k.shape[2], behind + pinned
        if pinned:
            self._pool(behind, min(self.pinned_tokens, end))
        self._pool(end, self.tokens)

    def _pool(self, first: int, last: int) -> None:
        """Make the means of the blocks of the tokens `first` to `last` again."""
        start, stop = first // self.block_k, -(-last // self.block_k)
        if start >= stop:
            return
        some = slice(start * self.block_k, min(stop * self.block_k, self.tokens))
        for kept, means in zip(self._keys, self._means, strict=True):
            means[:, :, start:stop] = mean_over_blocks(kept[:, :, some], self.block_k)

    def _make_room(self, k: Tensor, v: Tensor, tokens: int) -> None:
        """For `tokens` tokens like these."""
        if self._keys and tokens <= self._keys[0].shape[2]:
            return
        room = -(-(tokens + (tokens // SPARE if self._keys else 0)) // self.block_q) * self.block_q
        with torch.inference_mode(False):  # it is written to in later forwards, inside of inference mode and outside
            grown = tuple(x.new_zeros((*x.shape[:2], room, x.shape[3])) for x in (k, v))
            wide = torch.promote_types(k.dtype, torch.float32)
            means = tuple(x.new_zeros((*x.shape[:2], room // self.block_k, x.shape[3]), dtype=wide) for x in (k, v))
        for new, old in zip((*grown, *means), (*self._keys, *self._means), strict=bool(self._keys)):
            new[:, :, : old.shape[2]] = old
        self._keys, self._means = grown, means
