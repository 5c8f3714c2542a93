"""Which Linears FP8 is about: those of the transformer blocks around the attention sites."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from torch import nn

from ..adapter.sites import AttentionSite
from ..config import INNER, Lite3RConfig, plain_name
from ..wrapper import around_and_itself, belongs_to_tuner, is_tuner_layer, tuner_around, was_exchanged
from .linear import Fp8Linear
from .qat import FakeQuantLinear

LEAST = 4
"""Blocks of a list of which the first and the last, and output projections, are told apart from the others."""

_OUTPUT = re.compile(r"(attn_)?(o|out|output)(_proj|_lin|_linear)?|proj(ection|_out)?|to_out|c_proj|dense|wo")
"""What attention calls its output projection, or what that is in, where its adapter does not say."""

_INPUT = re.compile(r"(q|k|v|kv|qkv|in)(_proj|_lin|_linear)?|(to_|w)(q|k|v|kv|qkv)|query|key|value|query_key_value|c_attn")
"""And what makes queries, keys and values."""

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass(frozen=True)
class BlockLinear:
    """A Linear of a transformer block.

    Attributes:
        module: It, as it is now: of class `Linear`, of a subclass, which may do something else and is left alone, a
            `FakeQuantLinear` or an `Fp8Linear`.
        names: Its fully qualified names in the model that Lite3R was applied to. Inside an adapter (PEFT) also that of the adapter,
            which has the name that the Linear had before.
        tuner: What adapts it, or keeps copies of it (PEFT); None where nothing does.
        inner: Whether it is inside of one of the `inner_blocks`, and no output projection of attention in a list of `LEAST` or more.
    """

    module: nn.Module
    names: tuple[str, ...]
    tuner: nn.Module | None = None
    inner: bool = True

    @property
    def known(self) -> bool:
        """Whether FP8 knows what it does."""
        return self.unknown is None

    @property
    def unknown(self) -> str | None:
        """Why FP8 does not know what it does; None where it does."""
        if type(self.module) not in (nn.Linear, FakeQuantLinear, Fp8Linear):
            return f"of class {type(self.module).__name__}"
        weight = self.module._parameters.get("weight")
        lent = weight is not None and weight.is_meta  # what brings it in for a call is told of where the weight is wanted
        if not isinstance(self.module, Fp8Linear) and not lent and was_exchanged(self.module):
            return "with a forward that somebody else has exchanged"
        return None

    def taken_by(self, config: Lite3RConfig) -> bool:
        """Whether `config.fp8_filter` takes it, by one of its names at least."""
        if config.fp8_filter == INNER:
            return self.inner
        return any(config.takes_fp8(self.module, name) for name in self.names)


def find_blocks(modules: Mapping[str, nn.Module], sites: Sequence[AttentionSite]) -> dict[str, nn.Module]:
    """The transformer blocks of a model by name: one around each site, of whatever scope.

    A block is what the adapter says (`AttentionSite.block`). Else it is the element of the innermost list (`ModuleList`,
    `Sequential`) that the site is in; of lists of which each holds one site (attention and MLP in a list of two), the
    outermost. Outside of any list it is the module around the site, if that holds no other site, or the site itself.

    Args:
        modules: All modules of the model by name.
        sites: All its sites.
    """
    names = [site.fqn for site in sites]

    def single(name: str) -> bool:
        return sum(_inside(site, name) for site in names) == 1

    found = [site.block.fqn if site.block is not None else _around(modules, site.fqn, single) for site in sites]
    return {name: modules[name] for name in found}


def inner_blocks(blocks: Iterable[str]) -> dict[str, bool]:
    """Of blocks all but the first and the last of each list, by their numbers, and whether they are of a list of `LEAST` or more.

    Shorter lists and single blocks stay whole.
    """
    lists: dict[str, dict[int, list[str]]] = {}
    inner: dict[str, bool] = {}
    for name in blocks:
        parts = name.split(".")
        place = next((i for i in reversed(range(len(parts))) if parts[i].isdecimal()), None)
        if place is None:
            inner[name] = False
        else:
            lists.setdefault(".".join(parts[:place]), {}).setdefault(int(parts[place]), []).append(name)
    for numbered in lists.values():
        long = len(numbered) >= LEAST
        kept = sorted(numbered)[1:-1] if long else numbered
        inner |= {name: long for number in kept for name in numbered[number]}
    return inner


def find_linears(
    modules: Mapping[str, nn.Module], blocks: Mapping[str, Sequence[str]], sites: Iterable[AttentionSite], branches: Iterable[str] = ()
) -> list[BlockLinear]:
    """The Linears inside transformer blocks, each once, in the order of the model. Those that adapters consist of are none.

    Args:
        modules: All modules of the model by all their names.
        blocks: Names of the blocks in `modules`, of all there are, and for each the names that it had when Lite3R was applied.
        sites: The attention inside of them, by the names from then.
        branches: Names of modules whose insides are no part of a block: the linear branches.
    """
    skipped, inner = frozenset(branches), inner_blocks(own for names in blocks.values() for own in names)
    found: dict[nn.Module, list[str]] = {}
    whole: set[nn.Module] = set()
    innermost: set[nn.Module] = set()
    tuners: dict[nn.Module, nn.Module | None] = {}
    for name, module in modules.items():
        if not isinstance(module, (nn.Linear, Fp8Linear)):
            continue
        around = list(around_and_itself(name))
        if not skipped.isdisjoint(around) or belongs_to_tuner(modules, name, around[:-1]):
            continue
        adapter = next((outer for outer in around[:-1] if is_tuner_layer(modules[outer])), name)
        if tuners.get(module) is None:
            tuners[module] = tuner_around(modules, around[:-1])
        for block in around:
            places = (name, adapter) if len(adapter) > len(block) else (name,)
            insides = dict.fromkeys(place.removeprefix(block).strip(".") for place in places)
            for own in blocks.get(block, ()):
                found.setdefault(module, []).extend(f"{own}.{inside}".strip(".") for inside in insides)
                if own in inner:
                    (innermost if inner[own] else whole).add(module)
    taken = whole | innermost - _output_projections(found, sites, {plain_name(own) for names in blocks.values() for own in names})
    return [BlockLinear(module, tuple(dict.fromkeys(names)), tuners[module], module in taken) for module, names in found.items()]


def _output_projections(found: Mapping[nn.Module, Sequence[str]], sites: Iterable[AttentionSite], blocks: Set[str]) -> set[nn.Module]:
    """Of Linears by their names those that end the attention of a site.

    They are what the adapter says; else what has the name of one in the attention module, or beside it in a module inside of the block;
    else the last of several in the attention module, if that is not the block and it is none of those that make q, k and v.
    """
    places = {plain_name(name): module for module, names in found.items() for name in names}
    outputs: set[nn.Module] = set()
    for site in sites:
        fqn, out = plain_name(site.fqn), site.projections.out
        inside = _below(places, fqn)
        if out is not None:
            outputs |= {module for place, module in inside.items() if _inside(place, out)}
            continue
        candidates = {place: module for place, module in inside.items() if _OUTPUT.fullmatch(_child(place))}
        around = _parent(fqn)
        if not candidates and any(_inside(around, block) and around != block for block in blocks):
            beside = _below(places, around).items()
            candidates = {place: x for place, x in beside if not _inside(f"{around}.{place}", fqn) and _OUTPUT.fullmatch(_child(place))}
        if not candidates and fqn not in blocks and len(inside) > 1 and not _INPUT.fullmatch(_child(list(inside)[-1])):
            candidates = inside
        last = _child(list(candidates)[-1]) if candidates else None
        outputs |= {module for place, module in candidates.items() if _child(place) == last}  # an adapter may hold copies of it
    return outputs


def _child(place: str) -> str:
    return place.partition(".")[0]


def _below(places: Mapping[str, nn.Module], fqn: str) -> dict[str, nn.Module]:
    """What is inside of the module `fqn`, by its place there."""
    return {place[len(fqn) + 1 :]: module for place, module in places.items() if place.startswith(f"{fqn}.")}


def _around(modules: Mapping[str, nn.Module], fqn: str, single: Callable[[str], bool]) -> str:
    name = fqn
    while name and not _in_list(modules, name):
        name = _parent(name)
    if not name:
        return _parent(fqn) if _parent(fqn) and single(_parent(fqn)) else fqn
    while (outer := _parent(name)) and single(outer) and _in_list(modules, outer):
        name = outer
    return name


def _in_list(modules: Mapping[str, nn.Module], name: str) -> bool:
    return isinstance(modules[_parent(name)], _CONTAINERS)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _inside(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")
