"""Names without wrappers: those that a checkpoint holds, so that what was trained inside of DDP loads without it, and the reverse."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from ..attention.module import SparseLinearAttention
from ..config import Lite3RConfig, matches, plain_name
from ..errors import CheckpointError
from .lookup import Inventory

Thing = TypeVar("Thing")


def by_plain_name(things: Mapping[str, Thing]) -> dict[str, Thing]:
    """`things` of a model by the names that they have without wrappers, such as DDP or `torch.compile`.

    Raises:
        CheckpointError: two different ones would have the same name.
    """
    found: dict[str, tuple[str, Thing]] = {}
    for name, thing in things.items():
        first, other = found.setdefault(plain_name(name), (name, thing))
        if other is not thing:
            raise CheckpointError(
                f"{first!r} and {name!r} are both {plain_name(name)!r} without the names of wrappers: rename one of them in the model"
            )
    return {plain: thing for plain, (_, thing) in found.items()}


def plain_config(found: Inventory) -> Lite3RConfig:
    """The configuration of a model with Lite3R, with patterns that say of plain names what they said of those at hand.

    They stay as they are where that is so; else wrappers are taken out of them; else names take their place.
    """
    state = found.states[0]
    config = state.config
    ratios = {_name(module, names): module.keep_ratio for module, names in _names(found.attention).items() if module.sparse}
    if isinstance(config.keep_ratio, Mapping):
        plain: dict[str, float] = {}
        for pattern, ratio in config.keep_ratio.items():
            plain.setdefault(plain_name(pattern), ratio)
        candidates = [config.replace(keep_ratio=keep_ratio) for keep_ratio in (config.keep_ratio, plain, ratios)]
        config = next((c for c in candidates if _all_match(c.patterns, ratios) and _ratios(c, ratios) == ratios), config)
    config = config.replace(exclude=tuple(dict.fromkeys(map(plain_name, config.exclude))))
    if isinstance(config.fp8_filter, tuple):
        known = [linear for linear in found.linears(state) if linear.known]
        taken = {plain_name(name): linear.taken_by(state.config) for linear in known for name in linear.names}
        filters = (config.fp8_filter, tuple(map(plain_name, config.fp8_filter)), tuple(name for name in taken if taken[name]))
        fitting = (patterns for patterns in filters if _all_match(patterns, taken) and _chosen(patterns, taken) == taken)
        config = config.replace(fp8_filter=next(fitting, config.fp8_filter))
    return config


def _names(attention: Mapping[str, SparseLinearAttention]) -> dict[SparseLinearAttention, list[str]]:
    names: dict[SparseLinearAttention, list[str]] = {}
    for fqn, module in attention.items():
        names.setdefault(module, []).append(plain_name(fqn))
    return names


def _name(module: SparseLinearAttention, names: list[str]) -> str:
    """Of several names the one that the adapter used."""
    own = plain_name(module.site.fqn)
    return own if own in names else names[0]


def _all_match(patterns: Iterable[str], names: Iterable[str]) -> bool:
    return all(any(matches(pattern, name) for name in names) for pattern in patterns)


def _ratios(config: Lite3RConfig, names: Iterable[str]) -> dict[str, float]:
    return {name: config.keep_ratio_of(name) for name in names}


def _chosen(patterns: Iterable[str], names: Iterable[str]) -> dict[str, bool]:
    return {name: any(matches(pattern, name) for pattern in patterns) for name in names}
