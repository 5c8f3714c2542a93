"""A recorder of forwards that needs no GPU: what was recorded is a list of operators, which a replay runs without the model's Python."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree


class Tape:
    """Stands in for CUDA graphs: reads and writes the tensors that were there when it recorded, and refuses what waits for values.

    Attributes:
        made: All that were made.
        recorded, released, warmed: How often it was called.
        waits: Seconds that a call is said to take.
        inside: How many threads replay at a time, the most.
    """

    made: ClassVar[list[Tape]] = []

    def __init__(self) -> None:
        self.made.append(self)
        self.recorded = self.released = self.warmed = 0
        self.waits = 0.0
        self.inside = self.most_inside = 0

    def why_not(self, device: torch.device) -> str | None:
        return None

    def warm_up(self, call: Callable[[], Any], device: torch.device) -> float:
        self.warmed += 1
        call()
        return self.waits

    def record(self, call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], object], Any]:
        outputs = call()
        leaves, _ = _pytree.tree_flatten(outputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

        def flat() -> list[Any]:
            return [leaf for leaf in _pytree.tree_flatten(call())[0] if isinstance(leaf, torch.Tensor)]

        tape = make_fx(flat)()
        self.recorded += 1

        def replay() -> None:
            with torch.no_grad():
                for there, now in zip(tensors, tape(), strict=True):
                    there.copy_(now)

        return replay, outputs

    @contextlib.contextmanager
    def in_turn(self, device: torch.device) -> Iterator[None]:
        self.inside += 1
        self.most_inside = max(self.inside, self.most_inside)
        time.sleep(0.002)  # lets other threads come
        yield
        self.inside -= 1

    def held_bytes(self) -> int:
        return 0

    def release(self) -> None:
        self.released += 1
