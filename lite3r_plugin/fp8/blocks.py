"""Which Linears are quantised: those of the transformer blocks around the attention sites."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from torch import nn

from ..adapter.sites import AttentionSite

M = TypeVar("M", bound=nn.Module)

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def find_blocks(model: nn.Module, sites: Sequence[AttentionSite]) -> dict[str, nn.Module]:
    """The transformer blocks of `model` by name: one around each site, of whatever scope.

    A block is what the adapter says (`AttentionSite.block`). Else it is the element of the innermost list (`ModuleList`,
    `Sequential`) that the site is in; of lists of which each holds one site (attention and MLP in a list of two), the
    outermost. Outside of any list it is the module around the site, if that holds no other site, or the site itself.
    """
    names = [site.fqn for site in sites]

    def single(name: str) -> bool:
        return sum(_inside(site, name) for site in names) == 1

    blocks = {}
    for site in sites:
        name = site.block.fqn if site.block is not None else _around(model, site.fqn, single)
        blocks[name] = model.get_submodule(name)
    return blocks


def modules_in(blocks: Iterable[nn.Module], kind: type[M], skip: Iterable[nn.Module] = ()) -> list[M]:
    """The modules of exactly the class `kind` inside the blocks, each once. A subclass of Linear may do something else."""
    skipped = {id(module) for module in skip}
    found = {id(m): m for block in blocks for m in block.modules() if type(m) is kind and id(m) not in skipped}
    return list(found.values())  # pyright: ignore[reportReturnType]


def _around(model: nn.Module, fqn: str, single: Callable[[str], bool]) -> str:
    name = fqn
    while name and not _in_list(model, name):
        name = _parent(name)
    if not name:
        return _parent(fqn) if _parent(fqn) and single(_parent(fqn)) else fqn
    while (outer := _parent(name)) and single(outer) and _in_list(model, outer):
        name = outer
    return name


def _in_list(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(_parent(name)), _CONTAINERS)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _inside(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")
