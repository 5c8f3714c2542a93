"""Keep ratios that were chosen for each site: a mapping for `Lite3RConfig.keep_ratio` that knows how it came about, and its JSON file."""

from __future__ import annotations

import dataclasses
import os
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..config import Lite3RConfig, SiteRatios, plain_name
from ..errors import ConfigError, InputError, plural, shown
from ..files import check_output, read_json, to_json, write_atomically
from ..ops.options import check_ratio, is_int, is_number

FORMAT = "lite3r keep ratios"
FORMAT_VERSION = 1
MOST_BYTES = 4 << 20
MOST_TOLD = 3

Budget = Literal["max_rel_error", "max_pose_loss", "mean_keep_ratio"]
BUDGETS: tuple[Budget, ...] = ("max_rel_error", "max_pose_loss", "mean_keep_ratio")

SETTINGS = ("pin", "block_means", "block_choice", "linear_branch", "negligible_ratio")
"""Fields of `Lite3RConfig` by which attention with the same keep ratio and blocks gives something else."""


@dataclass(frozen=True)
class Making:
    """How ratios were chosen.

    Attributes:
        model: Class of the model.
        adapter: Name of its adapter, which is its family.
        budget: What was to be kept to.
        value: Its value.
        inputs: Number of inputs that the sites were measured on.
        checked: Number of others that the choice was checked on.
        tokens: The fewest and the most tokens that a site saw of an input.
        blocks: `block_q` and `block_k`.
        settings: Those of `SETTINGS`.
        dtype: In which the model computed.
        density: Share of the scores that is computed, over all sites, each by its size.
        uniform: The keep ratio that computes as much when all sites have it.
        errors: Of the outputs on the inputs that were checked, against dense attention, by kind.
        uniform_errors: The same with `uniform`.
        harm: Of each site that was chosen for, how far outputs were off with it alone at the smallest ratio, squared, as a share of the
            sum over all of them.
        dense: Sites that stay dense, not because that was chosen, with the reason.
    """

    model: str
    adapter: str
    budget: Budget
    value: float
    inputs: int
    checked: int
    tokens: tuple[int, int]
    blocks: tuple[int, int]
    settings: Mapping[str, Any]
    dtype: str
    density: float
    uniform: float
    errors: Mapping[str, float]
    uniform_errors: Mapping[str, float]
    harm: Mapping[str, float]
    dense: Mapping[str, str]


