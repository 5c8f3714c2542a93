"""Quality lost over time gained, in one picture, from what is stored.

    python benchmarks/picture.py

draws `docs/images/quality_over_speed.png` and writes what stands under it between the marks in `docs/quality.md`. Nothing is measured.

Quality is that of the testbed, each row against its own dense form on the same scenes: `testbed_distillation_keep*.json` (written by
`training/distillation.py`), `quality_auto.json` (`quality_auto.py`), `quality.json` (`quality.py`). Rows of images of another size, or of
other weights of the testbed than the first of these files, are left out.
Speed is that of `lite3r-fp8` in `h200_vggt_518_keep*.json`, written by

    lite3r bench --model vggt --views 16,32 --keep-ratio K --fill-branch --variants strong,strong-exact,lite3r-fp8 --json FILE

A point is drawn where both are stored at one keep ratio and number of views. Nothing is interpolated; what is missing is printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import quality_report
from readme_table import branch_is_filled, in_percent, longest_trained
from weights import generation

from lite3r_plugin.bench.plots import Tradeoff, quality_over_gain, save_figure
from lite3r_plugin.config import DEFAULT_KEEP_RATIO
from lite3r_plugin.files import write_atomically
from lite3r_plugin.scene.metrics import Interval

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "images" / "quality_over_speed.png"
PAGE = ROOT / "docs" / "quality.md"
MARKED = re.compile(r"(<!-- picture -->\n).*?(<!-- end of picture -->)", re.DOTALL)
SPEED_FILES, DISTILLATION_FILES = "h200_vggt_518_keep*.json", "testbed_distillation_keep*.json"
AUTO_FILE, QUALITY_FILE, FP8_FILE = "quality_auto.json", "quality.json", "h200_testbed_fp8_default.json"
WIDTH = 130
SIZE = 224  # pixels of the testbed's images

UNTRAINED, CALIBRATED, AUTO, DISTILLED = SERIES = ("untrained", "calibrated", 'keep_ratio="auto", calibrated', "distilled")
TIMED_IN = "FP8"
AUC30, ABS_REL = "AUC@30 lost, points", "AbsRel worse by, %"

Key = tuple[float, int]  # keep ratio, views


@dataclasses.dataclass(frozen=True)
class Quality:
    """What one series loses at one keep ratio and number of views, with the file that says so."""

    series: str
    key: Key
    lost: dict[str, Interval]
    precision: str
    file: str
    more: str = ""

    @property
    def rank(self) -> tuple[bool, int]:
        """Of two the greater one is drawn: that in the precision of the times, that of more scenes."""
        return self.precision == TIMED_IN, self.lost[AUC30].scenes


@dataclasses.dataclass(frozen=True)
class Speed:
    """How many times faster than strong dense, and than that with our kernels (None where it was not measured)."""

    key: Key
    over_strong: float
    over_exact: float | None
    source: str


class Stored:
    """What a folder of results holds for the picture.

    Args:
        folder: Of the results.
        weights: The hash of the testbed's weights; rows of others are left out. None: those of the distillation's rows.

    Attributes:
        points: Quality and speed of what can be drawn, by views, falling keep ratio and series.
        without_quality: Keep ratios of which the speed alone is stored.
        missing: What is not drawn, and why; a sentence each.
    """

    def __init__(self, folder: Path, weights: str | None = None) -> None:
        self.folder, self.missing = folder, []
        self.weights = weights or next((report["conditions"]["weights_sha256"] for _, report in self.read(DISTILLATION_FILES)), None)
        speeds = {speed.key: speed for speed in self._speeds()}
        best = self._best([*self._distillation(), *self._auto(), *self._quality()])
        measured = dict.fromkeys(key for _, key in best)  # in their order
        self.points = [(quality, speeds[key]) for (_, key), quality in best.items() if key in speeds]
        self.without_quality = sorted({keep for keep, _ in speeds} - {keep for keep, _ in measured}, reverse=True)
        for keep, views in _by_ratio(measured.keys() - speeds.keys()):
            self.missing.append(
                f"keep_ratio {keep:g}, {_listed(views)} views: quality is stored, speed is not; lite3r bench --model vggt --views "
                f"{','.join(map(str, views))} --keep-ratio {keep:g} --fill-branch --variants strong,strong-exact,lite3r-fp8 --json FILE"
            )
        for keep, views in _by_ratio(speeds.keys() - measured.keys()):
            self.missing.append(f"keep_ratio {keep:g}, {_listed(views)} views: speed is stored, quality is not")
        for key in measured:
            if key in speeds and (absent := [name for name in SERIES if (name, key) not in best]):
                self.missing.append(f"{_at(key)}: no quality of {'; '.join(absent)}")

    def _best(self, found: Sequence[Quality]) -> dict[tuple[str, Key], Quality]:
        """Of each series at each key the one that is drawn, by views, falling keep ratio and series."""
        best: dict[tuple[str, Key], Quality] = {}
        places = {name: i for i, name in enumerate(SERIES)}
        for one in sorted(found, key=lambda q: (q.key[1], -q.key[0], places[q.series], *(-x for x in q.rank))):
            if (drawn := best.setdefault((one.series, one.key), one)) is not one:
                self.missing.append(f"{_at(one.key)}: {one.series} of {_source(one)}, because that of {_source(drawn)} is")
        return best

    def read(self, pattern: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The results whose names match, with their names."""
        for path in sorted(self.folder.glob(pattern)):
            yield path.name, json.loads(path.read_text())

    def _speeds(self) -> Iterator[Speed]:
        for name, report in self.read(SPEED_FILES):
            conditions, times = report["conditions"], {}
            for cell in report["cells"]:
                if cell["best"] is not None:
                    times[cell["views"], cell["variant"]] = cell["candidates"][cell["best"]]["median_ms"]
            if set(conditions["lite3r_options"]) != {"keep_ratio"}:
                self.missing.append(f"{name}: measured with more options than keep_ratio, so it is not that of the testbed's rows")
                continue
            also = ", linear branches as after calibration" if branch_is_filled(conditions) else ""
            source = f"`{name}` ({conditions['device']}, {conditions['date'][:10]}, commit {conditions['commit'][:7]}{also})"
            for views in sorted({views for views, _ in times}):
                ours, strong, exact = (times.get((views, variant)) for variant in ("lite3r-fp8", "strong", "strong-exact"))
                if ours is None or strong is None:
                    absent = [variant for variant in ("lite3r-fp8", "strong") if (views, variant) not in times]
                    self.missing.append(f"{name}: no time of {' and '.join(absent)} with {views} views")
                    continue
                yield Speed((conditions["lite3r_options"]["keep_ratio"], views), strong / ours, exact and exact / ours, source)

    def _distillation(self) -> Iterator[Quality]:
        for name, report in self.read(DISTILLATION_FILES):
            conditions = report["conditions"]
            if not self._fits(name, conditions, conditions["size"]):
                continue
            longest = longest_trained(report)
            for stored in report["rows"].values():
                row = stored["row"]
                if row["training"] and stored is not longest:
                    continue  # parts of the recipe, trained for shorter
                precision = "FP8" if row["precision"] == "fp8" else _precision(conditions["dtype"])
                series = DISTILLED if row["training"] else AUTO if row.get("chosen") else CALIBRATED if row["calibrated"] else UNTRAINED
                more = f"{row['training']['minutes']:g} minutes" if row["training"] else ""
                for views, change in stored["against_dense"].items():
                    lost = {
                        AUC30: _lost(change["auc30"] | {"scenes": conditions["scenes"]}, -1),
                        ABS_REL: _lost(change["abs_rel"] | {"scenes": conditions["scenes"]}, 1),
                    }
                    yield Quality(series, (stored["keep_ratio"], int(views)), lost, precision, name, more)

    def _auto(self) -> Iterator[Quality]:
        ways = {"uniform": UNTRAINED, "uniform + calibrate": CALIBRATED, "auto + calibrate": AUTO}
        for name, report in self.read(AUTO_FILE):
            conditions = report["conditions"]
            if not self._fits(name, conditions, conditions["size"]):
                continue
            for views, group in report["groups"].items():
                dense = group["rows"]["dense"]["AbsRel"]["mean"]
                for key, row in group["rows"].items():
                    way, _, ratio = key.rpartition(" ")
                    if way in ways:
                        lost = {AUC30: _lost(row["AUC@30"]["change"], -1), ABS_REL: _lost(row["AbsRel"]["change"], 100 / dense)}
                        yield Quality(ways[way], (float(ratio), int(views)), lost, _precision(conditions["dtype"]), name)

    def _quality(self) -> Iterator[Quality]:
        rows = {quality_report.APPLIED: UNTRAINED, quality_report.CALIBRATED: CALIBRATED}
        for name, store in self.read(QUALITY_FILE):
            conditions = store["conditions"]
            for views, group in quality_report.groups(store, quality_report.RENDERED).items():
                dense = group["rows"]["dense"]["scenes"]
                if not self._fits(name, conditions, *group["size"]):
                    continue
                for key, row in group["rows"].items():
                    way, _, ratio = key.rpartition(" ")
                    if way in rows:
                        auc30 = quality_report.interval(dense, row["scenes"], quality_report.AUC30)
                        abs_rel = quality_report.interval(dense, row["scenes"], quality_report.ABS_REL)
                        level = quality_report.mean(group, "dense", quality_report.ABS_REL)
                        lost = {AUC30: _lost(auc30.to_dict(), -1), ABS_REL: _lost(abs_rel.to_dict(), 100 / level)}
                        yield Quality(rows[way], (float(ratio), views), lost, _precision(conditions["dtype"]), name)

    def _fits(self, name: str, conditions: dict[str, Any], *sizes: int) -> bool:
        if set(sizes) != {SIZE}:
            self.missing.append(f"{name}: of images of {sizes[0]} pixels, not {SIZE}, so it is left out")
        elif self.weights not in (None, conditions["weights_sha256"]):
            self.missing.append(
                f"{name}: of the weights {conditions['weights_sha256']}, where others are of {self.weights}, so it is left out"
            )
        else:
            return True
        return False


