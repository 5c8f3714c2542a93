"""Writes the tables of README.md and docs/ from stored results: ``python benchmarks/readme_table.py``.

A table stands between ``<!-- table: KIND FILE -->`` and ``<!-- end of table -->``. KIND is a name in `TABLES`, FILE a stored result, or
several with commas between them.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import quality_report
from weights import generation

from lite3r_plugin.scene.metrics import paired_bootstrap

ROOT = Path(__file__).parent.parent
TABLE = re.compile(r"(<!-- table: (\w+) (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

WIDTH = 130

Cell = dict[str, Any]


def documents() -> list[Path]:
    """The files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def update(text: str) -> str:
    """`text` with every table rendered anew from its file."""

    def table(match: re.Match[str]) -> str:
        reports = [json.loads((ROOT / name).read_text()) for name in match[3].split(",")]
        return match[1] + TABLES[match[2]](*reports) + match[4]

    return TABLE.sub(table, text)


# Whole models: reports of `lite3r bench`.


def speed(report: dict[str, Any]) -> str:
    """The README's table: times, and each gain over the column that it is a gain over."""
    columns = {  # its head, and what it is a gain over
        "stock": ("stock", None), "lite3r": ("Lite3R", "stock"), "strong": ("strong dense", None),
        "strong-exact": ("strong dense, our kernels", "strong"), "lite3r-fp8": ("Lite3R, fast, FP8", "strong"),
    }  # fmt: skip
    measured = {cell["variant"] for cell in report["cells"]}
    columns = {name: column for name, column in columns.items() if name in measured}
    rows = [
        (str(views), *(_time_and_gain(cells(name), cells(over)) if over else _time(cells(name)) for name, (_, over) in columns.items()))
        for views, cells in _by_views(report)
    ]
    return _table(("views", *(head for head, _ in columns.values())), rows) + _note(_conditions(report))


def never_slower(report: dict[str, Any]) -> str:
    """Median ratios of runs in turns: Lite3R's time over that of what it starts from."""
    found = {(row["pair"], row["keep_ratio"], row["views"]): row for row in report["rows"]}
    pairs = {"default": "default line / stock", "preset": "preset / strong dense"}
    columns = [(pair, keep) for pair in pairs for keep in sorted({keep for _, keep, _ in found})]
    rows = [
        (str(views), *(_ratio(found.get((pair, keep, views))) for pair, keep in columns))
        for views in sorted({views for _, _, views in found})
    ]
    size = f"{report['resolution']} × {report['resolution']} pixels"
    later = [row for row in report["rows"] if "commit" in row]  # of another run
    apart = " and ".join(str(row["views"]) for row in later)
    others = f" (with {apart} views and keep {later[0]['keep_ratio']} {later[0]['commit']}, {later[0]['runs']} pairs)" if later else ""
    return _table(("views", *(f"{pairs[pair]}, keep {keep}" for pair, keep in columns)), rows) + _note(
        f"{report['model']}, {size}, on one {report['device']}, torch {report['torch']}, triton {report['triton']}, "
        f"{report['date'][:10]}, commit {report['commit'][:7]}; median of {report['rows'][0]['runs']} pairs of runs{others}. "
        f"Below 1 Lite3R is faster. {branch(report)}Weights: {report['weights']}."
    )


def kernels(report: dict[str, Any]) -> str:
    """Milliseconds of the GPU by kind of kernel, those of most first, and between kernels."""
    names = {"strong-exact": "strong dense, our kernels", "lite3r-fp8": "Lite3R, fast, FP8"}
    rows = sorted(report["rows"], key=lambda row: (list(names).index(row["variant"]), row["views"]))
    kinds = sorted({kind for row in rows for kind in row["kinds"]}, key=lambda kind: -max(row["kinds"].get(kind, 0.0) for row in rows))
    lines = [(kind, *(f"{row['kinds'].get(kind, 0.0):.1f}" for row in rows)) for kind in kinds]
    lines.append(("between kernels", *(f"{max(0.0, row['whole_ms'] - row['kernels_ms']):.1f}" for row in rows)))
    size = f"{report['resolution']} × {report['resolution']} pixels"
    others = sorted({f" (*{names[row['variant']]}*: {row['commit']})" for row in rows if "commit" in row})  # of another run
    return _table(("ms", *(f"{names[row['variant']]}, {row['views']} views" for row in rows)), lines) + _note(
        f"{report['model']}, {size}, `keep_ratio=0.1`, on one {report['device']}, torch {report['torch']}, triton {report['triton']}, "
        f"{report['date'][:10]}, commit {report['commit'][:7]}{''.join(others)}; one forward under `torch.profiler`, what is between "
        f"kernels from the median without it. {branch(report)}Weights: random."
    )