class KeepRatioProfile(SiteRatios):
    """What `choose_keep_ratios` chose: the keep ratio of each sparse site by its name; a mapping for ``keep_ratio``, immutable.

    `apply_lite3r` takes it for a model of which exactly these sites become sparse. `str` tells all.

    Args:
        ratios: The ratios, of all sites that are sparse.
        making: How they were chosen.

    Raises:
        ConfigError: there is none, or one is not in (0, 1].

    Examples:
        >>> model = apply_lite3r(model, keep_ratio="auto", dense_below=0, block_q=16, block_k=16)
        >>> choose_keep_ratios(model, inputs, mean_keep_ratio=0.3).save("ratios.json")
        >>> model = apply_lite3r(remove_lite3r(model), keep_ratio=KeepRatioProfile.load("ratios.json"))
    """

    def __init__(self, ratios: Mapping[str, float], making: Making) -> None:
        if not ratios:
            raise ConfigError("a profile of keep ratios has at least one site")
        for fqn, ratio in ratios.items():
            check_ratio(f"the keep ratio of {shown(fqn)}", ratio)
        super().__init__(ratios)
        self.making = making

    def __str__(self) -> str:
        width, harm = max(len(fqn) for fqn in self), self.making.harm
        sites = (f"  {fqn:{width}}  {ratio:.3g}" + (f"  harm {harm[fqn]:.1%}" if fqn in harm else "") for fqn, ratio in self.items())
        return "\n".join([*self.lines(), *sites])

    def lines(self) -> list[str]:
        """How the ratios came about, in lines: for `describe`."""
        making = self.making
        least, most = min(self.values()), max(self.values())
        few, many = making.tokens
        errors = ", ".join(f"{kind} {error:.3g} ({making.uniform_errors[kind]:.3g})" for kind, error in making.errors.items())
        lines = [
            f"keep ratios chosen for {plural(len(self), 'site')}, {least:.3g} to {most:.3g}, by {making.budget}={making.value:g}: density "
            f"{making.density:.3f}, as keep_ratio={making.uniform:.3g} everywhere, on inputs of "
            f"{few if few == many else f'{few} to {many}'} tokens",
            f"outputs against dense attention on {plural(making.checked, 'other input')} (with the same density everywhere): {errors}",
        ]
        worst = sorted(making.harm, key=lambda fqn: making.harm[fqn], reverse=True)[:MOST_TOLD]
        lines.append(f"most harm is done by {', '.join(f'{fqn} ({making.harm[fqn]:.0%})' for fqn in worst)}, each sparse by itself")
        return lines + [f"{fqn} stays dense: {reason}" for fqn, reason in making.dense.items()]

    def differing(self, config: Lite3RConfig) -> list[str]:
        """What else `config` has than what the ratios were chosen with, in lines."""
        making, blocks = self.making, (config.block_q, config.block_k)
        lines = []
        if making.blocks != blocks:
            lines.append("blocks {} x {} instead of {} x {}".format(*blocks, *making.blocks))
        differing = {name: x for name, x in settings(config).items() if x != making.settings[name]}
        lines += [f"{name} {x!r} instead of {making.settings[name]!r}" for name, x in differing.items()]
        return [f"chosen under other conditions, so these numbers may not hold here: {', '.join(lines)}"] if lines else []

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file that `load` reads, whole or not at all.

        Raises:
            InputError: `path` does not end in ``.json``, or cannot be written.
        """
        path = Path(path)
        check_output(path, ".json")
        write_atomically(path, to_json(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-serialisable data, the inverse of `from_dict`."""
        making = dataclasses.asdict(self.making)
        making |= {name: list(making[name]) for name in ("tokens", "blocks")}
        return {"format": FORMAT, "version": FORMAT_VERSION, "sites": len(self), "ratios": dict(self), "making": making}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> KeepRatioProfile:
        """Read what `save` wrote.

        Raises:
            InputError: the file cannot be read, is none of `save`, of another version, or damaged.
        """
        path = Path(path)
        try:
            found = path.stat()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:  # no name that a file can have
            raise InputError(f"{shown(str(path))} cannot be read: {error}") from error
        if not stat.S_ISREG(found.st_mode):  # a device or a pipe may never end
            raise InputError(f"{path} cannot be read: it is no file")
        if found.st_size > MOST_BYTES:
            raise InputError(f"{path} has {found.st_size} bytes: no profile of keep ratios is as large")
        try:
            return cls.from_dict(read_json(path))
        except ConfigError as error:
            raise InputError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, data: Any) -> KeepRatioProfile:
        """Build from `to_dict`'s result. Raises `ConfigError` where it is anything else."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ConfigError("this is no profile of keep ratios, as KeepRatioProfile.save writes them")
        if not is_int(data.get("version")) or data["version"] != FORMAT_VERSION:
            raise ConfigError(f"a profile of keep ratios of version {shown(data.get('version'))}, which is not {FORMAT_VERSION}")
        ratios, making = data.get("ratios"), data.get("making")
        if set(data) != {"format", "version", "sites", "ratios", "making"} or not isinstance(ratios, Mapping):
            raise ConfigError("a damaged profile of keep ratios: it has other entries than a profile")
        if not is_int(data["sites"]) or data["sites"] != len(ratios):
            raise ConfigError(f"a damaged profile of keep ratios: it is to be of {shown(data['sites'])} sites, and has {len(ratios)}")
        made = _making(making)
        if made.harm.keys() | made.dense.keys() != ratios.keys() or made.harm.keys() & made.dense.keys():
            raise ConfigError("a damaged profile of keep ratios: harm and dense are not of its sites, each in one of them")
        return cls(ratios, made)


def settings(config: Lite3RConfig) -> dict[str, Any]:
    """What `config` says of attention besides keep ratios and blocks: `SETTINGS`, by name."""
    settled = config.settled
    return {name: getattr(settled, name) for name in SETTINGS}


def check_sites(ratios: KeepRatioProfile, sites: Sequence[str]) -> None:
    """Raise `ConfigError` where `ratios` are not of the model whose `sites` become sparse."""
    names = {plain_name(fqn) for fqn in sites}
    missing, unknown = sorted(names - ratios.keys()), sorted(ratios.keys() - names)
    if missing or unknown:
        making = ratios.making
        differing = f"{missing[0]!r} has none" if missing else f"there is no {unknown[0]!r}"
        raise ConfigError(
            f"these keep ratios were chosen for {plural(len(ratios), 'site')} of a {making.model} (adapter {making.adapter!r}), and here "
            f"{plural(len(names), 'site becomes', 'sites become')} sparse: {differing}. Choose anew for this model, or apply Lite3R with "
            "the scopes and exclude that they were chosen with"
        )


def _is_finite(x: Any) -> bool:
    return is_number(x) and abs(x) <= sys.float_info.max  # an integer may be larger than any float


def _is_line(x: Any) -> bool:
    return isinstance(x, str) and x.isprintable()  # `describe` prints it, and terminals obey what is not


def _is_setting(x: Any) -> bool:
    return _is_line(x) or isinstance(x, bool) or _is_finite(x)


def _making(data: Any) -> Making:
    """`Making` of what a file holds. Raises `ConfigError` where it holds anything else."""
    fields = [field.name for field in dataclasses.fields(Making)]
    if not isinstance(data, Mapping) or set(data) != set(fields):
        raise ConfigError(f"a damaged profile of keep ratios: 'making' is to have {fields}")
    checks: dict[str, Any] = {
        **dict.fromkeys(("model", "adapter", "dtype"), _is_line),
        "settings": lambda x: isinstance(x, Mapping) and set(x) == set(SETTINGS) and all(map(_is_setting, x.values())),
        "budget": lambda x: x in BUDGETS,
        **dict.fromkeys(("inputs", "checked"), lambda x: is_int(x) and x > 0),
        **dict.fromkeys(("tokens", "blocks"), lambda x: isinstance(x, list) and len(x) == 2 and all(is_int(n) and n > 0 for n in x)),
        "value": lambda x: _is_finite(x) and x > 0,
        **dict.fromkeys(("density", "uniform"), lambda x: _is_finite(x) and 0 < x <= 1 + 1e-9),  # a sum of shares
        **dict.fromkeys(
            ("errors", "uniform_errors"),
            lambda x: isinstance(x, Mapping) and bool(x) and all(_is_line(kind) and _is_finite(n) and n >= 0 for kind, n in x.items()),
        ),
        "harm": lambda x: isinstance(x, Mapping) and all(is_number(n) and 0 <= n <= 1 for n in x.values()),
        "dense": lambda x: isinstance(x, Mapping) and all(map(_is_line, x.values())),
    }
    for name in fields:
        if not checks[name](data[name]):
            raise ConfigError(f"a damaged profile of keep ratios: {name} is {shown(data[name])}")
    if data["errors"].keys() != data["uniform_errors"].keys():
        raise ConfigError("a damaged profile of keep ratios: errors and uniform_errors are not of the same kinds")
    made: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in data.items()}
    return Making(**made)
