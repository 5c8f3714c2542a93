"""Copies of the parameters that learn: the last good ones, the best ones, their moving average."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..apply.ranks import is_shard


class Copy:
    """Values of parameters, on their device.

    Args:
        parameters: By name. Their values of now are copied.

    Attributes:
        values: The copies, by name, of DTensors as such.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.values: dict[str, Tensor] = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._plain = not any(map(is_shard, parameters.values()))

    @torch.no_grad()
    def take(self) -> None:
        """Copy the values that the parameters have now."""
        self._write(self.values.values(), self.parameters.values())

    @torch.no_grad()
    def give(self) -> None:
        """Let the parameters have these values."""
        self._write(self.parameters.values(), self.values.values())

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the parameters have these values inside the context, and their own afterwards."""
        own = Copy(self.parameters)
        try:
            self.give()
            yield
        finally:
            own.give()

    def _write(self, targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
        if self._plain:
            torch._foreach_copy_(list(targets), list(sources))  # pyright: ignore[reportPrivateImportUsage]
            return
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


class Average(Copy):
    """An exponential moving average (Polyak and Juditsky, 1992) that starts at the values of the first steps.

    Args:
        parameters: By name.
        decay: What is kept of the average in a step, at most: in step n, ``(1 + n) / (10 + n)`` where that is less.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        super().__init__(parameters)
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the values of now, after `step` steps."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for value, parameter in zip(self.values.values(), self.parameters.values(), strict=True):
            value.lerp_(parameter, share)
