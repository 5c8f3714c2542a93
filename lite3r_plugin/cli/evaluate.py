"""`lite3r eval`: what Lite3R costs a model in quality, on posed data, dense and accelerated side by side."""

from __future__ import annotations

import contextlib
import enum
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..adapter.models import ModelEntry
    from ..scene.data import Scene, Views
    from ..scene.metrics import Geometry
    from ..scene.prediction import Prediction

DENSE, LITE3R = "dense", "lite3r"


class Rule(str, enum.Enum):
    """As in `lite3r_plugin.scene.data.pick_views`."""

    spread = "spread"
    consecutive = "consecutive"
    covisible = "covisible"


class Split(str, enum.Enum):
    """As in `lite3r_plugin.scene.data.open_scenes`."""

    train = "train"
    test = "test"


def evaluate(
    model: Annotated[str, typer.Option(help="Name of the model; `lite3r adapters` lists them.", show_default=False)],
    data: Annotated[
        str, typer.Option(help="LAYOUT:PATH, for example blendedmvs:~/BlendedMVS, 7scenes:~/7scenes or procedural:scenes=8.")
    ] = "procedural:scenes=8",
    split: Annotated[Split | None, typer.Option(help="A part of the data set, where a split is published.", show_default=False)] = None,
    views: Annotated[int, typer.Option(min=2, help="Views of each scene.")] = 8,
    rule: Annotated[Rule, typer.Option(help="How views are picked.")] = Rule.spread,
    scenes: Annotated[int | None, typer.Option(min=1, help="At most so many scenes.", show_default=False)] = None,
    draws: Annotated[int, typer.Option(min=1, help="Sets of views from each scene.")] = 1,
    weights: Annotated[str | None, typer.Option(help="A file or a Hub id. By default the published weights.", show_default=False)] = None,
    config: Annotated[
        list[str] | None,
        typer.Option(help="A field of Lite3RConfig as name=value, such as keep_ratio=0.25; may be repeated.", show_default=False),
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all numbers here.", show_default=False)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the computation: auto (bfloat16 on a GPU), float32, bfloat16, float16.")] = "auto",
    max_points: Annotated[int, typer.Option(min=1, help="Points of each cloud that are compared.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Of the choice of views.")] = 0,
) -> None:
    """Measure depth, pose and points against the truth, dense and with Lite3R, with 95 % intervals of the difference."""
    from ..adapter.weights import RANDOM
    from ..apply.report import describe
    from ..apply.verbs import apply_lite3r, lite3r_disabled
    from ..config import Lite3RConfig
    from ..evaluation import run as _run
    from ..files import check_output, write_atomically
    from ..scene.data import open_scenes, pick_views
    from ..scene.metrics import Comparison, fidelity
    from .options import parse_fields
    from .reconstruct import find_entry
    from .show import console, progress, say, warn

    options = Lite3RConfig().replace(**parse_fields(config or [], "--config"))
    entry, where = find_entry(model), _run.choose_device(device)
    number = _run.choose_dtype(dtype, where)
    if json_path is not None:
        check_output(json_path, ".json")
    found = open_scenes(data, split.value if split else None)
    found = found[:scenes] if scenes is not None else found

    comparison, teacher, densities = Comparison(max_points=max_points), [], []
    with progress() as bar:
        task = bar.add_task(f"Building {entry.name}", total=1 + len(found) * draws)
        with _run.quiet():
            net = apply_lite3r(entry.build(weights, where), options)
            # Of a model in FP8 nothing dense is left to switch back to.
            original = entry.build(weights, where) if options.precision == "fp8" else None
        for scene in found:
            for draw in range(draws):
                bar.update(task, advance=1, description=f"{scene.name}, dense and with Lite3R")
                sample = sample_views(entry, scene, pick_views(scene, views, rule.value, seed + 1_000_003 * draw))
                images = model_inputs(entry, sample).to(where)
                with lite3r_disabled(net) if original is None else contextlib.nullcontext():
                    dense = _run.run_model(entry, original or net, images, number).prediction
                run = _run.run_model(entry, net, images, number)
                densities.append(1.0 if run.density is None else run.density)
                comparison.add(reference_of(sample), {DENSE: geometry(dense), LITE3R: geometry(run.prediction)})
                teacher.append(fidelity(geometry(run.prediction), geometry(dense)))
        bar.update(task, advance=1)

    if weights == RANDOM:
        warn("the weights are random: every measure is meaningless")
    say(str(describe(net)))
    console.print(comparison.table(DENSE, LITE3R))
    density = sum(densities) / len(densities)
    say(f"{entry.name} on {data}: {len(densities)} sets of {views} views, {rule.value}; density {density:.3f}; {where}, {number}")
    if density == 1:
        warn("every site ran dense: with so few tokens sparse attention does not pay; --config dense_below=0 switches it on anyway")
    if json_path is not None:
        record = _record(entry, options.to_dict(), comparison, teacher, density, number, where)
        record |= {
            "data": data,
            "split": split,
            "views": views,
            "rule": rule,
            "draws": draws,
            "max_points": max_points,
            "seed": seed,
            "weights": weights,
        }
        write_atomically(json_path, json.dumps(record, indent=1) + "\n")
        say(f"wrote {json_path}")


