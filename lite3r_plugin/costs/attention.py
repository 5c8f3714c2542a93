"""From which length on sparse attention pays on this machine.

The times of both kinds of attention follow from four numbers for each chip, `AttentionCosts`. They are known for the
H100 (benchmarks/results); on another GPU they are measured once, by `measure`, and kept in the user's cache. Elsewhere
sparse attention runs in torch operators, which gather what they keep: there it is never taken to be faster.
`Lite3RConfig.dense_below` overrides all of this.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from ..ops.dispatch import constant_in_graphs
from .measure import measure
from .model import AttentionCosts, BreakEven, SparseShares, break_even_of
from .store import CostStore

logger = logging.getLogger(__name__)

H100 = AttentionCosts(dense=1.0e-8, slowdown=1.0, per_token=1.2e-5, per_call=0.4)
NEVER = BreakEven(gain=0, loss=0, tokens=0, call=0)
KNOWN = {"H100": H100, "H200": H100, "GH200": H100}  # by a word of the name of the GPU; all three are the same chip


class CostTable:
    """The costs of each device of this process, found once: known, measured before, or measured now.

    Args:
        store: Where measurements are kept.
        measure: Measures a GPU.
        name_of: The name of a GPU.
    """

    def __init__(
        self,
        store: CostStore | None = None,
        measure: Callable[[torch.device], AttentionCosts] = measure,
        name_of: Callable[[torch.device], str] = torch.cuda.get_device_name,
    ) -> None:
        self.store = store or CostStore()
        self.measure = measure
        self.name_of = name_of
        self._found: dict[torch.device, AttentionCosts] = {}

    def of(self, device: torch.device, may_measure: bool = True) -> AttentionCosts | None:
        """The costs on `device`, None where it is no CUDA GPU; where they are not known and may not be measured now, those of the H100."""
        if device.type != "cuda":
            return None
        found = self._found.get(device)
        if found is not None:
            return found
        name = self.name_of(device)
        found = next((costs for word, costs in KNOWN.items() if word in name.split()), None) or self.store.load(name)
        if found is None and may_measure:
            logger.warning("Lite3R measures once when sparse attention pays on %s; this takes some seconds", name)
            found = self.measure(device)
            self.store.save(name, found)
        if found is None:
            logger.warning(
                "When sparse attention pays on %s was never measured, and cannot be while a graph is compiled or captured: it is taken "
                "for an H100. Run the model once before that, or set Lite3RConfig.dense_below", name
            )  # fmt: skip
            return H100
        self._found[device] = found
        return found


TABLE = CostTable()


@constant_in_graphs
def break_even(device: torch.device, kept: int, keys_per_mean: int, may_measure: bool) -> BreakEven:
    """When sparse attention pays at a site.

    Args:
        device: Where it would run.
        kept, keys_per_mean: The `SparseShares` of the site, one by one: compilers compare integers by value, objects by identity.
        may_measure: Whether an unknown GPU may be measured now: not while a graph is captured or compiled.
    """
    costs = TABLE.of(device, may_measure)
    return NEVER if costs is None else break_even_of(costs, SparseShares(kept, keys_per_mean))
