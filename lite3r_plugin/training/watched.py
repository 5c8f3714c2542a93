"""The attention sites and transformer blocks of a model whose outputs are compared with the teacher's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapter.layouts import TokenLayout, TokenSource
from ..adapter.sites import AttentionSite
from ..apply.lookup import Inventory
from ..attention.module import SparseLinearAttention
from ..attention.state import ModelState
from ..errors import AdapterError
from ..tokens.layout import token_order
from ..wrapper import host_of
from .config import LOCAL_LOSSES, AttentionLoss
from .losses import feature_loss


@dataclass(frozen=True)
class Block:
    """A transformer block.

    Attributes:
        module: It, or what stands in for it.
        site: The attention site in it, by which its tokens are laid out.
        state: Of the model.
    """

    module: nn.Module
    site: AttentionSite
    state: ModelState

    def layout(self, tokens: int) -> TokenLayout | None:
        """How a sequence of `tokens` is laid out, by its `TokenSource` and the last images; None where that is not known."""
        source = self.site.tokens
        if not isinstance(source, TokenSource):
            return None
        tracker = self.state.trackers.get(source)
        if tracker is not None and tracker.last is not None:
            return source.layout(tracker.last, tokens)
        return source.layout((1, tokens - source.special_tokens - source.trailing_tokens), tokens) if self.site.scope != "global" else None


@dataclass(frozen=True)
class Watched:
    """Sites and blocks by the names that messages use; `compare` takes their outputs by these names.

    Attributes:
        sites: The attention modules that run sparse.
        blocks: The transformer blocks.
        kind: How outputs of sites are compared.
    """

    sites: dict[str, SparseLinearAttention]
    blocks: dict[str, Block]
    kind: AttentionLoss

    @classmethod
    def of(cls, found: Inventory, *, sites: bool, blocks: bool, kind: AttentionLoss) -> Watched:
        """Those of a model: its `sites`, its `blocks`, or both."""
        attention = found.attention.items() if sites else ()
        sparse = {site: f"attention {name}" for name, site in reversed(attention) if site.sparse and site.keep_ratio < 1}
        around: dict[nn.Module, tuple[ModelState, str]] = {}
        for state in found.states if blocks else ():
            around |= {module: (state, name) for name, module in state.blocks.items()}
        named: dict[nn.Module, tuple[str, Block]] = {}
        for name, module in found.modules.items():
            if (host := host_of(module)) in around and module not in named:
                state, own = around[host]
                site = next(site for site in state.sites if f"{site.fqn}.".startswith(f"{own}."))
                named[module] = f"block {name}", Block(module, site, state)
        return cls({name: site for site, name in reversed(sparse.items())}, dict(named.values()), kind)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All of them by name."""
        return {**self.sites, **{name: block.module for name, block in self.blocks.items()}}

    def within(self, name: str) -> list[str]:
        """The names of a block and of the sites in it."""
        inside = set(self.blocks[name].module.modules())
        return [name, *(site for site, module in self.sites.items() if module in inside)]

    def compare(
        self, mine: Mapping[str, list[Tensor]], true: Mapping[str, list[Tensor]], wanted: Iterable[str] = LOCAL_LOSSES
    ) -> dict[str, list[Tensor]]:
        """Errors of a student's outputs, by the names of `wanted` losses; one number for each site or block, its mean over calls.

        Raises:
            AdapterError: student and teacher did not run the same.
        """
        errors: dict[str, list[Tensor]] = {}
        for name, outputs in mine.items():
            expected = true.get(name, ())
            if len(expected) != len(outputs):
                raise AdapterError(
                    f"the {name} ran {len(outputs)} times in the student and {len(expected)} times in the teacher, or was not seen there "
                    "because it had run compiled before: then call torch.compiler.reset() first"
                )
            calls: dict[str, list[Tensor]] = {}
            for student, teacher in zip(outputs, expected, strict=True):
                for loss, (s, t) in self._split(name, student, teacher).items():
                    if loss in wanted:
                        calls.setdefault(loss, []).append(feature_loss(s, t, self.kind if loss == "attention" else "normalized"))
            for loss, values in calls.items():
                errors.setdefault(loss, []).append(torch.stack(values).mean())
        return errors

    def _split(self, name: str, student: Tensor, teacher: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        if name in self.sites:
            return {"attention": (student, teacher)}
        layout = self.blocks[name].layout(student.shape[1]) if student.dim() == 3 else None
        if layout is None or not layout.special_tokens or student.shape != teacher.shape:
            return {"blocks": (student, teacher)}
        both = token_order(layout, student.device).long().tensor_split((layout.special_tokens,))
        special, patches = (tokens.sort().values for tokens in both)  # sums in the order of the sequence
        return {"cameras": (student[:, special], teacher[:, special]), "blocks": (student[:, patches], teacher[:, patches])}
