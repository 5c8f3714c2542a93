"""`lite3r reconstruct`: photographs to a coloured point cloud."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError, plural
from .options import Config, Device, Dtype, KeepRatio, MaxBytes, MaxPixels, Model, Repeats, Weights, file_limits, lite3r_config
from .view import Host, Port, serve

if TYPE_CHECKING:
    from PIL import Image

    from ..adapter.models import ModelEntry
    from ..evaluation import Run
    from ..scene.export import Facts, Reconstruction
    from ..scene.metrics import DepthMetrics


def reconstruct(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Photographs of one scene: a folder, files, a video, a pattern such as 'photos/**/*.jpg', a text file that lists them.",
            show_default=False,
        ),
    ],
    model: Model,
    out: Annotated[
        Path,
        typer.Option(
            help="What to write, by its suffix: points (*.ply), points and cameras (*.glb), arrays (*.npz), transforms.json, a COLMAP "
            "folder (*.colmap), a page to look around in (*.html); a folder gets all of them. A picture (*.png) is written beside it."
        ),
    ] = Path("scene.ply"),
    weights: Weights = None,
    keep_ratio: KeepRatio = None,
    config: Config = None,
    dense: Annotated[bool, typer.Option("--dense", help="Run the model as it is, without Lite3R.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Run it both ways, write both clouds, and print the difference.")] = False,
    max_views: Annotated[
        int | None,
        typer.Option(min=1, help="Use at most so many photographs, evenly spread; of a video by default 32.", show_default=False),
    ] = None,
    every: Annotated[
        float | None,
        typer.Option(help="Take a frame of each so many seconds of a video, the sharpest one.", show_default=False),
    ] = None,
    max_points: Annotated[int, typer.Option(min=1, help="Write at most so many points.")] = 1_000_000,
    drop: Annotated[float, typer.Option(min=0, max=99.9, help="Leave out this percentage of the points, the least confident ones.")] = 20.0,
    view: Annotated[bool, typer.Option("--view", help="Serve a live page at the end, as `lite3r view` does.")] = False,
    host: Host = "127.0.0.1",
    port: Port = 8080,
    device: Device = "auto",
    dtype: Dtype = "auto",
    repeats: Repeats = 1,
    max_pixels: MaxPixels = None,
    max_bytes: MaxBytes = None,
    parallel: Annotated[
        str | None,
        typer.Option(
            help="`views`: spread the photographs over the processes, and GPUs, of `torchrun --nproc-per-node=N -m lite3r_plugin ...`.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Reconstruct a scene from photographs: a coloured point cloud and a picture of views and depth."""
    from ..adapter.plugins import find_model
    from ..apply.report import describe
    from ..apply.verbs import apply_lite3r
    from ..evaluation import DENSE, LITE3R, choose_device, choose_dtype, quiet, run_model
    from ..scene.export import Reconstruction, check_out, check_viewer
    from ..scene.inputs import load_inputs
    from ..scene.reading import listed
    from .show import console, err_console, facts_of_runs, labels, progress, say, table, warn, what_ran

    if dense and compare:
        raise InputError("--dense and --compare exclude each other; --compare runs the dense model too")
    if dense and (keep_ratio is not None or config):
        raise InputError("--dense runs the model without Lite3R, which --keep-ratio and --config are for; --compare runs it both ways")
    options, entry, within = lite3r_config(config, keep_ratio), find_model(model), file_limits(max_pixels, max_bytes)
    if view:
        check_viewer(host)
    check_out(out, (DENSE, LITE3R) if compare else (DENSE,) if dense else (LITE3R,))
    if parallel not in (None, "views"):
        raise InputError(f"--parallel takes views, got {parallel[:40]!r}")
    with contextlib.ExitStack() as processes:
        first, spread, over = True, contextlib.nullcontext, ""
        if parallel is None:
            where = choose_device(device)
        else:
            from ..parallel import launched, parallelize_views

            place = processes.enter_context(launched(device))
            where, first, spread, over = place.device, place.rank == 0, parallelize_views, f" in {place.size} processes"
            for one in (console, err_console):  # one speaks for all
                processes.callback(setattr, one, "quiet", one.quiet)
                one.quiet = not first
        number = choose_dtype(dtype, where)

        runs: dict[str, Run] = {}
        applied = None
        with within:
            photos = load_inputs(inputs, max_views, every, entry.min_views)
        pictures = [photo.image for photo in photos]
        say(f"{plural(len(photos), 'view')}: {listed(photo.name for photo in photos)}")
        with progress() as bar:
            task = bar.add_task(f"Building {entry.name}", total=3 + compare)
            views = entry.inputs(pictures).to(where)
            with quiet():
                net = entry.build(weights, where)
            warm_up = repeats > 1 or where.type == "cuda"
            if dense or compare:
                bar.update(task, advance=1, description=f"Running {entry.name}, dense")
                with spread(net):
                    runs[DENSE] = run_model(entry, net, views, number, repeats, warm_up)
            if not dense:
                bar.update(task, advance=1, description=f"Running {entry.name} with Lite3R")
                apply_lite3r(net, options)
                with spread(net):
                    runs[LITE3R] = run_model(entry, net, views, number, repeats, warm_up)
                applied = str(describe(net))
            bar.update(task, advance=1, description="Writing")
            notes = _describe_inputs(entry, pictures, weights)
            told = [note for note in (what_ran(runs[LITE3R].density, net, where) if applied else None,) if note]
            height, width = views.shape[-2:]
            conditions = f"{where}, {_name(number)}{over}" + (f", median of {repeats}" if repeats > 1 else "")
            title = f"{entry.name}: {plural(len(photos), 'view')} of {width} x {height} pixels, {conditions}"
            facts = facts_of_runs(title, runs, _compare(runs), [*notes, *told])
            names = tuple(photo.name for photo in photos)
            scenes = {label: Reconstruction(run.prediction, names, drop, max_points) for label, run in labels(runs).items()}
            files = _write(out, facts, runs, scenes) if first else {}

        for note in notes:
            warn(note)
        if applied:
            say(applied)
        for note in told:
            warn(note)
        console.print(table(facts))
        if compare and where.type == "cpu" and runs[LITE3R].density != 1:
            say("On a CPU the sparse path runs in plain PyTorch operators; its time says nothing about a GPU.")
        for file, what in files.items():
            say(f"wrote {file} ({what})")
        if view and first:
            serve(scenes, facts, host, port)