def section(stored: Stored) -> str:
    """What stands on the page: the picture, its numbers, how to read it. Nothing where there is no point."""
    if not stored.points:
        return ""
    alt = "Loss of AUC@30 and of AbsRel over the gain in time, with intervals: " + ", ".join(_shown(stored))
    intro = (
        "What the testbed loses, over the time that VGGT-1B gains, at the same `keep_ratio` and number of views. They are two models: no "
        "weights of VGGT were at hand, and times of so small a model as the testbed say little. "
        f"Losses are of its {generation({'weights_sha256': stored.weights})} against its own dense form on the same held-out rendered "
        f"scenes of {SIZE} × {SIZE} pixels, with paired 95 % intervals; gains are over *strong dense*, "
        '518 × 518 pixels, of `preset="fast", precision="fp8"`. A point is drawn where both are stored, by '
        "`python benchmarks/picture.py`. Lines lead the eye: between points nothing was measured."
    )
    paragraphs = [precision(stored), auto(stored), defaults(stored), sources(stored)]
    return "\n".join(
        [
            "## Quality over speed\n",
            f"![{alt}](images/{PICTURE.name})\n",
            _filled(intro),
            table(stored),
            *(_filled(paragraph) for paragraph in paragraphs if paragraph),
        ]
    )


def table(stored: Stored) -> str:
    """The points in numbers."""
    heads = ("views", "`keep_ratio`", "", AUC30, ABS_REL, "quality in", "over strong dense", "over that with our kernels")
    rows = []
    for quality, speed in stored.points:
        keep, views = quality.key
        way = f"{quality.series}, {quality.more}" if quality.more else quality.series
        if "=" in way:
            way = f"`{way.partition(',')[0]}`{way[len(way.partition(',')[0]) :]}"
        lost = [_interval(quality.lost[measure]) for measure in (AUC30, ABS_REL)]
        gains = [f"{speed.over_strong:.2f} ×", "" if speed.over_exact is None else f"{speed.over_exact:.2f} ×"]
        rows.append((str(views), f"{keep:g}", way, *lost, quality.precision, *gains))
    lines = ["| " + " | ".join(row) + " |" for row in (heads, *rows)]
    return "\n".join([lines[0], "|" + " ---: |" * 2 + " --- |" + " ---: |" * 5, *lines[1:]]) + "\n"


