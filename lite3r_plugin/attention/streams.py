"""Attention of a call's tokens to those of the calls before it: what is kept of them, beside what the host's own cache holds.

A host hands the keys and values of earlier tokens from call to call. Those tensors are the truth: users look at them, cut them, and give
them to another call. What is kept beside them, the same keys prepared for attention (`ops.sla.KeyCache`), is found by the very tensors that
the site returned, and is used only while they are as they were. They are views of buffers with room at the end, into which later tokens
are written; so nothing is copied from call to call.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..adapter.layouts import TokenLayout
from ..adapter.sites import KeyValueCache
from ..config import Pin
from ..ops.qk_norm_rope import HeadNorm
from ..ops.sla import KeyCache
from ..tokens.layout import pinned_tokens

SPARE = 8  # room is made for one in so many tokens more than there are


@dataclasses.dataclass
class Stream:
    """The calls so far, of one site.

    Attributes:
        keys: Prepared keys and values.
        layout: Of the tokens of each call.
        positions: Of the tokens of each call, where keys are cached before norm and rotary embedding.
        norm: What tells the norm of the keys, there (`norm_as_it_is`).
        buffers: k and v as the host caches them, ``[B, H, room, D]``.
    """

    keys: KeyCache
    layout: TokenLayout | None
    positions: Tensor | None
    norm: Hashable
    buffers: tuple[Tensor, ...] = ()
    _version: int = 0

    @property
    def is_untouched(self) -> bool:
        """Whether nobody but the site wrote to the buffers."""
        return all(x._version == self._version for x in self.buffers)

    def cached(self, k: Tensor, v: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Write down k and v ``[B, H, n, D]`` behind `tokens` others, and give all of them ``[B, H, N, D]``."""
        end = tokens + k.shape[2]
        if not self.buffers or end > self.buffers[0].shape[2]:
            with torch.inference_mode(False):
                grown = tuple(x.new_zeros((*x.shape[:2], end + tokens // SPARE, x.shape[3])) for x in (k, v))
            for new, old in zip(grown, self.buffers, strict=bool(self.buffers)):
                new[:, :, :tokens] = old[:, :, :tokens]
            self.buffers = grown
        for buffer, x in zip(self.buffers, (k, v), strict=True):
            buffer[:, :, tokens:end] = x
        self._version = max(x._version for x in self.buffers)
        k, v = (x[:, :, :end] for x in self.buffers)
        return k, v


class Streams:
    """The streams of one site, by the keys that it returned last. A copy, also a pickled one, knows none, and prepares anew."""

    def __init__(self) -> None:
        self._known: Any = WeakTensorKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return Streams, ()

    def find(
        self, past: tuple[Tensor, Tensor], v: Tensor, layout: TokenLayout | None, positions: Tensor | None, norm: Hashable
    ) -> Stream | None:
        """The stream whose end `past` is, if a call with values `v` and with what else `Stream` is about goes on with it.

        None: it has to begin anew, from what `past` holds.
        """
        known = self._known.get(past[0])
        if known is None:
            return None
        stream, last = known
        ends_here = stream.keys.tokens == past[0].shape[2:-1].numel()
        if last is not past[1] or not ends_here or not stream.is_untouched or not stream.keys.takes(v):
            return None
        if (stream.layout, stream.norm) != (layout, norm):
            return None
        return stream if _same(stream.positions, positions) else None

    def keep(self, stream: Stream, k: Tensor, v: Tensor) -> None:
        """That `stream` ends with `k` and `v`."""
        self._known[k] = stream, v


class Positions:
    """Tells coordinates that have the same values: all sites of a frame are given one tensor, and each frame another one.

    Values are compared once for a tensor, since a GPU waits for that.
    """

    def __init__(self) -> None:
        self._seen: tuple[Any, int, Tensor] | None = None  # the last tensor, its version, the first one with its values; as one: threads

    def __reduce__(self) -> tuple[Any, ...]:
        return Positions, ()

    def of(self, positions: Tensor) -> Tensor:
        """The first tensor that had these values, if none with others came in between; else `positions`."""
        version = 0 if positions.is_inference() else positions._version
        seen = self._seen
        if seen is not None and seen[0]() is positions and seen[1] == version:
            return seen[2]
        shared = seen[2] if seen is not None and _same(seen[2], positions) else positions.clone()
        self._seen = weakref.ref(positions), version, shared
        return shared


def norm_as_it_is(norm: HeadNorm | None) -> Hashable:
    """What changes whenever the norm does: its kind, and which weights it has, written how often."""
    if norm is None:
        return None
    weights = ((id(x), 0 if x is None or x.is_inference() else x._version) for x in (norm.weight, norm.bias))
    return norm.kind, norm.eps, *weights


def in_calls(x: Tensor, cache: KeyValueCache, tokens: int) -> Tensor:
    """Keys or values ``[B, H, N, D]`` as the host caches them, where a call has `tokens` tokens."""
    return x.unflatten(2, (-1, tokens)) if cache.by_calls else x


def in_a_row(x: Tensor, cache: KeyValueCache) -> Tensor:
    """What the host caches as ``[B, H, N, D]``."""
    return x.flatten(2, 3) if cache.by_calls else x


def of_calls(layout: TokenLayout | None, calls: int) -> TokenLayout | None:
    """The layout of so many calls with the same one."""
    return None if layout is None else TokenLayout(layout.parts * calls, layout.reference)


def pinned_keys(layout: TokenLayout | None, pin: Pin, first: bool) -> int:
    """How many tokens of a call, the first in order, later ones always attend to: in the first call the reference view, too."""
    if layout is None or pin == "none":
        return 0
    together = TokenLayout(layout.parts * 2, layout.reference)  # a view is the reference of others
    return pinned_tokens(together, pin).keys - layout.special_tokens if first else layout.special_tokens


def pinned_queries(layout: TokenLayout | None, pin: Pin, first: bool) -> int:
    """How many tokens of a call, the first in order, attend to all tokens so far: the reference view is in the first call alone."""
    if layout is None:
        return 0
    found = pinned_tokens(layout, pin).queries
    return found if first else min(found, layout.special_tokens)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or (a.shape == b.shape and a.device == b.device and torch.equal(a, b))