def _describe_inputs(entry: ModelEntry, pictures: list[Image.Image], weights: str | None) -> list[str]:
    from ..adapter.weights import RANDOM

    notes = []
    if weights == RANDOM:
        notes.append("the weights are random: time and memory are real, the geometry and its differences are meaningless")
    if len(sizes := {picture.size for picture in pictures}) > 1:
        notes.append(f"the images have {len(sizes)} different sizes; for {entry.name} they are {entry.mixed_sizes}")
    return notes


def _compare(runs: dict[str, Run]) -> dict[str, dict[str, DepthMetrics | None]]:
    from ..evaluation import DENSE, LITE3R
    from .show import depth_error

    if len(runs) < 2:
        return {}
    return {"depth against dense": {LITE3R: depth_error(runs[LITE3R].prediction.depth, runs[DENSE].prediction.depth, "none")}}


def _write(out: Path, facts: Facts, runs: Mapping[str, Run], scenes: Mapping[str, Reconstruction]) -> dict[Path, str]:
    from ..scene.export import picture_path, render, save, save_picture
    from .show import panels

    files = save(out, scenes, facts)
    picture = picture_path(out)
    save_picture(picture, panels(runs), facts.title, [(f"points, {label}", render(scene.cloud)) for label, scene in scenes.items()])
    return {**files, picture: "views, depth and points"}


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
