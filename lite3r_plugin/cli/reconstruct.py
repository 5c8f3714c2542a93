"""`lite3r reconstruct`: photographs to a coloured point cloud."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..config import DEFAULT_KEEP_RATIO, Lite3RConfig
from ..errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from ..adapter.models import ModelEntry
    from ..evaluation.run import Run
    from ..scene.export import Panel
    from ..scene.prediction import DepthError

DENSE, LITE3R = "dense", "Lite3R"


def reconstruct(
    images_dir: Annotated[Path, typer.Argument(help="Folder with photographs of one static scene.", show_default=False)],
    model: Annotated[str, typer.Option(help="Name of the model; `lite3r adapters` lists them.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The point cloud to write, *.ply. A picture is written next to it, as *.png.")] = Path(
        "scene.ply"
    ),
    weights: Annotated[
        str | None, typer.Option(help="A file or a Hub id; `random` for timing only. By default the published weights.", show_default=False)
    ] = None,
    keep_ratio: Annotated[float, typer.Option(help="Share of the key blocks that attention keeps, in (0, 1].")] = DEFAULT_KEEP_RATIO,
    dense_below: Annotated[
        int | None,
        typer.Option(help="Sites with fewer tokens stay dense; 0: none does. By default what pays on the device.", show_default=False),
    ] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Run the model as it is, without Lite3R.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Run it both ways, write both clouds, and print the difference.")] = False,
    max_views: Annotated[
        int | None, typer.Option(min=1, help="Use at most so many photographs, evenly spread.", show_default=False)
    ] = None,
    max_points: Annotated[int, typer.Option(min=1, help="Write at most so many points.")] = 1_000_000,
    drop: Annotated[float, typer.Option(min=0, max=99.9, help="Leave out this percentage of the points, the least confident ones.")] = 20.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the computation: auto (bfloat16 on a GPU), float32, bfloat16, float16.")] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs; the median is printed.")] = 1,
) -> None:
    """Reconstruct a scene from photographs: a coloured point cloud and a picture of views and depth."""
    from ..apply.report import describe
    from ..apply.verbs import apply_lite3r
    from ..evaluation import run as _run
    from ..scene.export import check_output
    from ..scene.images import choose_views, find_images, load_images
    from .show import console, progress, say, table_of_runs, warn, what_ran

    if dense and compare:
        raise InputError("--dense and --compare exclude each other; --compare runs the dense model too")
    config = Lite3RConfig(keep_ratio=keep_ratio, dense_below=dense_below)
    entry = find_entry(model)
    for path in _outputs(out, compare):
        check_output(path, path.suffix if path != out else ".ply")
    paths = choose_views(find_images(images_dir), max_views)
    if len(paths) < entry.min_views:
        raise InputError(f"the model {entry.name!r} needs at least {entry.min_views} images, {images_dir} gives {len(paths)}")
    where = _run.choose_device(device)
    number = _run.choose_dtype(dtype, where)

    runs: dict[str, Run] = {}
    applied = None
    with progress() as bar:
        task = bar.add_task("Loading images", total=4 + compare)
        pictures = load_images(paths)
        views = entry.preprocess(pictures).to(where)
        bar.update(task, advance=1, description=f"Building {entry.name}")
        with _run.quiet():
            net = entry.build(weights, where)
        options = {"runs": repeats, "warm_up": repeats > 1 or where.type == "cuda"}
        if dense or compare:
            bar.update(task, advance=1, description=f"Running {entry.name}, dense")
            runs[DENSE] = _run.run_model(entry, net, views, number, **options)
        if not dense:
            bar.update(task, advance=1, description=f"Running {entry.name} with Lite3R")
            apply_lite3r(net, config)
            runs[LITE3R] = _run.run_model(entry, net, views, number, **options)
            applied = str(describe(net))
        bar.update(task, advance=1, description="Writing")
        notes, errors = _describe_inputs(entry, pictures, weights), _compare(runs)
        files = _write(out, f"{entry.name}, {len(paths)} views from {images_dir.name or images_dir}", runs, max_points, drop)

    for note in notes:
        warn(note)
    if applied:
        say(applied)
        if note := what_ran(runs[LITE3R]):
            say(note)
    height, width = views.shape[-2:]
    count = f", median of {repeats}" if repeats > 1 else ""
    console.print(
        table_of_runs(f"{entry.name}: {len(paths)} views of {width} x {height} pixels, {where}, {_name(number)}{count}", runs, errors)
    )
    if compare and where.type == "cpu":
        say("On a CPU the sparse path runs in plain PyTorch operators; its time says nothing about a GPU.")
    for file, what in files.items():
        say(f"wrote {file} ({what})")


def find_entry(name: str) -> ModelEntry:
    """The model called `name`. Raises `InputError`, which lists the known ones."""
    from ..adapter.plugins import model_entries

    entries = model_entries()
    if name not in entries:
        raise InputError(
            f"no installed adapter can build {name!r}; choose one of {', '.join(sorted(entries)) or 'none'} (see `lite3r adapters`)"
        )
    return entries[name]


def panels(runs: dict[str, Run]) -> list[Panel]:
    """Rows of the picture: the views, each run's depth, and how the runs differ."""
    from ..scene.export import Panel

    first = next(iter(runs.values())).prediction
    rows = [Panel("views", first.images, "image")]
    rows += [Panel(f"depth, {name}", run.prediction.depth, "depth") for name, run in runs.items()]
    if len(runs) == 2:
        before, after = (run.prediction.depth for run in runs.values())
        rows.append(Panel(f"difference of {' and '.join(runs)}", (after - before).abs() / before, "error"))
    return rows


def _outputs(out: Path, compare: bool) -> list[Path]:
    return [out, out.with_suffix(".png"), *([out.with_suffix(".dense.ply")] if compare else [])]


def _describe_inputs(entry: ModelEntry, pictures: list[Image.Image], weights: str | None) -> list[str]:
    from ..adapter.weights import RANDOM

    notes = []
    if weights == RANDOM:
        notes.append("the weights are random: time and memory are real, the geometry and its differences are meaningless")
    if len(sizes := {picture.size for picture in pictures}) > 1:
        notes.append(f"the images have {len(sizes)} different sizes; for {entry.name} they are {entry.mixed_sizes}")
    return notes


def _compare(runs: dict[str, Run]) -> dict[str, dict[str, DepthError]]:
    from ..scene.prediction import depth_error

    if len(runs) < 2:
        return {}
    return {"depth against dense": {LITE3R: depth_error(runs[LITE3R].prediction.depth, runs[DENSE].prediction.depth)}}


def _write(out: Path, title: str, runs: dict[str, Run], max_points: int, drop: float) -> dict[Path, str]:
    from ..scene.export import point_cloud, render, save_picture, save_ply

    files: dict[Path, str] = {}
    looks = []
    for name, run in runs.items():
        cloud = point_cloud(run.prediction, drop, max_points)
        path = out.with_suffix(".dense.ply") if name == DENSE and len(runs) > 1 else out
        save_ply(cloud, path)
        files[path] = f"{len(cloud.points):,} points, {name}"
        looks.append((f"points, {name}", render(cloud)))
    save_picture(out.with_suffix(".png"), panels(runs), title, looks)
    files[out.with_suffix(".png")] = "views, depth and points"
    return files


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
