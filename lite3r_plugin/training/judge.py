"""How far a model's outputs are from those with dense attention, for linear branches that are only tried."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..attention.branch import branch_weight
from ..attention.inputs import AttentionInputs
from ..attention.module import SparseLinearAttention, Substitute
from .draws import drawing
from .outputs import OutputReader, Outputs, compare, moved, tensors_in
from .record import run_on
from .teacher import without_lora

Errors = dict[str, float]
Weights = Mapping[str, Tensor | None]
"""By the name of a site, the Proj ``[D, D]`` to try, None for none; a site that is not named has its own."""

KINDS = {"depth": ("depth",), "points": ("points",), "cameras": ("rotation", "translation", "focal")}


class Judge:
    """Compares outputs with those of dense attention, on inputs that it keeps; nothing is written into the model.

    The first `most` inputs are kept as they are given, and of their dense outputs a copy on the CPU. Each input is run with random numbers
    of its own, the same each time.

    Args:
        model: The model.
        sites: Its sparse sites by name.
        reader: Reads what the model returns.
        most: How many inputs to keep.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, SparseLinearAttention], reader: OutputReader, most: int) -> None:
        self._model, self._sites, self._reader, self._most = model, sites, reader, most
        self._device = next(model.parameters()).device
        self._kept: list[tuple[int, Any, Outputs]] = []
        self._sparse: list[Errors] = []

    def __len__(self) -> int:
        """How many inputs are kept."""
        return len(self._kept)

    def see(self, index: int, given: Any, output: Any) -> None:
        """Take the input number `index`, and what the model returned for it without any linear branch.

        Raises:
            AdapterError: outputs cannot be compared.
        """
        if index < self._most and (expected := self.keep(index, given)) is not None:
            self._sparse.append(kinds(compare(self._reader.read(output), expected)))

    def keep(self, index: int, given: Any) -> Outputs | None:
        """Take the input number `index`, and return what the model makes of it with dense attention; None of one with nothing in it."""
        dense = dict.fromkeys(self._sites, _dense)
        with substituted(self._sites, dense), without_lora(self._model), drawing(index, self._device):
            expected = self._reader.read(run_on(self._model, given))
        if not any(tensor.numel() for tensor in tensors_in(expected)):
            return None
        self._kept.append((index, given, moved(expected, "cpu")))
        return expected

    def without_branch(self) -> Errors:
        """The errors without any linear branch, as they were seen: means over the inputs."""
        return _mean(self._sparse)

    def errors(self, weights: Callable[[int], Weights], done: Callable[[], object]) -> Errors:
        """The errors with other branches: means over the inputs. One forward for each of them.

        Args:
            weights: From the number of an input to the branches to try on it.
            done: Called after each input.
        """

        def made(index: int) -> Mapping[str, Substitute]:
            tried = weights(index)
            return {fqn: functools.partial(_sparse, weight=tried[fqn]) if fqn in tried else _as_it_is for fqn in self._sites}

        found = []
        for outputs, expected in self.outputs(made):
            found.append(kinds(compare(outputs, expected)))
            done()
        return _mean(found)

    def outputs(self, substitutes: Callable[[int], Mapping[str, Substitute]]) -> Iterator[tuple[Outputs, Outputs]]:
        """What the model returns for each input with other attention, and with dense attention, both where the model is.

        Args:
            substitutes: From the number of an input to what takes the place of attention, by site.
        """
        for index, given, expected in self._kept:
            with substituted(self._sites, substitutes(index)), drawing(index, self._device):
                outputs = self._reader.read(run_on(self._model, given))
            yield outputs, moved(expected, tensors_in(outputs)[0].device)


@contextlib.contextmanager
def substituted(sites: Mapping[str, SparseLinearAttention], substitutes: Mapping[str, Substitute]) -> Iterator[None]:
    """Let `substitutes` take the place of the attention of `sites`, both by name, inside the context."""
    with contextlib.ExitStack() as stack:
        for fqn, substitute in substitutes.items():
            stack.enter_context(sites[fqn].substitute(substitute))
        yield


def kinds(losses: Mapping[str, Tensor]) -> Errors:
    """Losses of outputs, summed up by what people look at: depth, points, cameras, or where there are none of these, outputs."""
    errors = {
        kind: sum(losses[name].item() for name in names if name in losses)
        for kind, names in KINDS.items()
        if any(name in losses for name in names)
    }
    if "cameras" not in errors and "camera" in losses:
        errors["cameras"] = losses["camera"].item()
    return errors or {"outputs": losses["other"].item()}


def _mean(errors: list[Errors]) -> Errors:
    return {kind: math.fsum(error[kind] for error in errors) / len(errors) for kind in (errors[0] if errors else ())}


def _dense(site: SparseLinearAttention, inputs: AttentionInputs) -> Tensor:
    return site.dense(inputs)


def _as_it_is(site: SparseLinearAttention, inputs: AttentionInputs) -> Tensor:
    return site.sparse_linear(inputs, branch_weight(site.proj_lin, inputs.v, site.site))


def _sparse(site: SparseLinearAttention, inputs: AttentionInputs, *, weight: Tensor | None) -> Tensor:
    if weight is None:
        return site.sparse_linear(inputs, None)
    return site.sparse_linear(inputs, weight.to(inputs.v.device, site.proj_lin.weight.dtype))
