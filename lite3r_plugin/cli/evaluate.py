"""`lite3r eval`: what Lite3R costs a model in quality, on posed data, dense and accelerated side by side."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from .options import LARGEST_SEED, Config, Device, Dtype, Json, KeepRatio, MaxBytes, MaxPixels, Model, Weights, file_limits, lite3r_config
from .reports import Html, Plots, check_reports, eval_report, write_reports


class Rule(str, enum.Enum):
    """As in `lite3r_plugin.scene.data.pick_views`."""

    spread = "spread"
    consecutive = "consecutive"
    covisible = "covisible"


class ProtocolName(str, enum.Enum):
    """As in `lite3r_plugin.evaluation.compare`."""

    da3bench = "da3bench"
    lite3r = "lite3r"


class Split(str, enum.Enum):
    """As in `lite3r_plugin.scene.data.open_scenes`."""

    train = "train"
    test = "test"


def evaluate(
    context: typer.Context,
    model: Model,
    data: Annotated[
        str, typer.Option(help="LAYOUT:PATH, for example blendedmvs:~/BlendedMVS, 7scenes:~/7scenes or procedural:scenes=8.")
    ] = "procedural:scenes=8",
    split: Annotated[Split | None, typer.Option(help="A part of the data set, where a split is published.", show_default=False)] = None,
    protocol: Annotated[
        ProtocolName | None,
        typer.Option(
            help="da3bench: poses of all views of a scene, as the Depth Anything 3 benchmark; lite3r: one random pair a scene, as the "
            "Lite3R paper. It sets --views, --rule and --draws, da3bench also --seed and --max-points.",
            show_default=False,
        ),
    ] = None,
    views: Annotated[int | None, typer.Option(min=2, help="Views of each scene; by default 8.", show_default=False)] = None,
    rule: Annotated[Rule | None, typer.Option(help="How views are picked; by default spread.", show_default=False)] = None,
    scenes: Annotated[int | None, typer.Option(min=1, help="At most so many scenes.", show_default=False)] = None,
    draws: Annotated[int | None, typer.Option(min=1, help="Sets of views from each scene; by default 1.", show_default=False)] = None,
    weights: Weights = None,
    keep_ratio: KeepRatio = None,
    config: Config = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="A folder that save_lite3r wrote, or a Hub id: what is measured instead of --config.", show_default=False),
    ] = None,
    json_path: Json = None,
    html: Html = None,
    plots: Plots = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(help="What --json of an earlier run wrote, to be drawn beside this one; may be repeated.", show_default=False),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_points: Annotated[
        int | None, typer.Option(min=1, help="Points of each cloud that are compared; by default 20000.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=LARGEST_SEED, help="Of the choice of views; by default 0.", show_default=False)
    ] = None,
    max_pixels: MaxPixels = None,
    max_bytes: MaxBytes = None,
) -> None:
    """Measure depth, pose and points against the truth, dense and with Lite3R, with 95 % intervals of the difference."""
    from ..adapter.plugins import find_model
    from ..adapter.weights import RANDOM
    from ..apply.report import describe
    from ..apply.seal import fingerprint
    from ..apply.source import find_checkpoint
    from ..errors import InputError, plural
    from ..evaluation import ModelPair, choose_device, choose_dtype, compare, find_protocol
    from ..evaluation.plots import read_evaluation
    from ..files import check_output, to_json, write_atomically
    from ..scene.data import open_scenes
    from .show import console, progress, say, warn, what_ran

    options, entry, within = lite3r_config(config, keep_ratio), find_model(model), file_limits(max_pixels, max_bytes)
    if checkpoint is not None and (config or keep_ratio is not None):
        raise InputError("a checkpoint has its configuration: leave out --config and --keep-ratio")
    wanted = {"views": views, "rule": rule and rule.value, "draws": draws, "seed": seed, "max_points": max_points}
    judged = None if protocol is None else find_protocol(protocol.value)
    if judged is not None:
        judged.refuse(**wanted)
    where = choose_device(device)
    number = choose_dtype(dtype, where)
    if json_path is not None:
        check_output(json_path, ".json")
    check_reports(html, plots)
    if beside and html is None and plots is None:
        raise InputError("--beside is drawn in --html and --plots; name one of them")
    others = [read_evaluation(path) for path in beside or ()]

    with within, progress() as bar:
        found = open_scenes(data, split.value if split else None)
        found = found[:scenes] if scenes is not None else found
        task = bar.add_task(f"Building {entry.name}", total=len(found))
        folder = None if checkpoint is None else find_checkpoint(checkpoint)
        pair = ModelPair.build(entry, options, weights, where) if folder is None else ModelPair.load(entry, folder, weights, where)
        result = compare(
            pair, found, **wanted, protocol=judged and judged.name, dtype=number,
            progress=lambda done, total, what: bar.stage(task, f"{what}, dense and with Lite3R", done, total),
        )  # fmt: skip

    if weights == RANDOM:
        warn("the weights are random: every measure is meaningless")
    say(str(describe(pair.model)))
    console.print(result.table())
    of = result.conditions
    sets = f"{plural(len(result.densities), 'set')} of {of['views']}{'' if judged else ' views'}, {of['rule']}"
    say(f"{entry.name} on {data}: {sets}; density {result.density:.3f}; {where}, {number}")
    notes = [note] if (note := what_ran(result.density, pair.model, where)) else []
    if result.conditions.get("same_dense_kernel") is False:
        notes.append(result.dense_kernels())
    for note in notes:
        warn(note)
    record = result.to_dict() | {"data": data, "split": split and split.value, "weights": weights}
    record |= {} if folder is None else {"checkpoint": fingerprint(folder)}
    if json_path is not None:
        write_atomically(json_path, to_json(record))
        say(f"wrote {json_path}")
    if html is not None or plots is not None:
        write_reports(html, plots, eval_report(context, result, record, others, notes))
