"""What the forward pass on Triton keeps for the backward pass, by name, and how it travels through autograd.

Where only Proj learns, the linear branch before Proj is kept, one tensor of the size of the output. Where q, k, v (or the
norms before them) learn, the inputs and the output are kept, which the layers around the operator mostly keep as well,
and over marginal blocks the states; the ordered tensors are made again. Without a norm they are kept in place of the inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .signature import Arguments, Needed


class Saved(NamedTuple):
    """Tensors that are kept besides arguments and output; None what is not. All are None where autograd goes through torch operators.

    Attributes:
        linear: ``[B, M, H, D]`` in v's dtype, the linear branch before Proj in host order. Alone, where only Proj learns.
        lse: ``[B, H, padded]`` FP32, see `kernels.forward.Residuals`. Always there where more than Proj learns.
        bits: ``[B, H, query blocks, ceil(key blocks / 32)]`` int32, see `BlockMap`.
        skipped: As `bits`; None where it is the same.
        state, total, mu: Of the linear branch, see `kernels.forward.Residuals`.
        q, k, v: ``[B, H, padded, D]`` in order, where they are kept in place of the arguments.
        k_mean, v_mean: ``[B, H, key blocks, D]`` FP32, with them.
    """

    linear: Tensor | None = None
    lse: Tensor | None = None
    bits: Tensor | None = None
    skipped: Tensor | None = None
    state: Tensor | None = None
    total: Tensor | None = None
    mu: Tensor | None = None
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    k_mean: Tensor | None = None
    v_mean: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was kept: then torch operators ran."""
        return self.linear is None and self.lse is None

    def tensors(self) -> list[Tensor]:
        """What is kept, as an operator of `torch.library` returns it."""
        return [x for x in self if x is not None]

    @classmethod
    def of(cls, tensors: Iterable[Tensor], needed: Needed, arguments: Arguments) -> Saved:
        """From the list that `tensors` gave, for a call with these arguments."""
        tensors = list(tensors)
        return cls(**dict(zip(names(needed, arguments), tensors, strict=True))) if tensors else cls()


def keeps_ordered(arguments: Arguments) -> bool:
    """Whether q, k, v are kept in order and not as they came, where they are. With a norm both would be needed; of other keys than
    queries the number would not be known."""
    return not arguments.has_norm and not arguments.cross and arguments.q.dtype == arguments.k.dtype == arguments.v.dtype


def names(needed: Needed, arguments: Arguments) -> list[str]:
    """The fields of `Saved` that the forward pass fills, in order. They depend on no size and on no value of a tensor."""
    if not needed.attention:
        return ["linear"]
    fills = dict(
        lse=True, bits=True, skipped=arguments.skips, state=arguments.linear != "none", mu=arguments.per_row,
        q=keeps_ordered(arguments),
    )  # fmt: skip
    fills |= dict(total=fills["state"], k=fills["q"], v=fills["q"], k_mean=fills["q"], v_mean=fills["q"])
    return [name for name in Saved._fields if fills.get(name)]


def empty(needed: Needed, arguments: Arguments) -> Saved:
    """Tensors like those that the forward pass keeps, with no values in them."""
    v = arguments.v
    batch, heads, queries, dim = arguments.q.shape
    rows, columns = arguments.rows, arguments.columns
    marginal = arguments.per_row
    owners = (batch * heads, rows) if marginal else (batch, heads)
    words = (batch, heads, rows, -(-columns // 32)), torch.int32
    ordered, means = ((batch, heads, rows * arguments.block_q, dim), v.dtype), ((batch, heads, columns, dim), torch.float32)
    kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] = dict(
        linear=((batch, queries, heads, dim), v.dtype), lse=((batch, heads, rows * arguments.block_q), torch.float32), bits=words,
        skipped=words, state=((*owners, dim, dim), v.dtype if marginal else torch.float32), total=((*owners, dim), torch.float32),
        mu=((batch * heads, dim), torch.float32), q=ordered, k=ordered, v=ordered, k_mean=means, v_mean=means,
    )  # fmt: skip
    return Saved(**{name: v.new_empty(kinds[name][0], dtype=kinds[name][1]) for name in names(needed, arguments)})


_NOTHING = Arguments(*(None for _ in Arguments._fields))  # type: ignore[arg-type]


def keep(ctx: Any, needed: Needed, arguments: Arguments, out: Tensor, saved: Saved) -> None:
    """Keep in a context of autograd what the backward pass needs: with `saved` no more of arguments and output than it says."""
    kept: Any = arguments
    if not saved.is_empty:
        if not needed.attention:
            kept = _NOTHING._replace(proj=arguments.proj)
        elif saved.q is not None:
            kept = arguments._replace(q=None, k=None, v=None)  # type: ignore[arg-type]
    tensors = [x if isinstance(x, Tensor) else None for x in kept]
    ctx.save_for_backward(out if saved.lse is not None else None, *tensors, *saved)
    ctx.options = [None if isinstance(x, Tensor) else x for x in arguments]
    ctx.needed = needed


def kept(ctx: Any) -> tuple[Tensor | None, Saved, Needed, Arguments]:
    """What `keep` kept: output, `Saved`, `Needed` and the arguments, None what was not kept."""
    out, *tensors = ctx.saved_tensors
    count = len(ctx.options)
    arguments = Arguments(*[option if x is None else x for x, option in zip(tensors, ctx.options, strict=False)])
    return out, Saved(*tensors[count:]), ctx.needed, arguments