def precision(stored: Stored) -> str:
    """That times are in FP8, which quality is not, and what FP8 by itself costs."""
    others = sorted({quality.precision for quality, _ in stored.points} - {TIMED_IN})
    if not others:
        return f"Times and quality are of {TIMED_IN}."
    text = f"Times are of {TIMED_IN}. So is the quality of filled points; that of hollow ones is of {' and '.join(others)}. "
    for name, alone in stored.read(FP8_FILE):
        default = alone["groups"]["the default"]
        changes = ", ".join(f"{label} {in_percent(default[measure])}" for label, measure in (("AUC@30", "auc30"), ("AbsRel", "abs_rel")))
        views = alone["conditions"]["views"]
        other = alone["conditions"].get("weights_sha256")
        weights = f" in the testbed's {generation(alone['conditions'])}" if other not in (None, stored.weights) else ""
        return text + f"FP8 alone, without sparsity, changed {changes} of dense with {views} views{weights} (`{name}`)."
    return text + "What FP8 alone costs is not stored."


def auto(stored: Stored) -> str:
    """How the points of chosen ratios are to be read, with the paired comparison."""
    drawn = [quality for quality, _ in stored.points if quality.series == AUTO]
    if not drawn:
        return ""
    text = (
        '`keep_ratio="auto"` has a ratio for each site whose mean is the one told; its gain is that of the same ratio at all sites, which '
        "computes as much."
    )
    groups: dict[str, Any] = {}
    for _, report in stored.read(AUTO_FILE):
        groups |= report["groups"]
    parts = []
    besides = {quality.key for quality, _ in stored.points if (quality.series, quality.file) == (CALIBRATED, AUTO_FILE)}
    for quality in (quality for quality in drawn if quality.file == AUTO_FILE and quality.key in besides):
        keep, views = quality.key
        gain = groups.get(str(views), {}).get("gains", {}).get(f"auto + calibrate {keep:g} - uniform + calibrate {keep:g}")
        if gain is not None:
            parts.append(f"{_interval(_lost(gain['AUC@30'], 1))} points ({_at(quality.key)})")
    if parts:
        text += f" On the same scenes, calibrated both, its AUC@30 is higher than with one ratio for all by {', '.join(parts)}."
    return text


