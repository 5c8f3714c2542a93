"""Which views a process holds in the running forward, and tensors along views taken apart and put together again.

Many models take the first view they are given for the reference, by a token or an embedding of its own. A process whose first view
is not that of the scene puts a *stand-in* in front: a copy of its own first view, which nobody attends to and whose results nobody
gets. What the model does to view 0 is done to it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ParallelError
from ..runtime.values import exchanged


@functools.lru_cache(maxsize=64)
def view_counts(views: int, ranks: int, stand_in: bool = True) -> tuple[int, ...]:
    """How many of `views` views each of `ranks` processes gets, one after the other, at least one each.

    With `stand_in` all processes but the first run one view more than they have, so that the first one gets more.

    Raises:
        ParallelError: there are fewer views than processes.
    """
    if views < ranks:
        raise ParallelError(f"{views} views cannot be spread over {ranks} processes: each needs one; start fewer")
    counts = [1] * ranks
    for _ in range(views - ranks):
        runs = [(count + (stand_in and rank > 0), count) for rank, count in enumerate(counts)]
        counts[runs.index(min(runs))] += 1
    return tuple(counts)


@dataclass(frozen=True)
class Spread:
    """The views of one forward.

    Attributes:
        counts: Views of each process, stand-ins not counted.
        rank: The place of this process.
        stand_in: Whether each process but the first has a stand-in in front.
        batch: The leading dimension of the images, 1 where they are ``[S, 3, H, W]``.
        bare: Whether they are that.
    """

    counts: tuple[int, ...]
    rank: int
    stand_in: bool
    batch: int
    bare: bool

    @property
    def views(self) -> int:
        """S, of all processes."""
        return sum(self.counts)

    @property
    def skipped(self) -> int:
        """Stand-ins of this process, 0 or 1."""
        return int(self.stand_in and self.rank > 0)

    @property
    def held(self) -> int:
        """Views that the model sees in this process, stand-in included."""
        return self.counts[self.rank] + self.skipped

    @property
    def first(self) -> int:
        """The number in the scene of the first view of this process."""
        return sum(self.counts[: self.rank])

    def tokens(self, held: int) -> tuple[int, ...]:
        """Tokens of each process at a site that has `held` of this process's views, stand-in included.

        Raises:
            ParallelError: these are not so many of each view.
        """
        if held % self.held:
            raise ParallelError(
                f"a sequence of {held} tokens is not made of as many tokens of each of {self.held} views, so that it cannot be spread"
            )
        return tuple(held // self.held * count for count in self.counts)

    def own(self, x: Tensor, dim: int) -> Tensor:
        """The views of this process of a tensor of the views of the scene along `dim`, with a stand-in."""
        own = x.narrow(dim, self.first, self.counts[self.rank])
        return self.with_stand_in(own, dim)

    def with_stand_in(self, x: Tensor, dim: int) -> Tensor:
        """Views of this process along `dim`, with a stand-in in front where it has one."""
        return torch.cat((x.narrow(dim, 0, 1), x), dim) if self.skipped else x

    def without_stand_in(self, x: Tensor, dim: int) -> Tensor:
        """The other way round."""
        return x.narrow(dim, self.skipped, x.shape[dim] - self.skipped)

    def dim(self, x: Tensor, views: int) -> int | None:
        """The dimension of `x` along `views` views: the second, behind the batch, or the first where images have no batch; else None."""
        return dim_of_views(x, self.batch, views, self.bare)


def dim_of_views(x: Tensor, batch: int, views: int, bare: bool) -> int | None:
    """As `Spread.dim`."""
    if x.dim() >= 2 and x.shape[0] == batch and x.shape[1] == views:
        return 1
    return 0 if bare and x.dim() >= 1 and x.shape[0] == views else None


def images_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The images that a forward was given: its first tensor argument, ``[B, S, 3, H, W]`` or ``[S, 3, H, W]``.

    Raises:
        ParallelError: there is none of that shape.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            if value.dim() in (4, 5):
                return value
            raise ParallelError(f"images are [B, S, 3, H, W] or [S, 3, H, W], but the first tensor of the call is {list(value.shape)}")
    raise ParallelError("views are spread over processes by the images, the first tensor of the call of a model, and this call has none")


def along_views(value: Any, batch: int, views: int, bare: bool, change: Callable[[Tensor, int], Tensor]) -> Any:
    """`value`, what a forward takes or gives, with ``change(tensor, dim)`` in the place of each tensor along views."""

    def changed(x: Tensor) -> Tensor:
        dim = dim_of_views(x, batch, views, bare)
        return x if dim is None else change(x, dim)

    return exchanged(value, changed)
