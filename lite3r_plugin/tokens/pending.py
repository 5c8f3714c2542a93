"""Forwards whose backward pass is still to come: which of them gradient checkpointing runs again.

Checkpointing runs a part of a forward again inside a backward pass. The images are often outside of that part, and the last
images that were seen may be those of another forward. So each forward with gradients is remembered with what was seen of it
(`Seen`: the grid of its images, or its layout), from then on until it cannot be recomputed any more:

    images seen, gradients on ----------------------------> remembered
    a site returns an output that needs gradients --------> watched: a hook waits for the gradient of that output
    images seen without gradients, then such an output ---> remembered and watched at once (only a part of the model learns)
    the gradient of that output arrives ------------------> forgotten: all of the forward behind it has been recomputed
    new images, after a backward pass that recomputed ----> those not watched are forgotten: reentrant checkpointing runs sites
                                                            without gradients, so that there was no output to watch
    more than `MAX_PENDING` ------------------------------> the oldest is forgotten

A site that asks for its layout inside a backward pass is being recomputed. If the images were seen in that same pass, they
are recomputed as well, and the last ones are right. Otherwise it is a forward that is remembered, of those whose tokens the
sequence can have; if that leaves two that differ, nobody knows which is meant, and it raises.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from ..errors import LayoutError

MAX_PENDING = 64
NO_BACKWARD = -1
Seen = Any  # what can be hashed and compared, and read in a message


class RecomputedError(LayoutError):
    """It cannot be told which of several forwards is recomputed: nothing else can stand in for the layout, as where tokens have none."""


def backward_pass() -> int:
    """A number of the backward pass that runs now, in this thread, or `NO_BACKWARD`."""
    return torch._C._current_graph_task_id()


class _Here(threading.local):
    """What this thread has seen.

    Attributes:
        images_in: The backward pass in which images were last seen.
        new: Whether the last images are not those of a remembered forward yet.
        forward: The forward that was remembered last.
    """

    def __init__(self) -> None:
        self.images_in = NO_BACKWARD
        self.new = False
        self.forward: _Forward | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Here, ()


class PendingForwards:
    """See the module. Its methods must not be called in code that a compiler traces. Threads may share it."""

    def __init__(self) -> None:
        # Read as a whole, and changed one entry at a time, which no other thread sees half done: hooks run in autograd's threads.
        self._forwards: dict[_Forward, None] = {}
        self._here = _Here()
        self._recomputed = False  # whether a site was recomputed since the last images

    def saw_images(self, seen: Seen) -> None:
        """The model was given images, of which `seen` was seen."""
        self._here.images_in = backward_pass()
        self._here.new = True
        if self._recomputed and self._here.images_in == NO_BACKWARD:
            for forward in [forward for forward in list(self._forwards) if not forward.watched and forward.thread == get_ident()]:
                self._forwards.pop(forward, None)
            self._recomputed = False
        if torch.is_grad_enabled():
            self._remember(seen)

    def saw_output(self, out: Tensor, seen: Seen) -> None:
        """A site returned `out` in a forward of which `seen` was seen last."""
        if not out.requires_grad or self._here.images_in != NO_BACKWARD or backward_pass() != NO_BACKWARD:
            return
        self._remember(seen)
        forward = self._here.forward
        if forward in self._forwards and not forward.watched:
            forward.watched = True
            out.register_hook(functools.partial(self._ended, forward))

    def recomputed(self, last: tuple[Seen, ...], fits: Callable[[Seen], bool], fqn: str) -> tuple[Seen, ...]:
        """What was seen of the forward that is recomputed now, in a tuple, which is empty where that is nothing.

        Args:
            last: What was seen of the last images, if there were any; the answer where no forward is remembered that `fits`.
            fits: Whether the sequence of the site may be of such a forward.
            fqn: Name of the site.

        Raises:
            RecomputedError: it could be one of several.
        """
        if self._here.images_in == backward_pass():
            return last
        self._recomputed = True
        fitting = {forward.seen for forward in list(self._forwards) if fits(forward.seen)}
        if len(fitting) > 1:
            self._forwards.clear()
            raise RecomputedError(
                f"site {fqn!r} is recomputed by gradient checkpointing, but forwards on {', '.join(sorted(map(_words, fitting)))} came "
                "before this backward pass, and it cannot be told which is meant: call backward() after each forward, run those that "
                "need no gradients under torch.no_grad(), or switch checkpointing off"
            )
        return (fitting.pop(),) if fitting else last

    def _remember(self, seen: Seen) -> None:
        if self._here.new and self._here.images_in == NO_BACKWARD:
            self._here.forward, self._here.new = _Forward(seen), False
            self._forwards[self._here.forward] = None
            for forward in list(self._forwards)[:-MAX_PENDING]:
                self._forwards.pop(forward, None)

    def _ended(self, forward: _Forward, grad: Tensor) -> None:
        self._forwards.pop(forward, None)


class _Forward:
    """One forward of a model with gradients, and the thread that runs it."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen
        self.watched = False
        self.thread = get_ident()


def _words(seen: Seen) -> str:
    return "{} x {} patches".format(*seen) if isinstance(seen, tuple) else str(seen)
