"""Methods side by side over many scenes, always with a prediction that ignores the images."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import InputError, plural
from ..geometry import Geometry
from .bootstrap import LEAST_SCENES, Interval, paired_bootstrap
from .scene import SceneMetrics, constant_geometry, scene_metrics

if TYPE_CHECKING:
    from rich.table import Table

MEAN = "constant"
ROWS = {  # printed name: family, field, whether larger is better
    "AbsRel": ("depth", "abs_rel", False),
    "RMSE": ("depth", "rmse", False),
    "δ1": ("depth", "delta1", True),
    "δ2": ("depth", "delta2", True),
    "δ3": ("depth", "delta3", True),
    "rotation, degrees": ("pose", "rotation_mean", False),
    "translation, degrees": ("pose", "translation_mean", False),
    "AUC@3, %": ("pose", "auc3", True),
    "AUC@5, %": ("pose", "auc5", True),
    "AUC@15, %": ("pose", "auc15", True),
    "AUC@30, %": ("pose", "auc30", True),
    "AUC@3 as published, %": ("pose", "published_auc3", True),
    "AUC@30 as published, %": ("pose", "published_auc30", True),
    "ATE": ("pose", "ate", False),
    "accuracy": ("points", "accuracy", False),
    "completeness": ("points", "completeness", False),
    "Chamfer": ("points", "chamfer", False),
    "F-score": ("points", "f_score", True),
}
USUAL = tuple(row for row in ROWS if "as published" not in row)
"""The keys of `ROWS` that are shown where no others are asked for."""


class Comparison:
    """Measures of several methods on the same scenes, and of constant depth with equal cameras, called ``"constant"``.

    Attributes:
        scores: The measures by method, one per set of views.
        scenes: Which scene each set of views is of.
    """

    def __init__(self, threshold: float | None = None, max_points: int = 100_000) -> None:
        """`threshold` and `max_points` are those of `lite3r_plugin.scene.metrics.point_metrics`."""
        self.threshold = threshold
        self.max_points = max_points
        self.scores: dict[str, list[SceneMetrics]] = {}
        self.scenes: list[Hashable] = []

    def add(self, reference: Geometry, predictions: Mapping[str, Geometry], scene: Hashable = None) -> None:
        """Measure one set of views; every set needs the same methods. `scene` says which sets are of one scene; None: this one alone."""
        if not predictions or MEAN in predictions:
            raise InputError(f"a scene is compared for at least one method, and none is called {MEAN!r}")
        methods = dict(predictions) | {MEAN: constant_geometry(reference)}
        if self.scores and set(methods) != set(self.scores):
            raise InputError(f"every scene needs the methods {sorted(set(self.scores) - {MEAN})}, got {sorted(predictions)}")
        scores = {name: scene_metrics(scene, reference, self.threshold, self.max_points) for name, scene in methods.items()}
        for name, score in scores.items():
            self.scores.setdefault(name, []).append(score)
        self.scenes.append(("set", len(self.scenes)) if scene is None else scene)

    def values(self, method: str, row: str) -> list[float]:
        """The measure `row` (a key of `ROWS`) of `method`, one per set of views; NaN where it is not defined."""
        if method not in self.scores or row not in ROWS:
            raise InputError(f"{row!r} of {method!r} was not measured; there are {sorted(self.scores)} with {list(ROWS)}")
        family, field, _ = ROWS[row]
        found = (getattr(score, family) for score in self.scores[method])
        return [math.nan if measures is None else getattr(measures, field) for measures in found]

    def rows(self, among: Sequence[str] = USUAL) -> list[str]:
        """Those `among` the keys of `ROWS` that were measured: of depth and points only where some reference has depth."""
        with_depth = any(score.depth is not None for scores in self.scores.values() for score in scores)
        return [row for row in among if with_depth or ROWS[row][0] == "pose"]

    def mean(self, method: str, row: str) -> float:
        """Mean of a measure over the sets of views for which it is defined; NaN where there are none."""
        values = [value for value in self.values(method, row) if not math.isnan(value)]
        return sum(values) / len(values) if values else math.nan

    def difference(self, dense: str, accelerated: str, row: str, seed: int = 0) -> Interval:
        """Accelerated - dense with its 95 % interval. Sets of views of one scene count as one, by their mean: they are alike."""
        by_scene: dict[Hashable, list[float]] = {}
        for scene, first, second in zip(self.scenes, self.values(dense, row), self.values(accelerated, row), strict=True):
            found = by_scene.setdefault(scene, [])
            if not math.isnan(second - first):
                found.append(second - first)
        differences = [sum(found) / len(found) if found else math.nan for found in by_scene.values()]
        return paired_bootstrap([0.0] * len(differences), differences, seed=seed)

    def table(self, dense: str, accelerated: str, among: Sequence[str] = USUAL, heading: str = "", note: str = "") -> Table:
        """One row per measure: means of every method, and the difference of two with its 95 % interval.

        Args:
            dense, accelerated: The two methods, the difference of which is shown.
            among: As in `rows`.
            heading: What stands first in the title.
            note: What stands last below the table.
        """
        from rich.markup import escape
        from rich.table import Table

        scenes, sets = len(set(self.scenes)), len(self.values(dense, "AUC@5, %"))
        undefined = sum(score.pose.undefined for score in self.scores[dense])
        pairs = sum(score.pose.pairs for score in self.scores[dense])
        rows = self.rows(among)
        title = f"Means over {plural(scenes, 'scene')}" + (f", {plural(sets, 'set')} of views" if sets != scenes else "")
        fitted = "One scale per scene for depth, Sim(3) for points and ATE; lengths in the unit of the reference. "
        table = Table(
            title=escape(f"{heading}. {title}" if heading else title),
            caption=f"{fitted if any('AUC' not in row for row in rows) else ''}{MEAN}: one depth, "
            f"equal cameras. {undefined} of {pairs} pairs of views have no baseline. "
            f"* the 95 % interval leaves out 0; there is none where fewer than {LEAST_SCENES} scenes have the measure. {note}".rstrip(),
        )
        table.add_column("")
        for name in self.scores:
            table.add_column(escape(name), justify="right")
        table.add_column(escape(f"{accelerated} - {dense} [95 %]"), justify="right")
        for row in rows:
            up = ROWS[row][2]
            interval = self.difference(dense, accelerated, row)
            bounds = _number(interval.difference, "+.4g")
            if interval.scenes >= LEAST_SCENES:
                bounds += rf" \[{interval.low:+.4g}, {interval.high:+.4g}]" + (" *" if interval.clear else "")
            table.add_row(f"{row} {'↑' if up else '↓'}", *(_number(self.mean(name, row), ".4g") for name in self.scores), bounds)
        return table

    def to_dict(self) -> dict[str, Any]:
        """Everything that was measured, for JSON."""
        return {name: [score.to_dict() for score in scores] for name, scores in self.scores.items()}


def _number(value: float, form: str) -> str:
    return "undefined" if math.isnan(value) else format(value, form)