def _ratio(row: dict[str, Any] | None) -> str:
    return "" if row is None or "ratio" not in row else f"{row['ratio']:.2f}"


def times(report: dict[str, Any]) -> str:
    """In full precision: times, gains, density."""
    heads = (
        "views", "density", "stock", "Lite3R on stock", "gain over stock", "strong dense", "Lite3R on strong", "gain over strong",
        "gain over stock",
    )  # fmt: skip
    rows = [
        (
            str(views), _density(cells("lite3r-strong")), _time(cells("stock")), _time(cells("lite3r")),
            _gain(cells("lite3r"), cells("stock")), _time(cells("strong")), _time(cells("lite3r-strong")),
            _gain(cells("lite3r-strong"), cells("strong")), _gain(cells("lite3r-strong"), cells("stock")),
        )
        for views, cells in _by_views(report)
    ]  # fmt: skip
    return _table(heads, rows) + _note(_conditions(report))


def times_fp8(report: dict[str, Any]) -> str:
    """In FP8: times, and gains over each dense baseline."""
    heads = ("views", "dense in FP8", "Lite3R in FP8", "gain over dense in FP8", "gain over strong", "gain over stock")
    rows = [
        (
            str(views), _time(cells("strong-fp8")), _time(cells("lite3r-fp8")),
            *(_gain(cells("lite3r-fp8"), cells(over)) for over in ("strong-fp8", "strong", "stock")),
        )
        for views, cells in _by_views(report)
    ]  # fmt: skip
    return _table(heads, rows)


def memory(report: dict[str, Any]) -> str:
    """Peak memory of each variant."""
    names = {
        "stock": "stock", "lite3r": "Lite3R on stock", "strong": "strong dense", "strong-exact": "strong dense, our kernels",
        "lite3r-strong": "Lite3R on strong", "strong-fp8": "dense in FP8", "lite3r-fp8": "Lite3R in FP8",
    }  # fmt: skip
    measured = {cell["variant"] for cell in report["cells"]}
    names = {name: words for name, words in names.items() if name in measured}
    rows = [(str(views), *(_memory(cells(name)) for name in names)) for views, cells in _by_views(report)]
    return _table(("views", *names.values()), rows)


def launches(report: dict[str, Any]) -> str:
    """What Python costs: the same variants eager and from a CUDA graph, few views."""
    names = {"strong": "strong dense", "lite3r-strong": "Lite3R on strong", "lite3r-fp8": "Lite3R in FP8"}
    heads = ["views", "stock, eager", *(f"{name}, {how}" for name in names.values() for how in ("eager", "graph"))]
    rows = [
        (str(views), _time(cells("stock")), *(_way(cells(name), way) for name in names for way in ("eager", "graph")))
        for views, cells in _by_views(report)
        if views <= 16
    ]
    return _table(heads, rows)


def _by_views(report: dict[str, Any]) -> list[tuple[int, Callable[[str], Cell | None]]]:
    found = {(cell["views"], cell["variant"]): cell for cell in report["cells"]}

    def cells_of(views: int) -> Callable[[str], Cell | None]:
        return lambda variant: found.get((views, variant))

    return [(views, cells_of(views)) for views in sorted({views for views, _ in found})]


def _conditions(report: dict[str, Any]) -> str:
    c = report["conditions"]
    options = ", ".join(f"`{name}={value!r}`" for name, value in c["lite3r_options"].items())
    return (
        f"{c['summary'].partition(' (')[0]}, {c['resolution']} × {c['resolution']} pixels, {options}, on one {c['device']}, "
        f"torch {c['torch']}, triton {c['triton']}, {c['date'][:10]}, "
        f"commit {c['commit'][:7]}. Median milliseconds of a whole forward. {c.get('beside', '')}{branch(c)}"
        f"Weights: {c['weights'].partition(',')[0]}."
    )


