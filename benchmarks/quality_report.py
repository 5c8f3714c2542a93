"""From the measures that `quality.py` stored to Markdown.

python benchmarks/quality_report.py                             # writes quality.md and quality_blocks.md from results/
python benchmarks/quality_report.py --full RESULTS.json         # prints every measure of every row, with intervals
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from weights import generation

from lite3r_plugin.scene.metrics import Interval, paired_bootstrap

HERE = Path(__file__).parent
STORED = HERE / "results" / "quality.json"
PAGE = HERE / "quality.md"
BLOCKS, BLOCKS_PAGE = HERE / "results" / "quality_blocks.json", HERE / "quality_blocks.md"
WIDTH = 130

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
ABS_REL, AUC30 = "depth.abs_rel", "pose.auc30"
DIFFERENCES = {"AbsRel − dense": (ABS_REL, 4), "AUC@30 − dense": (AUC30, 1)}
RENDERED = "procedural"
# Rows of `quality.py`: what `apply_lite3r` gives by default, before and after `calibrate`.
APPLIED, CALIBRATED = "sparse + means", "sparse + means + linear, marginal"
MEAN_ROW, AS_KEYS = "sparse + means, blocks by mean", "sparse + means, reference view as keys"
DEFAULT_KEEP = 0.25
KEEPS = (0.5, DEFAULT_KEEP, 0.125)

JUDGED = ((ABS_REL, 4), (AUC30, 1), ("pose.auc5", 2))
PINNED = (("AbsRel", ABS_REL, 4), ("AUC@30", AUC30, 1), ("AUC@5", "pose.auc5", 1))
NEAR = (("teacher.depth_abs_rel", 4), ("teacher.rotation_mean", 2))
TRIED_WAYS = {
    "oracle_mass": "oracle mass", "oracle_error": "oracle error", "lse": "lse, keys in 4", "full": "variance, full",
    "trace": "variance, trace", "diagonal": "variance, keys", "error": "error, queries in 4", "error44": "error, queries in 4, keys in 4",
    "tokens": "tokens, queries in 4", "refined": "refined, mass 8 8", "threshold": "mean, threshold a site", "frames": "frames",
    "half": "half frames",
}  # fmt: skip
TRIED_LINK = """## What was tried

Other ways of choosing key blocks at the same density, by attention and by what the model returns: [Choices of key
blocks](quality_blocks.md). Some bring attention nearer to dense attention by a tenth to a seventh; one of them, `block_choice="error"`,
is the default, and makes depth and cameras of rendered scenes better.
"""
TRIED = """# Choices of key blocks

This page is written by `python benchmarks/quality_report.py` from `results/quality_blocks.json` and `results/quality.json`.

By `python benchmarks/quality_blocks.py`, which describes every way in its first lines, with the testbed's {weights}: at every
global site of the dense model, how far sparse attention with block means is from dense attention, relative to that, and what
percentage of the true attention lies in the blocks that are kept. All ways have the same density. {scenes}, on rendered scenes. An
`oracle` knows the true attention.
"""
TRIED_FINDINGS = """Read off it, for {views} views and the keep ratios {ratios}:

* What the score of means leaves: who knew the true attention of every block would have {oracle_mass} less error, and who knew what
  each mean hides {oracle_error}.
* Log-sum-exp over means of parts of a block (SubBlock, in sglang) takes {lse} off. A second-order term takes {diagonal} off from
  variances by dimension, {trace} from their sum, {full} from the whole covariance, which costs 64 times the block map.
* With block means in the softmax a block matters by what its mean hides, not by its attention. An estimate of that from four parts of
  the query block and variances by dimension (`error, queries in 4`) takes {error} off, for about 3 % of the operator's time by
  arithmetic; from parts of keys too, {error44}; from every key, which would take about a tenth of
  the operator's time at a keep ratio of 0.1, {tokens}.
* One threshold for all query blocks in place of a number for each (PISA, arXiv 2602.01077; Sol-Attn, arXiv 2607.24027) finds more of the
  attention and does not make the error less ({threshold} more): where attention is flat, means serve.
