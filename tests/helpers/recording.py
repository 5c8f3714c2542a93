"""A recorder of forwards that needs no GPU: what was recorded is a list of operators, which a replay runs without the model's Python."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(Exception):
    """As CUDA graphs have none, there is no value yet."""


class Operators(TorchDispatchMode):
    """Takes note of every operator that runs, with its arguments and results, which stay alive: tensors are told apart by identity."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise Waits("the Python of the model waits for a value")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, (args, kwargs or {}), out))
        return out

    def replay(self, wanted: list[Tensor]) -> list[Tensor]:
        """What `wanted` are now, of the tensors that are not made by these operators."""
        now: dict[int, Tensor] = {}

        def value(x: Tensor) -> Tensor:
            return now.get(id(x), x)

        for func, given, out in self.calls:
            args, kwargs = _pytree.tree_map_only(Tensor, value, given)
            found = func(*args, **kwargs)
            now.update((id(x), y) for x, y in zip(tensors(out), tensors(found), strict=True) if y is not x)
        return [value(x) for x in wanted]


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


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

    def warm_up(self, call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
        self.warmed += 1
        return self.waits, call()

    def record(self, call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], object], Any]:
        try:
            with Operators() as operators:
                outputs = call()
        except Waits as error:
            there = error.__traceback__
            while there is not None and there.tb_next is not None and there.tb_next.tb_frame.f_code.co_filename != __file__:
                there = there.tb_next
            if there is not None:
                there.tb_next = None  # it comes from where the model asks, as an error of torch does
            raise
        made = tensors(outputs)
        self.recorded += 1

        def replay() -> None:
            with torch.no_grad():
                for there, now in zip(made, operators.replay(made), strict=True):
                    if now is not there:
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