def branch_is_filled(report: dict[str, Any]) -> bool:
    """Whether linear branches were measured as they are once they are calibrated, of a file that says it."""
    return report.get("linear_branch", "").startswith("filled")


def branch(report: dict[str, Any]) -> str:
    """That linear branches are filled, as a sentence; nothing where they are not."""
    return "Linear branches as after calibration. " if branch_is_filled(report) else ""


def _measured(cell: Cell | None) -> Cell | None:
    return cell["candidates"][cell["best"]] if cell is not None and cell["best"] is not None else None


def _time(cell: Cell | None) -> str:
    measured = _measured(cell)
    if measured is not None:
        return f"{measured['median_ms']:,.0f} ms"
    return "" if cell is None else {"oom": "out of memory", "skipped": "–"}.get(cell["status"], cell["status"])


def _way(cell: Cell | None, way: str) -> str:
    found = None if cell is None else cell["candidates"].get(way, {}).get("median_ms")
    return "" if found is None else f"{found:,.0f} ms"


def _memory(cell: Cell | None) -> str:
    measured = _measured(cell)
    return f"{measured['peak_bytes'] / 2**30:.1f} GiB" if measured is not None and measured["peak_bytes"] else "–"


def _gain(cell: Cell | None, over: Cell | None) -> str:
    first, second = _measured(over), _measured(cell)
    return "" if first is None or second is None else f"{first['median_ms'] / second['median_ms']:.2f} ×"


def _time_and_gain(cell: Cell | None, over: Cell | None) -> str:
    gain = _gain(cell, over)
    return f"{_time(cell)} ({gain})" if gain else _time(cell)


def _density(cell: Cell | None) -> str:
    value = None if cell is None else cell["density"]
    return "" if value is None else "dense" if value == 1 else f"{value:.2f}"


# Parts: reports of the other scripts.


def operator(report: dict[str, Any]) -> str:
    """Attention alone: the better of a queue of calls and a replay, in milliseconds."""
    names = {
        "SDPA cuDNN": "cuDNN", "SDPA flash": "flash", "published SLA": "published SLA", "ours": "ours",
        "ours, by policy (cuDNN)": "by policy", "ours, branch over all tokens": "branch over all tokens",
        "ours, sparse alone": "sparse alone", "FlexAttention, blocks given": "FlexAttention, blocks given",
    }  # fmt: skip
    found = {(record["tokens"], record["method"]): record for record in report["records"]}
    rows = []
    for tokens in sorted({tokens for tokens, _ in found}):
        ms = {name: _best(found[tokens, name]) for name in names}
        ratios = [f"{ms[name] / ms['ours']:.2f} ×" for name in ("SDPA cuDNN", "published SLA")]
        rows.append((f"{tokens:,}", *(_three(value) for value in ms.values()), *ratios))
    c = report["conditions"]
    note = (
        f"Milliseconds. {c['heads']} heads of {c['head_dim']}, {c['dtype']}, one {c['gpu']}, torch {c['torch']}, triton {c['triton']}, "
        f"`keep_ratio={report['records'][0]['keep_ratio']}`, one run."
    )
    return _table(("N", *names.values(), "ours against cuDNN", "ours against SLA"), rows) + _note(note)


def backward(report: dict[str, Any]) -> str:
    """Backward passes, in milliseconds."""
    names = {"ours": "ours", "published SLA": "published SLA", "SDPA cuDNN": "cuDNN"}
    found = {(record["tokens"], record["method"]): record for record in report["records"]}
    rows = [
        (f"{tokens:,}", *(_three(found[tokens, name]["backward_ms"]) for name in names))
        for tokens in sorted({tokens for tokens, _ in found})
    ]
    return _table(("N", *names.values()), rows)


