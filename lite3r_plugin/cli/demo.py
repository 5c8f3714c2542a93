"""`lite3r demo`: the whole path on a rendered room, without network or photographs, and a page to look around in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Config, Device, KeepRatio, Weights, lite3r_config

if TYPE_CHECKING:
    import torch

    from ..config import Lite3RConfig
    from ..evaluation import Run
    from ..scene.export import Column, Reconstruction
    from ..scene.metrics import DepthMetrics, PoseMetrics
    from ..scene.prediction import Prediction

SIZE = 224  # the resolution that the testbed was trained for
TRUTH = "truth"
# A GPU runs long enough for sparse attention to pay; a CPU runs what takes it less than a minute.
VIEWS, REPEATS = {"cuda": 64, "cpu": 6}, {"cuda": 5, "cpu": 1}
PREDICTED, TRUE = (255, 106, 0), (40, 150, 70)  # colours of cameras


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the page, the picture and the point clouds; made if needed.")] = Path("lite3r-demo"),
    views: Annotated[
        int | None, typer.Option(min=2, max=200, help="Number of views; by default 64 on a GPU and 6 on a CPU.", show_default=False)
    ] = None,
    keep_ratio: KeepRatio = None,
    config: Config = None,
    repeats: Annotated[
        int | None,
        typer.Option(min=1, help="Timed runs, of which the median is told; by default 5 on a GPU and 1 on a CPU.", show_default=False),
    ] = None,
    weights: Weights = None,
    device: Device = "auto",
) -> None:
    """Run the packaged test model on a rendered room, dense and with Lite3R, and show both beside the truth."""
    import torch

    from ..adapter.plugins import find_model
    from ..adapter.weights import RANDOM
    from ..apply.report import describe
    from ..errors import InputError
    from ..evaluation import DENSE, LITE3R, ModelPair, choose_device, merge
    from ..scene.export import Reconstruction, save_comparison, save_page, save_ply
    from ..scene.procedural import furnished_room
    from .show import console, depth_error, facts_of_runs, labels, progress, say, table, warn, what_ran

    where = choose_device(device)
    on_gpu = where.type == "cuda"
    views, repeats = views or VIEWS["cuda" if on_gpu else "cpu"], repeats or REPEATS["cuda" if on_gpu else "cpu"]
    # On a CPU, and for so few tokens, sparse attention would not switch itself on; the demo is to show it.
    defaults: dict[str, Any] = {} if on_gpu else {"dense_below": 0}
    options = lite3r_config(config, keep_ratio, **defaults)
    entry = find_model("testbed")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {out} cannot be made: {error.strerror}") from error
    with progress() as bar:
        task = bar.add_task("Rendering a room", total=3 + repeats)
        pair = ModelPair.build(entry, options, weights, where)  # first, because its weights may be missing
        room = furnished_room(views, SIZE, where)
        truth = _truth({key: value[0] for key, value in room.items()})
        samples: dict[str, list[Run]] = {DENSE: [], LITE3R: []}
        for i in range(repeats):  # in turns, so that whatever else the machine does meanwhile slows both
            bar.update(task, advance=1, description=f"Running the test model, dense and with Lite3R, {i + 1} of {repeats}")
            for method in (DENSE, LITE3R):
                samples[method].append(pair.run(method, room["rgb"][0], torch.float32, warm_up=on_gpu and i == 0))
        runs = labels({name: merge(sample) for name, sample in samples.items()})
        bar.update(task, advance=1, description="Comparing with the truth")
        errors = {
            "depth against truth": {name: depth_error(run.prediction.depth, truth.depth, "scene") for name, run in runs.items()},
        }
        notes = _notes(runs, options, on_gpu) if what_ran(list(runs.values())[-1].density, pair.model, where) is None else []
        title = f"testbed: {views} views of {SIZE} x {SIZE} pixels, {where}, float32" + (f", median of {repeats}" if repeats > 1 else "")
        facts = facts_of_runs(title, runs, errors, notes)
        names = tuple(f"view {i + 1}" for i in range(views))
        aligned = {TRUTH: truth, **{name: _aligned(run.prediction, truth) for name, run in runs.items()}}
        scenes = {name: Reconstruction(found, names, 0 if name == TRUTH else 15, 400_000) for name, found in aligned.items()}
        bar.update(task, advance=1, description="Writing")
        page, picture = out / "demo.html", out / "demo.png"
        save_page(page, scenes, facts)
        columns = _columns(scenes, runs, errors["depth against truth"])
        save_comparison(picture, f"lite3r demo: a rendered room from {views} views", truth.images, columns, notes)
        clouds = {out / f"{name.replace(' ', '_')}.ply": scene.cloud for name, scene in scenes.items()}
        for file, cloud in clouds.items():
            save_ply(cloud, file)

    if weights == RANDOM:
        warn("the weights are random: time and memory are real, the geometry and its errors are meaningless")
    say(str(describe(pair.model)))
    console.print(table(facts))
    if note := what_ran(list(runs.values())[-1].density, pair.model, where):
        warn(note)
    for note in notes:
        say(note)
    for file in (*clouds, picture):
        say(f"wrote {file}")
    say(f"look around in it: {page.absolute().as_uri()}")


def _truth(room: dict[str, torch.Tensor]) -> Prediction:
    """The room as a prediction without errors, in metres, its world that of the first camera."""
    import torch

    from ..scene.geometry import relative_to_first, unproject
    from ..scene.prediction import Prediction

    depth, pose = room["depth"], relative_to_first(room["w2c"])
    points = unproject(depth, pose, room["K"])
    return Prediction(depth, torch.ones_like(depth), points, pose, room["K"], room["rgb"].permute(0, 2, 3, 1))


def _aligned(prediction: Prediction, truth: Prediction) -> Prediction:
    """A prediction in the frame and the unit of the truth, by the similarity that brings its points closest; as it is, where none does."""
    from ..scene.metrics import fit_similarity

    predicted, true = prediction.points.flatten(0, 2), truth.points.flatten(0, 2)
    finite = (predicted.isfinite().all(-1) & (prediction.depth.flatten() > 0)).nonzero()[:, 0]
    if len(finite) < 3:
        return prediction
    some = finite[:: max(1, len(finite) // 50_000)]
    found = fit_similarity(predicted[some], true[some])
    return prediction.moved(found.scale, found.rotation, found.translation)


def _columns(scenes: dict[str, Reconstruction], runs: dict[str, Run], errors: dict[str, DepthMetrics | None]) -> list[Column]:
    from ..scene.export import Column, extent, pyramids, render, with_lines
    from ..scene.metrics import pose_metrics

    truth = scenes[TRUTH].prediction
    size = 0.05 * extent(scenes[TRUTH].cloud.points)
    true_cameras, columns = pyramids(scenes[TRUTH], size), []
    for name, scene in scenes.items():
        found = scene.prediction
        cloud = with_lines(scene.cloud, true_cameras, TRUE)
        if name == TRUTH:
            text, error = (
                ["what was rendered, in metres; its cameras are green", "below: the others in its frame, by one similarity each"],
                None,
            )
        else:
            cloud = with_lines(cloud, pyramids(scene, size), PREDICTED)
            text = _numbers(runs[name], errors[name], pose_metrics(found.world_to_camera, truth.world_to_camera))
            told = errors[name]  # of which the map shows the parts
            depth = found.depth if told is None else runs[name].prediction.depth * told.scales[0]
            error = (depth - truth.depth).abs() / truth.depth
        columns.append(Column(name, text, found.depth, error, render(cloud, (500, 760), 24, 14, zoom=1.2, dot=3, like=scenes[TRUTH].cloud)))
    return columns


def _numbers(run: Run, depth: DepthMetrics | None, pose: PoseMetrics) -> list[str]:
    scores = "all scores" if run.density is None else f"{run.density:.0%} of the scores"
    memory = "" if run.peak_bytes is None else f", peak {run.peak_bytes / 2**30:.2f} GiB"
    quality = "" if depth is None else f"depth {depth.abs_rel:.1%} off, "
    return [f"{quality}cameras {pose.rotation_median:.1f}° (drawn orange)", f"{scores}, {run.seconds:.2f} s{memory}"]


def _notes(runs: dict[str, Run], config: Lite3RConfig, on_gpu: bool) -> list[str]:
    """What was saved, and what the numbers say and do not say."""
    dense, sparse = runs.values()
    density = sparse.density or 1.0
    notes = [f"Lite3R computed {density:.0%} of the attention scores between views.{_with_more_views(config)}"]
    if on_gpu:
        notes.append(f"Here that took {dense.seconds / sparse.seconds:.2f} times less time. `lite3r bench` measures larger models.")
    else:
        notes.append(
            "Sparse attention is forced here (dense_below=0): without a GPU it runs in plain PyTorch operators and saves scores, no time. "
            "`lite3r bench` measures seconds on a GPU."
        )
    notes.append("Same weights, no calibration: what differs is what sparse attention alone costs this small test model.")
    return notes


def _with_more_views(config: Lite3RConfig, views: int = 100) -> str:
    """What becomes of the share of the scores at a length at which it pays."""
    from ..adapter.layouts import TokenLayout, Views
    from ..costs.model import SparseShares
    from ..tokens.layout import pinned_tokens

    pinned = pinned_tokens(TokenLayout((Views((1, 1), views),)), config.pin)  # of views of one size, that of a patch: shares are the same
    if not pinned.keys:
        return ""
    said = " The reference view is always kept, so the share falls with more views"
    if not isinstance(config.keep_ratio, float):
        return f"{said}."
    return f"{said}: to {SparseShares.of(config, '*').of_scores(views, *pinned):.0%} with {views}."