* Another look at the best 2 k blocks takes {refined} off, no more than one look at all of them (`mass, queries in 4, keys in 4`).
* Subtracting the mean key changes no order within a row; sizes of blocks matter to the last, short one alone.
* Whole frames, diverse ones beside the neighbours (GoToHunt, arXiv 2605.23892), have {frames} more error, half frames and half blocks
  {half}. At so few views one or two frames are all that the density allows; at hundreds it may be otherwise.

In the operator is the simplest estimate of the error, `block_choice="error"`: one mean query, variances of the keys by dimension, no parts
and no softmax. It is the default, since it takes as long as `mean` within 2 %
([recipes](../docs/recipes.md#what-each-wins-back)). The rest is not in it.
"""
PINS_HEAD = """## The operator's choices, and what is pinned

Changes against the dense model on the same rendered scenes, {size} x {size} pixels, on {device} in {dtype}, with the testbed's {weights}
(`results/quality.json`). `mean` and `error` are `block_choice`; `as keys` is `pin="reference_keys"`, by error.
A star marks changes whose paired 95 % interval leaves out 0. {sizes}.
"""
PINS_TAIL = """Read off it: by error the means of depth and cameras are better than by mean in every row, at the same density; of these
{pairs} differences {clear} leave out 0 in their own paired intervals. At 0.5, which is stored
besides, {better_half} of {pairs_half} are better, and {clear_half} leave out 0.
With the reference view as keys alone fewer scores are computed, cameras are nearer to the dense model's, the more views the more, and
depth is further away.
"""
PIN_WAYS = {
    "mean": MEAN_ROW, "error": "sparse + means", "error, as keys": AS_KEYS,
    "mean, calibrated": "sparse + means + linear, marginal, blocks by mean", "error, calibrated": "sparse + means + linear, marginal",
    "error, as keys, calibrated": "sparse + means + linear, marginal, reference view as keys",
}  # fmt: skip
TRIED_JUDGED = """## What the model returns

Of ways that are tried above, of too few scenes to tell more.
"""

HEAD = """# What quality costs

The measures are those of `python benchmarks/quality.py`; every one of every scene is in `{source}`, and this page is written from
it by `python benchmarks/quality_report.py`. With `--full {source}` it prints all of them, with their intervals.

{conditions}.

**How to read it.** The model is the testbed that comes with the package: 20 M parameters, trained on rendered scenes. Only
differences from its own dense row mean anything; its numbers must not be compared with those of full-size models. `constant`
ignores the images: one depth, equal cameras. AbsRel is after one median scale per scene. AUC@30 is of the larger of the two angles
between pairs of cameras, in percent. Differences are means over scenes; a star marks those whose paired bootstrap 95 % interval leaves
out 0; fewer than six scenes have no interval and no star.
Density is the share of scores that were computed exactly: what is pinned comes on top of the keep ratio. No attention weight was
trained for sparsity. `means` are block means; `linear` is `proj_lin` fitted in closed form (`calibrate`) to {calibration} rendered
scenes of other textures. `{applied}` is what `apply_lite3r` does by default, `{calibrated}` the same after `calibrate`.
"""


def markdown(store: dict[str, Any], source: str = "results/quality.json") -> str:
    """The whole page: how to read it, what follows where all rows are there, tables of changes."""
    conditions = store["conditions"]
    shown = conditions | ({"weights": generation(conditions)} if conditions["weights"] == "default" else {})
    listed = ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in shown.items())
    words = {"applied": APPLIED, "calibrated": CALIBRATED, "calibration": conditions["calibration"]}
    parts = [HEAD.format(source=source, conditions=listed[0].upper() + listed[1:], **words)]
    if is_complete(store):
        parts.append(findings(store))
    parts += [rendered(store), photographs(store)]
    if is_complete(store):
        parts.append(TRIED_LINK)
    return "\n".join(_wrapped(part) for part in parts if part)


def pins(store: dict[str, Any]) -> str:
    """What the operator's choices of blocks and what is pinned cost, from rows that `quality.py` stored."""
    by_views, conditions = groups(store, RENDERED), store["conditions"]
    sizes = ", ".join(f"{group['sets']} scenes of {views} views" for views, group in by_views.items())
    shown = {name: conditions[name] for name in ("device", "dtype")} | {"weights": generation(conditions), "sizes": sizes}
    lines = [PINS_HEAD.format(size=next(iter(by_views.values()))["size"][0], **shown)]
    lines += _head(["", "views", "density", *(name for name, _, _ in PINNED)])
    absent = []
    for keep, (way, row), (views, group) in itertools.product((DEFAULT_KEEP, DEFAULT_KEEP / 2), PIN_WAYS.items(), by_views.items()):
        if (key := f"{row} {keep}") in group["rows"]:
            cells = [_cell(group, key, measure, digits) for _, measure, digits in PINNED]
            lines.append(_line([f"{keep}, {way}", str(views), f"{group['rows'][key]['density']:.2f}", *cells]))
        else:
            absent.append(f"{keep}, {way}, with {views} views")
    dense = (
        ", ".join(f"{mean(group, 'dense', measure):.{digits}f} {name}" for name, measure, digits in PINNED) + f" with {views} views"
        for views, group in by_views.items()
    )
    lines += ["", f"The dense model has {'; '.join(dense)}." + (f" Not measured: {'; '.join(absent)}." if absent else "")]
    counts = {}
    for end, keeps in {"": (DEFAULT_KEEP, DEFAULT_KEEP / 2), "_half": (0.5,)}.items():
        pairs = _by_choice(by_views.values(), keeps)
        found = [(m, interval(first["scenes"], second["scenes"], m)) for first, second in pairs for _, m, _ in PINNED]
        better = sum((change.difference > 0) == (measure != ABS_REL) for measure, change in found)
        counts |= {f"pairs{end}": len(found), f"clear{end}": sum(change.clear for _, change in found), f"better{end}": better}
    return "\n".join([*lines, "", PINS_TAIL.format(**counts)])


def _by_choice(groups: Iterable[dict[str, Any]], keeps: tuple[float, ...]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Pairs of rows of `pins`, by mean and by error, the rest alike."""
    for group, keep, end in itertools.product(groups, keeps, ("", ", calibrated")):
        pair = [f"{PIN_WAYS[choice + end]} {keep}" for choice in ("mean", "error")]
        if all(key in group["rows"] for key in pair):
            yield group["rows"][pair[0]], group["rows"][pair[1]]


def tried(store: dict[str, Any], chosen: dict[str, Any]) -> str:
    """What other choices of key blocks gave, as `quality_blocks.py` stored it, and those of the operator, as `quality.py` did."""
    sites = {(views, keep): rows for views, of in store["sites"].items() for keep, rows in of["rows"].items()}
    first = next(iter(sites.values()))
    heads = ["", *(f"{views} views, {keep}" for views, keep in sites)]
    lines = [TRIED.format(weights=generation(store), scenes=_counts(store["sites"])), *_head(heads)]
    for way in sorted(first, key=lambda way: first[way]["error"]):
        cells = [f"{rows[way]['error']:.3f}, {100 * rows[way]['recall']:.0f}" if way in rows else "" for rows in sites.values()]
        lines.append(_line([way, *cells]))
    views, of = next(iter(store["sites"].items()))
    words = {"views": views, "ratios": _listed([str(keep) for keep in of["rows"]])}
    for word, way in TRIED_WAYS.items():
        ratios = (rows[way]["error"] / rows["mean"]["error"] for rows in of["rows"].values())
        words[word] = _listed([f"{abs(100 * (ratio - 1)):.0f}" for ratio in ratios]) + " %"
    lines += ["", TRIED_FINDINGS.format(**words), pins(chosen), TRIED_JUDGED]
    for views, of in store.get("judged", {}).items():
        dense = of["rows"]["dense"]
        lines += [f"{of['scenes']} scenes of {views} views; changes against `dense`:", ""]
        lines += _head(["", "AbsRel", "AUC@30", "AUC@5", "depth against dense", "rotation against dense °"])
        for way, scenes in of["rows"].items():
            if way == "dense":
                cells = [f"{sum(values(dense, m)) / len(dense):.{digits}f}" for m, digits in JUDGED] + ["", ""]
            else:
                cells = [difference(dense, scenes, m, digits) for m, digits in JUDGED]
                cells += [f"{sum(values(scenes, m)) / len(scenes):.{digits}f}" for m, digits in NEAR]
            lines.append(_line([way, *cells]))
    return _wrapped("\n".join(lines) + "\n")


def _listed(words: list[str]) -> str:
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else words[0]


def _counts(sites: dict[str, Any]) -> str:
    return ", ".join(f"{of['scenes']} scene{'s' * (of['scenes'] > 1)} of {views} views" for views, of in sites.items())


def groups(store: dict[str, Any], data: str) -> dict[int, dict[str, Any]]:
    """The groups of a data set that have scenes, by their number of views, ascending; without those that a run has not ended yet."""
    named = {name: group for name, group in store["groups"].items() if name.partition("/")[0] == data and group.get("sets")}
    most = max((len(group["rows"]) for group in named.values()), default=0)
    found = {int(name.partition("/")[2]): group for name, group in named.items() if len(group["rows"]) == most}
    return dict(sorted(found.items()))


def rendered(store: dict[str, Any]) -> str:
    """Changes of depth and cameras on rendered scenes: one row a variant, two columns a number of views."""
    by_views = groups(store, RENDERED)
    if not by_views:
        return ""
    heads = ["", "density", *(f"{name}, {views} views" for views in by_views for name in ("AbsRel", "AUC@30"))]
    sizes = ", ".join(f"{group['sets']} scenes of {views} views" for views, group in by_views.items())
    height, width = next(iter(by_views.values()))["size"]
    lines = [
        "## Rendered scenes\n",
        f"{sizes}, {height} × {width} pixels. The first two rows are values, the others changes against `dense`. "
        "Density is for each number of views. Blocks by mean, and the reference view as keys, are in [Choices of key blocks]"
        "(quality_blocks.md#the-operators-choices-and-what-is-pinned).\n",
        *_head(heads),
    ]
    elsewhere = {f"{row} {keep}" for row in PIN_WAYS.values() if row not in (APPLIED, CALIBRATED) for keep in KEEPS}
    for key in next(iter(by_views.values()))["rows"]:
        if key in elsewhere or not all(key in group["rows"] for group in by_views.values()):
            continue
        rows = [group["rows"][key] for group in by_views.values()]
        cells = [key, "" if rows[0]["density"] in (None, 1) else ", ".join(f"{row['density']:.2f}" for row in rows)]
        for group in by_views.values():
            cells += [_cell(group, key, ABS_REL, 4), _cell(group, key, AUC30, 1)]
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def photographs(store: dict[str, Any]) -> str:
    """What the default costs on every other data set; nothing where there is none."""
    names = list(dict.fromkeys(name.partition("/")[0] for name in store["groups"]))
    keys = ("constant", "dense", f"{APPLIED} {DEFAULT_KEEP}", f"{CALIBRATED} {DEFAULT_KEEP}")
    lines = []
    for data in names:
        for views, group in groups(store, data).items() if data != RENDERED else ():
            cells = [data, str(views), str(group["sets"])]
            for measure, digits in ((ABS_REL, 4), (AUC30, 1)):
                cells += [_cell(group, key, measure, digits) if key in group["rows"] else "" for key in keys]
            lines.append(_line(cells))
    if not lines:
        return ""
    columns = [f"{name}: {row}" for name in ("AbsRel", "AUC@30") for row in ("constant", "dense", "applied", "calibrated")]
    head = ["data", "views", "sets", *columns]
    text = f"`keep_ratio={DEFAULT_KEEP}`; `applied` and `calibrated` are changes against `dense`. DTU and Strecha have no depth here.\n"
    return "\n".join(["## Photographs\n", text, *_head(head), *lines]) + "\n"


def summary(store: dict[str, Any]) -> str:
    """The table of the README: the default, dense, as applied and calibrated, over numbers of views and two keep ratios."""
    lines = _head(["views", "`keep_ratio`", "AbsRel ↓ dense / applied / calibrated", "AUC@30 ↑ dense / applied / calibrated"])
    for views, group in groups(store, RENDERED).items():
        for keep in (DEFAULT_KEEP, DEFAULT_KEEP / 2):
            keys = ("dense", f"{APPLIED} {keep}", f"{CALIBRATED} {keep}")
            cells = [
                " / ".join(f"{mean(group, key, measure):.{digits}f}" for key in keys) for measure, digits in ((ABS_REL, 3), (AUC30, 1))
            ]
            lines.append(_line([str(views), str(keep), *cells]))
    return "\n".join(lines) + "\n"


def is_complete(store: dict[str, Any]) -> bool:
    """Whether `store` has all rows that `findings` speaks of."""
    by_views = groups(store, RENDERED)
    needed = {
        *(f"{row} {keep}" for row in ("sparse", MEAN_ROW, APPLIED, CALIBRATED, AS_KEYS, "sparse + means + linear, all") for keep in KEEPS),
        *(f"{row} 0.25" for row in ("sparse + means, raster order", "sparse, nothing pinned")),
        *(f"{row}, reference view not pinned 0.25" for row in ("sparse", APPLIED)),
    }
    photos = all(groups(store, data) for data in ("7scenes", "dtu-idr", "strecha"))
    return photos and len(by_views) > 1 and all(needed <= set(group["rows"]) for group in by_views.values())


def findings(store: dict[str, Any]) -> str:
    """What the defaults follow from, with the numbers of `store`, which `is_complete`."""
    by_views = groups(store, RENDERED)
    few, many = min(by_views), max(by_views)
    near, density = "teacher.depth_abs_rel", {views: {k: row["density"] for k, row in g["rows"].items()} for views, g in by_views.items()}

    def depth(views: int, first: str, second: str) -> str:
        return f"{mean(by_views[views], first, near):.3f} to {mean(by_views[views], second, near):.3f}"

    def lost(views: int, row: str, keep: float = DEFAULT_KEEP) -> str:
        return f"{-mean_change(by_views[views], f'{row} {keep}', AUC30):.1f}"

    def strict(views: int) -> str:
        group, measure = by_views[views], "pose.auc5"
        return f"{-mean_change(group, f'{CALIBRATED} {DEFAULT_KEEP}', measure):.1f} of {mean(group, 'dense', measure):.1f}"

    def abs_rel(views: int, key: str) -> str:
        return f"{mean_change(by_views[views], key, ABS_REL):.3f} of AbsRel at density {density[views][key]:.2f}"

    def fitted(keep: float) -> str:
        return ", ".join(f"from {lost(v, APPLIED, keep)} to {lost(v, CALIBRATED, keep)} ({v} views)" for v in by_views)

    def between(values: list[float], digits: int) -> str:
        return f"{min(values):.{digits}f} to {max(values):.{digits}f}"

    def off(first: str, second: str) -> str:
        """What the second row takes off the change of depth that the first has, in percent, and adds to its AUC@30."""
        cells = [(group, keep) for group in by_views.values() for keep in KEEPS]
        depths = [100 * (1 - mean(g, f"{second} {keep}", near) / mean(g, f"{first} {keep}", near)) for g, keep in cells]
        cameras = [mean(g, f"{second} {keep}", AUC30) - mean(g, f"{first} {keep}", AUC30) for g, keep in cells]
        return (
            f"{between(depths, 0)} % off the change of depth against the dense model, and lose {between(cameras, 1)} points of AUC@30 less"
        )

    loose, free = "sparse, reference view not pinned 0.25", "sparse, nothing pinned 0.25"
    raster = [mean(g, f"{APPLIED} 0.25", AUC30) - mean(g, "sparse + means, raster order 0.25", AUC30) for g in by_views.values()]
    special = [mean(g, loose, AUC30) - mean(g, free, AUC30) for g in by_views.values()]
    cost = [density[views][loose] - density[views][free] for views in by_views]
    unpinned = f"{APPLIED}, reference view not pinned 0.25"
    half = [-mean_change(by_views[views], f"{CALIBRATED} 0.5", AUC30) for views in by_views]
    strecha = groups(store, "strecha")[8]
    rooms = groups(store, "7scenes").values()
    constant = between([mean(g, "dense", ABS_REL) / mean(g, "constant", ABS_REL) for g in rooms], 2)

    def seen(data: str) -> str:
        return between([mean(group, "dense", AUC30) for group in groups(store, data).values()], 0)

    def of_strecha(row: str) -> str:
        return f"{-mean_change(strecha, f'{row} 0.25', AUC30):.1f}"

    worse = [mean_change(by_views[many], f"{row} 0.125", ABS_REL) for row in (CALIBRATED, APPLIED)]
    return f"""## Findings

* **Block means pay on rendered scenes** (`block_means=True`). Untrained, with the same choice of blocks, by mean, they take
  {off("sparse", MEAN_ROW)}, over all keep ratios and numbers of views: at 0.25 the change of depth
  goes from {depth(few, "sparse 0.25", f"{MEAN_ROW} 0.25")} with {few} views
  and from {depth(many, "sparse 0.25", f"{MEAN_ROW} 0.25")} with {many}.
* **Blocks by error pay on top, there** (`block_choice="auto"`). At the same density they take another {off(MEAN_ROW, APPLIED)}.
* **The linear branch pays over marginal blocks, calibrated** (`linear_branch="marginal"`), for cameras. With means it takes the loss of
  AUC@30, in points, at 0.25 {fitted(0.25)}; at 0.125 {fitted(0.125)}. AbsRel is no better by it: with {many} views at 0.125 worse than
  dense by {worse[0]:.4f} with it, by {worse[1]:.4f} without. Over all tokens it gains less.
* **Pinning the reference view pays for depth** (`pin="reference"`). It costs density, so a fair comparison is with a smaller keep
  ratio. With {many} views and means, 0.125 pinned loses {abs_rel(many, f"{APPLIED} 0.125")}, 0.25 not pinned {abs_rel(many, unpinned)}.
  For cameras it is the other way round: {lost(many, APPLIED, 0.125)} points of AUC@30 against
  {lost(many, f"{APPLIED}, reference view not pinned")}. With `pin="reference_keys"` 0.25 loses
  {abs_rel(many, f"{AS_KEYS} 0.25")}, where pinned it loses {abs_rel(many, f"{APPLIED} 0.25")}; {lost(many, AS_KEYS)} points, where
  pinned it loses {lost(many, APPLIED)} ([both at equal density](../docs/recipes.md#for-cameras-the-reference-view-as-keys)).
* **Pinning camera and register tokens pays for cameras**: without it {between(special, 1)} points of AUC@30 more are lost. It costs
  {between(cost, 2)} of density.
* **Tile order beats raster order, with means**: the change of depth against the dense model goes from
  {depth(few, "sparse + means, raster order 0.25", f"{APPLIED} 0.25")} with {few} views and from
  {depth(many, "sparse + means, raster order 0.25", f"{APPLIED} 0.25")} with {many}. AUC@30 gains
  {" and ".join(f"{gain:.1f}" for gain in raster[1:])} points with more views than {few}, where it does not tell the two apart.
* **`keep_ratio=0.25` is the default and is not free for cameras.** On this small model, whose blocks are large beside its images
  (196 patches), 0.25 costs {lost(few, APPLIED)} and {lost(many, APPLIED)} points of AUC@30 with {few} and {many} views, calibrated
  {lost(few, CALIBRATED)} and {lost(many, CALIBRATED)}, and 0.5, calibrated, {max(half):.1f} at most. At 5° it
  costs relatively more: of AUC@5 {strict(few)} with {few} views and {strict(many)} with {many}, calibrated.
* **Photographs say little.** On 7-Scenes the dense testbed's depth is {constant} times as far off as that of `constant`, its AUC@30
  {seen("7scenes")}, on DTU {seen("dtu-idr")}. On Strecha it sees much (AUC@30 {mean(strecha, "dense", AUC30):.1f}), but there are two
  scenes, of which cameras say the opposite of rendered ones: with means, by mean {of_strecha(MEAN_ROW)} points are lost, by error
  {of_strecha(APPLIED)}, with the reference view as keys {of_strecha(AS_KEYS)}, in raster order
  {of_strecha("sparse + means, raster order")}. The photographs were recompressed (JPEG, 640 pixels of detail)
  and thinned out: every 24th frame of 7-Scenes kitchen, DTU scan24, Strecha fountain-P11 and Herz-Jesus-P8, which has too few views for
  rows of 16.
"""


def full(store: dict[str, Any]) -> str:
    """Every measure of every row, with intervals: one table for each data set and number of views."""
    return "\n".join(table(name, group) for name, group in store["groups"].items())


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
    lines = [f"{title}\n\n{group['sets']} sets of views, images {group['size'][0]} × {group['size'][1]}.\n", *_head(heads)]
    for key, row in group["rows"].items():
        cells = [key, "" if row["density"] is None else f"{row['density']:.3f}"]
        for measure, digits in columns.values():
            found = values(row["scenes"], measure)
            cells.append(
                f"{sum(found) / len(found):.{digits}f}" if found and not (key == "dense" and measure.startswith("teacher")) else ""
            )
        for measure, digits in differences.values():
            cells.append("" if key in ("dense", "constant") else difference(dense, row["scenes"], measure, digits))
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def values(scenes: list[dict[str, float | None]], measure: str) -> list[float]:
    """The measure of the scenes that have it."""
    return [value for scene in scenes if (value := scene.get(measure)) is not None]


def mean(group: dict[str, Any], key: str, measure: str) -> float:
    """Mean of a measure over the scenes of the row `key`; NaN where no scene has it."""
    found = values(group["rows"][key]["scenes"], measure)
    return sum(found) / len(found) if found else math.nan


def interval(dense: list[dict[str, float | None]], other: list[dict[str, float | None]], measure: str) -> Interval:
    """Mean difference other - dense with its paired interval."""
    first, second = ([math.nan if (x := scene.get(measure)) is None else x for scene in scenes] for scenes in (dense, other))
    return paired_bootstrap(first, second)


def mean_change(group: dict[str, Any], key: str, measure: str) -> float:
    """Mean difference of the row `key` from the dense one."""
    return interval(group["rows"]["dense"]["scenes"], group["rows"][key]["scenes"], measure).difference


def difference(dense: list[dict[str, float | None]], other: list[dict[str, float | None]], measure: str, digits: int) -> str:
    """Mean difference with its interval."""
    found = interval(dense, other, measure)
    bounds = "" if math.isnan(found.low) else f" [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    return f"{found.difference:+.{digits}f}{bounds}{' *' if found.clear else ''}"


def _cell(group: dict[str, Any], key: str, measure: str, digits: int) -> str:
    """The value of `dense` and `constant`, the change of any other row; nothing where no scene has the measure."""
    rows = group["rows"]
    if math.isnan(mean(group, key, measure)):
        return ""
    if key in ("dense", "constant"):
        return f"{mean(group, key, measure):.{digits}f}"
    found = interval(rows["dense"]["scenes"], rows[key]["scenes"], measure)
    return f"{found.difference:+.{digits}f}{' *' if found.clear else ''}"


def _wrapped(text: str) -> str:
    """`text` with its paragraphs and list items, which may be set in any way here, in lines of one width."""

    def fill(match: re.Match[str]) -> str:
        indent = "  " if match[0].startswith("* ") else ""
        return textwrap.fill(" ".join(match[0].split()), WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)

    return re.sub(r"^(?![|#]).+(?:\n(?![|#]|\* ).+)*", fill, text, flags=re.MULTILINE)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _head(heads: list[str]) -> list[str]:
    return [_line(heads), "|" + "|".join(["---"] + ["---:"] * (len(heads) - 1)) + "|"]


def main() -> None:
    """Write the page, or print the full tables of one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", type=Path, metavar="RESULTS.json", help="print every measure of this file in place of writing the page")
    args = parser.parse_args()
    if args.full:
        print(full(json.loads(args.full.read_text())))
    else:
        PAGE.write_text(markdown(json.loads(STORED.read_text())))
        BLOCKS_PAGE.write_text(tried(json.loads(BLOCKS.read_text()), json.loads(STORED.read_text())))
        print(f"wrote {PAGE} and {BLOCKS_PAGE}")


if __name__ == "__main__":
    main()