def mlp(report: dict[str, Any]) -> str:
    """The MLP of a block in FP8 beside its peers."""
    rows = []
    for record in report["mlp"]:
        ms = record["ms"]
        best = ms[record["best_bf16"]]
        gain = f"{best / ms['ours']:.2f} ×"
        rows.append(
            (f"{record['tokens']:,}", *(f"{x:.3f} ms" for x in (best, ms["ours"])), gain, *(f"{ms[p]:.3f} ms" for p in ("te", "torchao")))
        )
    c = report["conditions"]
    errors = sorted({f"{100 * error:.1f}" for record in report["mlp"] for error in record["errors"].values()})
    kinds = sorted({record["best_bf16"].removeprefix("bf16 ") for record in report["mlp"]})
    note = (
        f"On one {c['gpu']}, torch {c['torch']}, {c['date']}: LayerNorm, {c['channels']:,} → {c['hidden']:,}, GELU, {c['hidden']:,} → "
        f"{c['channels']:,}, all quantisation included, as a CUDA graph; random weights, one run. The best BF16 is "
        f"{' or '.join(kinds)}. Relative error of the output: {' to '.join(dict.fromkeys((errors[0], errors[-1])))} % for all forms of FP8."
    )
    heads = ("tokens", "best BF16", "FP8", "gain", "TransformerEngine, one scale a tensor", "torchao, a scale a row")
    return _table(heads, rows) + _note(note)


def fp8_memory(report: dict[str, Any]) -> str:
    """Bytes of a model and its peaks, in BF16 and in FP8."""
    bf16, fp8 = report["lite3r-strong"], report["lite3r-fp8"]
    pairs = {
        "transformer blocks, all of them": (bf16["blocks"], fp8["blocks"]),
        "whole model": (sum(bf16["weights"].values()), fp8["held"]),
        **{f"peak of a forward, {views} views": (peak, fp8["forward_peak"][views]) for views, peak in bf16["forward_peak"].items()},
    }
    rows = [(name, *(f"{x / 2**20:,.0f} MiB" for x in pair), f"{pair[1] / pair[0]:.2f}") for name, pair in pairs.items()]
    rows.insert(2, ("peak of loading a whole checkpoint", "", f"{fp8['loading_peak'] / 2**20:,.0f} MiB", ""))
    c = report["conditions"]
    note = (
        f"VGGT with Lite3R, `keep_ratio={fp8['config']['keep_ratio']}`, {c['weights']} weights, {c['run']}, one {c['device']}, "
        f"torch {c['torch']}, {c['date']}. The peak of loading is {fp8['loading_peak'] / fp8['held']:.2f} of what the model then holds."
    )
    return _table(("", "BF16", "FP8", "share"), rows) + _note(note)


def fp8_quality(report: dict[str, Any]) -> str:
    """What FP8 by itself costs the trained testbed."""
    names = {"abs_rel": "AbsRel", "auc5": "AUC@5", "auc15": "AUC@15", "auc30": "AUC@30", "rotation_mean": "rotation, degrees"}
    rows = []
    for name, title in names.items():
        measure = report["groups"]["the default"][name]
        values = (f"{measure[kind]:#.4g}" for kind in ("dense", "fp8"))
        rows.append((title, f"{measure['scenes']:,}", *values, in_percent(measure)))
    c = report["conditions"]
    note = (
        f"The testbed's {generation(c)}, dense, {c['views']} views of {c['size']} pixels, {c['dtype']} against FP8, one {c['device']}, "
        f"torch {c['torch']}, {c['date']}. Paired changes with 95 % intervals."
    )
    return _table(("measure", "scenes", "BF16", "FP8", "change"), rows) + _note(note)


def in_percent(measure: dict[str, Any]) -> str:
    """The change of a measure of what `quality_fp8.py` wrote, with its interval."""
    change, low, high = measure["percent"]
    return f"{change:+.2f} % [{low:+.2f}, {high:+.2f}]"


def fp8_groups(report: dict[str, Any]) -> str:
    """What FP8 costs the trained testbed, all of it and by groups of Linears."""
    names = {"auc5": "AUC@5", "auc30": "AUC@30", "abs_rel": "AbsRel"}
    explained = {"inner blocks": "all but the first and last blocks", "the default": "the default: inner blocks but output projection"}
    rows = []
    for name, found in report["groups"].items():
        rows.append((explained.get(name, name), *(in_percent(found[measure]) for measure in names)))
    one = next(iter(report["groups"].values()))
    scenes = f"{one['auc5']['scenes']:,} rendered scenes, AbsRel on {one['abs_rel']['scenes']:,}"
    note = f"Each row is what is in FP8 alone, on {scenes}, of the testbed's {generation(report['conditions'])}."
    return _table(("in FP8", *names.values()), rows) + _note(note)