def sample_views(entry: ModelEntry, scene: Scene, indices: list[int]) -> Views:
    """The views at the size that the model makes of the first image, cut and resized with exact cameras and depth."""
    from ..scene.data.files import read_image

    first = scene.frames[indices[0]].image
    image = read_image(first, posed=False) if isinstance(first, Path) else first
    height, width = entry.preprocess(_pictures(image[None])).shape[-2:]
    sample = scene.sample(indices, (height, width))
    if sample.world_to_camera is None or sample.intrinsics is None:
        raise InputError(f"{scene.origin} has no cameras; quality can only be measured against a reference")
    return sample.relative()


def model_inputs(entry: ModelEntry, sample: Views) -> Tensor:
    inputs = entry.preprocess(_pictures(sample.images))
    if inputs.shape[-2:] != sample.images.shape[-2:]:
        raise InputError(
            f"the model {entry.name!r} changes the size of its own input from {list(sample.images.shape[-2:])} to "
            f"{list(inputs.shape[-2:])}, so the reference cannot follow; its preprocess must keep sizes that it produced"
        )
    return inputs


def _pictures(images: Tensor) -> list[Any]:
    """``[S, 3, H, W]`` in [0, 1] to PIL images, as files would give them."""
    from PIL import Image

    return [Image.fromarray((x.permute(1, 2, 0) * 255).round().byte().numpy()) for x in images]


def reference_of(sample: Views) -> Geometry:
    from ..scene.metrics import Geometry

    assert sample.world_to_camera is not None  # `_sample` refuses views without cameras
    assert sample.intrinsics is not None
    return Geometry(sample.depth, sample.world_to_camera, sample.intrinsics, sample.valid)


def geometry(prediction: Prediction) -> Geometry:
    from ..scene.metrics import Geometry

    return Geometry(prediction.depth, prediction.world_to_camera, prediction.intrinsics)


def _record(
    entry: ModelEntry, config: dict[str, Any], comparison: Any, teacher: list[Any], density: float, dtype: torch.dtype, where: torch.device
) -> dict[str, Any]:
    import torch

    from ..version import __version__

    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu"
    return {
        "model": entry.name, "config": config, "density": density, "dtype": str(dtype).removeprefix("torch."), "device": name,
        "torch": torch.__version__, "lite3r_plugin": __version__,
        "means": {method: {row: comparison.mean(method, row) for row in comparison.rows()} for method in comparison.scores},
        "scenes": comparison.to_dict(), "fidelity": [score.to_dict() for score in teacher],
    }  # fmt: skip
