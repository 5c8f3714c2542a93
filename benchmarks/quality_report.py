"""From the measures that `quality.py` stored to Markdown tables: ``python benchmarks/quality_report.py RESULTS.json > TABLE.md``."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from lite3r_plugin.scene.metrics import paired_bootstrap

COLUMNS = {  # heading: measure, digits
    "AbsRel ↓": ("depth.abs_rel", 4),
    "δ1 ↑": ("depth.delta1", 3),
    "rotation ° ↓": ("pose.rotation_median", 2),
    "translation ° ↓": ("pose.translation_median", 2),
    "AUC@3 ↑": ("pose.auc3", 2),
    "AUC@5 ↑": ("pose.auc5", 2),
    "AUC@15 ↑": ("pose.auc15", 1),
    "AUC@30 ↑": ("pose.auc30", 1),
    "depth against dense ↓": ("teacher.depth_abs_rel", 4),
    "rotation against dense ° ↓": ("teacher.rotation_mean", 2),
}
DIFFERENCES = {"AbsRel − dense": ("depth.abs_rel", 4), "AUC@30 − dense": ("pose.auc30", 1)}
HEAD = """# What quality costs

Measured by `python benchmarks/quality.py`, read in [README.md](README.md); every measure of every scene is in `{source}`.

{conditions}

**How to read it.** The model is the testbed that comes with the package (18 M parameters, trained on rendered scenes for 33
minutes), so only differences to its own dense row mean anything: its absolute numbers must not be compared with those of full-size
models. `constant` ignores the images: one depth, equal cameras. AbsRel and δ1 are after one median scale per scene; angles are
medians over pairs of views, averaged over scenes; AUC is of the larger of the two angles, in percent. `against dense` compares with
the dense model's own output. Differences come with paired bootstrap 95 % intervals over scenes; * leaves out 0. Density is the share
of scores that were computed exactly; what is pinned comes on top of the keep ratio. No attention weight was trained for sparsity:
`linear` is `proj_lin` fitted in closed form (`calibrate`) to {calibration} rendered scenes of other textures.
"""


def markdown(store: dict[str, Any], source: str = "results/quality.json") -> str:
    """The whole page."""
    conditions = store["conditions"]
    listed = ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in conditions.items())
    parts = [HEAD.format(source=source, conditions=listed, calibration=conditions["calibration"])]
    for name, group in store["groups"].items():
        parts.append(table(name, group))
    return "\n".join(parts)


def table(name: str, group: dict[str, Any]) -> str:
    """One data set with one number of views."""
    data, _, views = name.partition("/")
    title = f"## {data}, {views} views"
    if not group.get("sets"):
        return f"{title}\n\n– (no scene has so many views)\n"
    dense = group["rows"]["dense"]["scenes"]
    columns = {head: spec for head, spec in COLUMNS.items() if spec[0].startswith("teacher") or values(dense, spec[0])}
    differences = {head: spec for head, spec in DIFFERENCES.items() if values(dense, spec[0])}
    heads = ["", "density", *columns, *differences]
    lines = [
        f"{title}\n\n{group['sets']} sets of views, images {group['size'][0]} × {group['size'][1]}.\n",
        "| " + " | ".join(heads) + " |",
        "|" + "|".join(["---"] + ["---:"] * (len(heads) - 1)) + "|",
    ]
    for key, row in group["rows"].items():
        cells = [key, "" if row["density"] is None else f"{row['density']:.3f}"]
        for measure, digits in columns.values():
            found = values(row["scenes"], measure)
            cells.append(
                f"{sum(found) / len(found):.{digits}f}" if found and not (key == "dense" and measure.startswith("teacher")) else ""
            )
        for measure, digits in differences.values():
            cells.append("" if key in ("dense", "constant") else difference(dense, row["scenes"], measure, digits))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def values(scenes: list[dict[str, float | None]], measure: str) -> list[float]:
    """The measure of the scenes that have it."""
    return [value for scene in scenes if (value := scene.get(measure)) is not None]


def difference(dense: list[dict[str, float | None]], other: list[dict[str, float | None]], measure: str, digits: int) -> str:
    """Mean difference with its interval."""
    first, second = ([math.nan if (x := scene.get(measure)) is None else x for scene in scenes] for scenes in (dense, other))
    interval = paired_bootstrap(first, second)
    star = " *" if interval.clear else ""
    return f"{interval.difference:+.{digits}f} [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]{star}"


if __name__ == "__main__":
    given = Path(sys.argv[1])
    sys.stdout.write(markdown(json.loads(given.read_text()), f"results/{given.name}"))