def parallel(report: dict[str, Any]) -> str:
    """One scene on several GPUs against one."""
    devices, rows = report["devices"], []
    for record in report["records"]:
        seconds, peaks, planned = record["seconds"], record["peak_bytes"], record["planned"][str(devices)]
        times = (f"{seconds[which]:.3f} s" for which in ("one", "several"))
        gigabytes = (
            f"{count / 1e9:.1f} GB" for count in (peaks["one"], peaks["several"], record["travelled_bytes"], record["planned_bytes"])
        )
        rows.append((str(record["views"]), *times, f"{record['gain']:.2f} ×", f"{planned['gain']:.2f} ×", *gigabytes))
    options = ", ".join(
        f'`{name}="{value}"`' if isinstance(value, str) else f"`{name}={value}`" for name, value in report["config"].items()
    )
    height, width = numbers if isinstance(numbers := report["resolution"], list) else (numbers, numbers)
    note = (
        f"{report['model'].upper()}, {height} × {width}, {options}, random weights; {devices} {report['device']} of one host, torch "
        f"{report['torch']}, {report['date']}, commit {report['commit']}. The link gave "
        f"{report['link_bytes_per_second'] / 1e9:.0f} GB/s in the same run."
    )
    heads = ("views", "one GPU", f"{devices} GPUs", "gain", "planned", "peak of one", f"of {devices}, each", "to each", "planned")
    return _table(heads, rows) + _note(note)


AIMS = {0.25: (0.5, "full"), 0.125: (1.0, "fp8")}  # by keep_ratio: the most that may be lost, in points and in percent, and of what


RECIPES = {
    "rate 2e-3": "twice the rate", "192 views": "twice the rate", "rate 5e-4": "half the rate", "labels": "labels besides",
    "outputs last": "outputs weighted more towards the end",
}  # fmt: skip


def distillation(report: dict[str, Any]) -> str:
    """What ways to train win back: changes against dense, by number of views."""
    names = {"auc30": "AUC@30", "auc15": "AUC@15", "abs_rel": "AbsRel"}
    heads = ("", "views", *names.values(), "steps", "minutes")
    done = list(report["rows"].values())
    levels = {views: found for row in done for views, found in row["against_dense"].items()}
    rows = [("dense", views, *(_level(name, found[name]["dense"]) for name in names), "", "") for views, found in levels.items()]
    for row in done:
        steps = re.search(r"([\d,]+) steps", row.get("distillation", ""))
        minutes = row.get("calibration_seconds", 0) / 60 + minutes_of_training(row)
        ends = (steps[1] if steps else "", f"{minutes:.1f}" if minutes else "")
        rows += [
            (_way_to_train(row["row"], report["conditions"]), views, *(_change(name, found[name]) for name in names), *ends)
            for views, found in row["against_dense"].items()
        ]
    c, keep_ratio = report["conditions"], done[0]["keep_ratio"]
    labels = " (the published recipe with them)" * any(row["row"]["name"] == "published" for row in done)
    choices = [f"{n} choices of {views} views a scene" for views, n in zip(c.get("views", ()), c.get("subsets", ()), strict=True) if n > 1]
    note = (
        f"The testbed's {generation(c)}, {c['scenes']} held-out rendered scenes of {c['size']} × {c['size']} pixels, {c['dtype']}, "
        f"one {c['device']}, torch {c['torch']}, one run a row. AUC changes in points, AbsRel in percent of dense; paired 95 % "
        f"intervals. Trained without labels{labels} on {c['pool']} scenes of other seeds and textures, {c['views_a_step']} views a step; "
        f"calibrated on {c['calibration']} inputs. Minutes are of calibration and training together, of training without compiling."
        f"{''.join(f' Means over {choice}.' for choice in choices)}"
    )
    if any(row["row"].get("chosen") for row in done):
        note += f" Ratios by site are those that `choose_keep_ratios` found, their mean {keep_ratio:g} weighted by what is computed."
    return _table(heads, rows) + _note(note) + _note(_aim(report, done, keep_ratio))


