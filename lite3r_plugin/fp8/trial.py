"""Whether a transformer block does what its site says of it: tried before it is fused, since what a fork does shows in no name."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..adapter.sites import AttentionSite
from ..adapter.trials import RandomCopies, require_equal, structure, trial
from ..errors import AdapterError, short
from ..wrapper import argument_defaults, argument_names, asked_for, by_name, forward_parameters
from .block import block_forward


@dataclass(frozen=True)
class BlockVerdict:
    """What a trial found.

    Attributes:
        refused: Why the block must run as it is; None where it does what is said of it.
        passed: Its arguments that are known to go to the attention, under the same names, and nowhere else.
    """

    refused: str | None
    passed: frozenset[str] = frozenset()


class BlockTrials:
    """Compares blocks with the definition of `PreNormBlock`, once for those that are alike in all but the values of parameters.

    The attention and the Linears of the MLP, whatever they are by now, are others in a trial, of which neither is taken for granted.
    """

    def __init__(self) -> None:
        self._copies = RandomCopies()
        self._verdicts: dict[Hashable, BlockVerdict] = {}

    def of(self, site: AttentionSite, host: nn.Module) -> BlockVerdict:
        """What the trial of the block of `site` found, which is `host`. Nothing in the host changes."""
        block = site.block
        assert block is not None
        attention = host.get_submodule(site.fqn[len(block.fqn) + 1 :])
        linears: dict[nn.Module, Any] = {linear: linear for linear in (host.get_submodule(block.up), host.get_submodule(block.down))}
        # Of a site the signature says nothing; it remembers its host's.
        names = tuple(getattr(attention, "argument_names", None) or argument_names(attention) or ())
        defaults: dict[str, Any] = getattr(attention, "argument_defaults", None) or argument_defaults(attention)
        sizes = tuple((linear.in_features, linear.out_features, linear.bias is None) for linear in linears.values())
        inside = site.fqn[len(block.fqn) :], block.up, block.down, block.activation, block.norm1, block.norm2, block.gain1, block.gain2
        key = (structure(host, {attention: attention, **linears}), sizes, inside, names, tuple(defaults.items()))
        if key not in self._verdicts:
            try:
                with trial():
                    stand_in = _StandIn(names, defaults)
                    copied = self._copies.of(host, {attention: stand_in, **self._copies.linears(linears)})
                    self._verdicts[key] = self._try(site, copied, stand_in)
            except AdapterError as error:
                self._verdicts[key] = BlockVerdict(str(error))
        return self._verdicts[key]

    def _try(self, site: AttentionSite, host: nn.Module, stand_in: _StandIn) -> BlockVerdict:
        block = site.block
        assert block is not None
        width = host.get_submodule(block.up).in_features
        parameters = list((forward_parameters(host) or {}).values())[1:]
        needed = {p.name: self._copies.positions(2, 3, 2) for p in parameters if p.default is p.empty and p.name in stand_in.names[1:]}
        if reason := self._differs(site, host, stand_in, width, needed):
            return BlockVerdict(reason)
        passed = list(needed)
        for name in (argument_names(host) or ())[1:]:
            given = needed | {name: self._copies.positions(2, 3, 2)}
            if name in stand_in.names[1:] and name not in needed and self._differs(site, host, stand_in, width, given) is None:
                passed.append(name)
        return BlockVerdict(None, frozenset(passed))

    def _differs(self, site: AttentionSite, host: nn.Module, stand_in: _StandIn, width: Any, given: Mapping[str, Tensor]) -> str | None:
        """Why the block gives something else than its definition, or gives its attention something else; None where it does not."""
        x = self._copies.tokens(2, 3, width)
        stand_in.given = {}
        try:
            found = host.forward(x.clone(), **given)
            seen = stand_in.given
            if seen.keys() != given.keys() or any(seen[name] is not value for name, value in given.items()):
                return f"it gives its attention {list(seen)} where it is given {list(given)}"
            require_equal(found, block_forward(host, site, x, **given), "the block's own forward")
        except AdapterError as error:
            return str(error)
        except Exception as error:  # whatever a fork's own code raises
            return f"its forward cannot be tried ({short(error)})"
        return None


class _StandIn(nn.Module):
    """An attention in name: it mixes tokens and channels, and remembers what else it was given."""

    def __init__(self, names: tuple[str, ...], defaults: Mapping[str, Any]) -> None:
        super().__init__()
        self.names, self.defaults = names, defaults
        self.given: dict[str, Any] = {}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given: dict[str, Any] = by_name(self.names[1:], args) | kwargs
        given |= {f"number {i + 2}": value for i, value in enumerate(args) if i + 1 >= len(self.names)}  # of an attention with *args
        self.given = asked_for(given, self.defaults)
        return x.flip(-1) * 0.7 + x.roll(1, -2)
