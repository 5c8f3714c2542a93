"""Measured numbers as `lite3r eval --json` writes them: whether they are of a checkpoint, and how they read as a table."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapter.downloads import is_hub_id
from ..adapter.plugins import model_entries
from ..adapter.weights import RANDOM
from ..errors import InputError, short
from ..scene.metrics import Interval, paired_bootstrap
from ..scene.metrics.bootstrap import LEAST_SCENES
from ..scene.metrics.comparison import ROWS

DENSE, LITE3R = "dense", "lite3r"
MACHINE_FIELDS = ("attention_backend", "fp8_backend")
"""Fields of the configuration that the machine which loads a checkpoint chooses."""
PROCEDURAL = "procedural"
CONDITIONS = ("data", "views", "draws", "rule", "seed", "device", "dtype", "torch", "lite3r_plugin")

_MAX_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Row:
    """One measure: its name, that of its field, whether larger is better, the means, and the paired difference where scenes tell it."""

    name: str
    field: str
    larger_is_better: bool
    dense: float
    lite3r: float
    interval: Interval | None


@dataclass(frozen=True)
class Metrics:
    """Measured numbers that were checked.

    Attributes:
        fields: As `lite3r_plugin.evaluation.Evaluation.to_dict` gives them, with what `lite3r eval` adds.
        rows: The measures that are defined.
        scenes: How many scenes they are means over.
        density: Share of the blocks of attention that were computed at sparse sites.
        of_these_files: Whether it is known that the very files of the checkpoint were measured.
    """

    fields: Mapping[str, Any]
    rows: tuple[Row, ...]
    scenes: int
    density: float
    of_these_files: bool

    @property
    def data(self) -> str:
        """What was measured on, without where it lies on the disk of those who measured."""
        layout, _, rest = str(self.fields["data"]).partition(":")
        return f"{layout}:{rest if layout == PROCEDURAL else Path(rest).name}"

    @property
    def views(self) -> str:
        """How many of each scene, and the protocol that says so, if it was judged by one."""
        views, protocol = self.fields["views"], self.fields.get("protocol")
        return f"{views} views each" if protocol is None else f"{views} (protocol {protocol})"

    @property
    def conditions(self) -> dict[str, Any]:
        """`CONDITIONS` with their values."""
        return {name: self.fields[name] for name in CONDITIONS} | {"data": self.data}

    @property
    def base_model(self) -> str | None:
        """The Hub id of the weights under test, if they came from the Hub."""
        weights = self.fields.get("weights")
        if weights is None:
            entry = model_entries().get(str(self.fields.get("model")))
            weights = None if entry is None else entry.default_weights
        return weights if isinstance(weights, str) and is_hub_id(weights) and not os.path.exists(weights) else None


def read_metrics(metrics: Any, config: Mapping[str, Any], fingerprint: str) -> Metrics:
    """`metrics` as a table can be made of them.

    Args:
        metrics: The path of a JSON file that `lite3r eval` wrote, what is in it, or an `lite3r_plugin.evaluation.Evaluation`.
        config: The configuration of the checkpoint.
        fingerprint: Of the checkpoint, as `lite3r_plugin.apply.seal.fingerprint` gives it.

    Raises:
        InputError: they are none, lack conditions or one of the two methods, or were measured with random weights, with another
            configuration, of another checkpoint, or, in a file, of none.
    """
    fields = _fields(metrics)
    if missing := [name for name in ("model", "config", "means", "scenes", "density", *CONDITIONS) if name not in fields]:
        raise InputError(
            f"the metrics lack {missing}: pass what `lite3r eval --checkpoint FOLDER --json FILE` wrote, or an Evaluation's to_dict() with "
            'what it was measured on, {"data": "..."}'
        )
    if fields.get("weights") == RANDOM:
        raise InputError("the metrics were measured with random weights, so they mean nothing; measure with the weights of the model")
    _check_config(fields["config"], config)
    measured = fields.get("checkpoint")
    if measured is None and isinstance(metrics, (str, os.PathLike)):
        raise InputError(
            f"{metrics} is of a model to which Lite3R was applied anew, not of this checkpoint: measure it with "
            "`lite3r eval --checkpoint FOLDER --json FILE`"
        )
    if measured is not None and measured != fingerprint:
        raise InputError(
            f"the metrics are of another checkpoint (fingerprint {str(measured)[:12]}, this one is {fingerprint[:12]}): measure this one "
            "with `lite3r eval --checkpoint FOLDER --json FILE`"
        )
    try:
        rows = _rows(fields)
        sets = len(fields["scenes"][LITE3R])
        scenes = sets // int(fields["draws"])
        density = float(fields["density"])
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f"the metrics are damaged, or not of `lite3r eval` ({short(error, 100)}); measure again") from error
    if not rows:
        raise InputError(f"the metrics have no measure that is defined for both {DENSE!r} and {LITE3R!r}: there is no quality to show")
    return Metrics(fields, tuple(rows), scenes, density, measured is not None)


def _fields(metrics: Any) -> Mapping[str, Any]:
    if isinstance(metrics, (str, os.PathLike)):
        path = Path(metrics)
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise InputError(f"{path} has more than {_MAX_BYTES} bytes: no metrics of `lite3r eval`")
            metrics = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} cannot be read as metrics ({short(error, 100)}); pass what `lite3r eval --json` wrote") from error
    elif hasattr(metrics, "to_dict"):
        metrics = metrics.to_dict()
    if not isinstance(metrics, Mapping):
        raise InputError(f"metrics are what `lite3r eval --json` wrote, got {type(metrics).__name__}")
    return metrics


def _check_config(measured: Any, config: Mapping[str, Any]) -> None:
    if not isinstance(measured, Mapping):
        raise InputError("the metrics are damaged: their config is no JSON object; measure again")
    # As JSON has them: tuples are lists there.
    mine, theirs = (json.loads(json.dumps(dict(fields))) for fields in (config, measured))
    names = sorted((mine.keys() | theirs.keys()) - set(MACHINE_FIELDS))
    if other := [name for name in names if mine.get(name) != theirs.get(name)]:
        raise InputError(
            f"the metrics are of another configuration: {other[0]} was {theirs.get(other[0])!r}, in the checkpoint it is "
            f"{mine.get(other[0])!r}; measure this checkpoint"
        )


def _rows(fields: Mapping[str, Any]) -> list[Row]:
    dense, lite3r = (fields["means"][method] for method in (DENSE, LITE3R))
    rows = []
    for name, (family, field, larger) in ROWS.items():
        values = dense.get(name), lite3r.get(name)
        if all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
            rows.append(Row(name, field, larger, float(values[0]), float(values[1]), _interval(fields, family, field)))
    return rows


def _interval(fields: Mapping[str, Any], family: str, field: str) -> Interval | None:
    """The paired difference over scenes. The sets of views of one scene, which follow each other, count as one, by their mean."""
    first, second = ([_value(score, family, field) for score in fields["scenes"][method]] for method in (DENSE, LITE3R))
    if len(first) != len(second):
        raise ValueError("the two methods were measured on different numbers of sets of views")
    draws, differences = int(fields["draws"]), [b - a for a, b in zip(first, second, strict=True)]
    by_scene = [[d for d in differences[i : i + draws] if not math.isnan(d)] for i in range(0, len(differences), draws)]
    means = [sum(found) / len(found) if found else math.nan for found in by_scene]
    if sum(not math.isnan(mean) for mean in means) < LEAST_SCENES:
        return None
    return paired_bootstrap([0.0] * len(means), means)


def _value(score: Mapping[str, Any], family: str, field: str) -> float:
    measures = score.get(family)
    value = None if measures is None else measures.get(field)
    return math.nan if value is None else float(value)