def density(*reports: dict[str, Any]) -> str:
    """What pins and ratios by site lose at the density of one ratio, from what `quality_auto.py --plain` stored of each pin."""
    measures, rows, first = {"AUC@30": "auc30", "AUC@5": "auc5", "AbsRel": "abs_rel"}, [], reports[0]["groups"]
    for views, keep in ((views, keep) for views, group in first.items() for keep in _ratios(group)):
        arms = [("plain", first[views], f"plain + calibrate {keep}")]
        for report, (way, arm) in itertools.product(reports, {"one ratio": "uniform", "ratios by site": "auto"}.items()):
            arms.append((f'`"{report["conditions"]["pin"]}"`, {way}', report["groups"][views], f"{arm} + calibrate {keep}"))
        common = min(group["scenes"] for _, group, _ in arms)
        for way, group, arm in arms:
            cells = []
            for measure, name in measures.items():
                if group["values"]["dense"][measure][:common] != first[views]["values"]["dense"][measure][:common]:
                    raise ValueError(f"{views} views: these results are of other scenes")
                dense, mine = (group["values"][which][measure][:common] for which in ("dense", arm))
                share = 100 * common / sum(dense) if name == "abs_rel" else 1
                cells.append(_change(name, {key: x * share for key, x in paired_bootstrap(dense, mine).to_dict().items()}))
            rows.append((views, str(common), keep, way, f"{group['rows'][arm]['density']:.2f}", *cells))
    c = reports[0]["conditions"]
    return _table(["views", "scenes", "plain `keep_ratio`", "", "density", *measures], rows) + _note(
        "Changes against dense, AUC in points, AbsRel in percent of dense, with paired 95 % intervals. All are calibrated, on "
        f'{c["calibration"]} inputs. `plain`: one ratio, `pin="reference"`, blocks by mean; the others have the pin that is named, blocks '
        f"by error, and the ratio at which they compute as much. The testbed's {generation(c)}, rendered scenes of {c['size']} × "
        f"{c['size']} pixels, {c['dtype']}, one {c['device']}, torch {c['torch']}."
    )


def _ratios(group: dict[str, Any]) -> list[str]:
    return [name.rpartition(" ")[2] for name in group["rows"] if name.startswith("plain")]


def quality(*reports: dict[str, Any]) -> str:
    """The README's table: what is lost of AUC@30 and AbsRel as applied, and with what wins it back, by keep ratio and number of views."""
    rows, longest = [], [longest_trained(report) for report in reports]
    for report, trained in zip(reports, longest, strict=True):
        named = {row["row"]["name"]: row for row in report["rows"].values()}
        ways = [named["applied"], named["calibrated"], named["chosen"], trained]
        for views in (min(trained["against_dense"], key=int), max(trained["against_dense"], key=int)):
            found = [way["against_dense"][views] for way in ways]
            points, percent = (", ".join(f"{round(x[name]['difference'], 1) + 0.0:+.1f}" for x in found) for name in ("auc30", "abs_rel"))
            dense = (f"{found[0]['auc30']['dense']:.1f}", points, f"{found[0]['abs_rel']['dense']:.3f}", percent)
            rows.append((f"{trained['keep_ratio']:g}", views, *dense))
    heads = ("`keep_ratio`", "views", "AUC@30 ↑ dense", "change, points", "AbsRel ↓ dense", "change, %")
    c, widths = reports[0]["conditions"], [_half_width(way) for report in reports for way in report["rows"].values()]
    widest = math.ceil(10 * max(widths)) / 10
    in_fp8 = [f"{row['keep_ratio']:g}" for row in longest if row["row"]["precision"] == "fp8"]
    minutes = " and ".join(dict.fromkeys(f"{minutes_of_training(row):g}" for row in longest))
    return _table(heads, rows) + _note(
        f"Changes: applied, calibrated, ratios by site and calibrated, these and distilled for {minutes} minutes"
        f"{', which at ' + ', '.join(in_fp8) + ' is in FP8' if in_fp8 else ''}."
        f" The testbed's {generation(c)}, {c['scenes']} scenes of "
        f"{c['size']} × {c['size']} pixels, {c['dtype']}, on one {c['device']}; 95 % intervals of AUC@30 are ± {widest:.1f} or less."
    )