def defaults(stored: Stored) -> str:
    """What is read off the picture for the ratios that are published."""
    found = {quality.key: (quality, speed) for quality, speed in stored.points if quality.series == CALIBRATED}
    parts = []
    for keep in sorted({keep for keep, _ in found}, reverse=True):
        costs = [
            f"{speed.over_strong:.2f} × for {quality.lost[AUC30].difference:.1f} points of AUC@30 and "
            f"{quality.lost[ABS_REL].difference:.1f} % of AbsRel with {views} views"
            for (k, views), (quality, speed) in found.items()
            if k == keep
        ]
        parts.append(f"`keep_ratio={keep:g}`{', the default' * (keep == DEFAULT_KEEP_RATIO)}: {', '.join(costs)}")
    text = f"Read off it, calibrated: {'; '.join(parts)}." if parts else ""
    if DEFAULT_KEEP_RATIO not in {keep for keep, _ in found}:
        text += f" The default, {DEFAULT_KEEP_RATIO:g}, is not in it."
    if stored.without_quality:
        text += f" Of {' and '.join(f'{keep:g}' for keep in stored.without_quality)} the speed is stored and no quality."
    return text.strip()


def sources(stored: Stored) -> str:
    """The files."""
    qualities = dict.fromkeys(f"`{quality.file}` ({quality.lost[AUC30].scenes} scenes)" for quality, _ in stored.points)
    speeds = dict.fromkeys(speed.source for _, speed in stored.points)
    return f"From `benchmarks/results/`: quality {', '.join(qualities)}; times {', '.join(speeds)}."


def draw(stored: Stored, path: Path) -> None:
    """The picture. Its header holds the table, which says what it shows."""
    points = [Tradeoff(q.series, q.key[1], q.key[0], speed.over_strong, q.lost, q.precision) for q, speed in stored.points]
    title = f"Time: VGGT-1B, 518 px, one H200, {TIMED_IN}. Quality: the testbed, {SIZE} px, 95 % intervals"
    save_figure(quality_over_gain(points, SERIES, "strong dense", TIMED_IN, title), path, description=table(stored))


def update(page: str, stored: Stored) -> str:
    """`page` with what stands between the marks written anew."""
    return MARKED.sub(lambda match: match[1] + section(stored) + match[2], page)


def _lost(change: dict[str, Any], unit: float) -> Interval:
    """A stored change times `unit`; where that is below zero, its bounds change places."""
    difference, *bounds = (math.nan if (x := change[name]) is None else x * unit for name in ("difference", "low", "high"))
    low, high = bounds if unit > 0 else reversed(bounds)
    return Interval(difference, low, high, change["scenes"])


def _interval(found: Interval) -> str:
    bounds = "" if math.isnan(found.low) else f" [{found.low:.2f}, {found.high:.2f}]"
    return f"{found.difference:.2f}{bounds}"


def _precision(dtype: str) -> str:
    return "BF16" if dtype.startswith("bfloat16") else "FP32"


def _at(key: Key) -> str:
    return f"keep_ratio {key[0]:g}, {key[1]} views"


def _by_ratio(keys: Iterable[Key]) -> list[tuple[float, list[int]]]:
    """Keep ratios, falling, each with its numbers of views."""
    ordered = sorted(keys, key=lambda key: (-key[0], key[1]))
    return [(keep, [views for _, views in group]) for keep, group in itertools.groupby(ordered, key=lambda key: key[0])]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _source(quality: Quality) -> str:
    return f"{quality.file} ({quality.precision}, {quality.lost[AUC30].scenes} scenes)"


def _shown(stored: Stored) -> Sequence[str]:
    return list(dict.fromkeys(quality.series.replace('"', "") for quality, _ in stored.points))


def _filled(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, write, and say what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of stored results")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--page", type=Path, default=PAGE, help="Markdown with the marks")
    args = parser.parse_args(arguments)
    stored = Stored(args.results)
    for text in stored.missing:
        print(f"not drawn: {text}")
    if stored.points:
        draw(stored, args.picture)
        print(f"{len(stored.points)} points in {args.picture}")
    else:
        print(f"no quality and speed are stored at one keep ratio and number of views: {args.picture} is not drawn")
    write_atomically(args.page, update(args.page.read_text(), stored))


if __name__ == "__main__":
    main()