def longest_trained(report: dict[str, Any]) -> dict[str, Any]:
    """The row of what `training/distillation.py` wrote that was trained for longest."""
    return max(report["rows"].values(), key=minutes_of_training)


def minutes_of_training(row: dict[str, Any]) -> float:
    """Of a row; 0 where nothing was trained."""
    return (row["row"]["training"] or {}).get("minutes") or 0


def _half_width(row: dict[str, Any]) -> float:
    return max((found["auc30"]["high"] - found["auc30"]["low"]) / 2 for found in row["against_dense"].values())


def _aim(report: dict[str, Any], done: Sequence[dict[str, Any]], keep_ratio: float) -> str:
    most, precision = AIMS[keep_ratio]
    inside = [
        _way_to_train(row["row"], report["conditions"])
        for row in done
        if row["row"]["precision"] == precision
        and all(
            found["abs_rel"]["difference"] <= most and min(found[name]["difference"] for name in ("auc30", "auc15")) >= -most
            for found in row["against_dense"].values()
        )
    ]
    result = f"is reached by: {', '.join(inside)}" if inside else "is not reached"
    longest = max((row["row"]["training"]["minutes"] for row in done if row["row"]["training"]), default=0)
    return (
        f"The aim, to lose no more than {most:g} point{'s' * (most != 1)} of AUC@30 and AUC@15 and {most:g} % of AbsRel"
        f"{' in FP8' * (precision == 'fp8')}, {result} with {longest:g} minutes of training."
    )


def _way_to_train(row: dict[str, Any], conditions: dict[str, Any]) -> str:
    training, usual_views = row["training"], conditions["views_a_step"]
    chosen = "ratios by site, " if row.get("chosen") else ""
    if training is None:
        return f"{chosen}calibrated" if row["calibrated"] else "applied"
    parts = [f"`{training['trainable']}`"]
    if "lora_rank" in training and "lora" in training["trainable"]:
        parts.append(f"rank {training['lora_rank']}")
    if "lora_scopes" in training and "lora" in training["trainable"]:
        parts.append(" and ".join(training["lora_scopes"]))
    parts += ["published recipe"] * (row["name"] == "published") + ["block by block"] * (training.get("mode") == "local")
    if row.get("recipe") in RECIPES:
        parts.append(RECIPES[row["recipe"]])
    if row.get("views_a_step", usual_views) != usual_views:
        parts.append(f"{row['views_a_step']} views a step")
    parts += [f"FP8{'' if row.get('rounds', True) else ' only afterwards'}"] * (row["precision"] == "fp8")
    return chosen + ("calibrated, " if row["calibrated"] else "") + "distilled: " + ", ".join(parts)


def _level(name: str, value: float) -> str:
    return f"{value:.4f}" if name == "abs_rel" else f"{value:.1f}"


def _change(name: str, found: dict[str, float]) -> str:
    unit = " %" if name == "abs_rel" else ""
    return f"{found['difference']:+.2f}{unit} [{found['low']:+.2f}, {found['high']:+.2f}]"


def _note(text: str) -> str:
    """A paragraph below a table."""
    return "\n" + textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False) + "\n"


def _best(record: dict[str, Any]) -> float:
    return min(ms for ms in (record["forward_ms"], record["graph_ms"]) if ms is not None)


def _three(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value < 1 else f"{value:#.4g}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (heads, *rows)]
    return "\n".join([lines[0], "|" + " ---: |" * len(heads), *lines[1:]]) + "\n"


TABLES: dict[str, Callable[..., str]] = {
    function.__name__: function
    for function in (
        speed,
        never_slower,
        kernels,
        times,
        times_fp8,
        memory,
        launches,
        operator,
        backward,
        mlp,
        fp8_memory,
        fp8_quality,
        density,
        distillation,
        fp8_groups,
        parallel,
        quality,
    )
}
TABLES["forms"] = quality_report.summary

if __name__ == "__main__":
    for path in documents():
        path.write_text(update(path.read_text()))
