"""`lite3r demo`: the whole path on a rendered scene, without network, GPU or photographs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import LARGEST_SEED, Config, Device, KeepRatio, Repeats, Weights, lite3r_config

if TYPE_CHECKING:
    from torch import Tensor

    from ..evaluation import Run

SIZE = 224  # the resolution that the testbed was trained for
TEXTURES, TEXTURE_SIZE = 64, 128
FIRST_SEED = 1_000_000  # far from the seeds of the scenes and textures that the testbed was trained on


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the point clouds and the picture; made if needed.")] = Path("lite3r-demo"),
    views: Annotated[int, typer.Option(min=1, max=64, help="Number of views.")] = 8,
    keep_ratio: KeepRatio = None,
    config: Config = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Which scene.")] = 0,
    repeats: Repeats = 3,
    weights: Weights = None,
    device: Device = "auto",
) -> None:
    """Run the packaged test model on a rendered scene, dense and with Lite3R, and compare both with the truth."""
    import torch

    from ..adapter.plugins import find_model
    from ..adapter.weights import RANDOM
    from ..apply.report import describe
    from ..errors import InputError
    from ..evaluation import DENSE, LITE3R, ModelPair, choose_device, merge
    from ..scene.export import Panel, point_cloud, render, save_picture, save_ply
    from .show import console, depth_error, facts_of_runs, labels, panels, progress, say, table, warn, what_ran

    # Sparse attention would not switch itself on for so few tokens; the demo wants to show it.
    options = lite3r_config(config, keep_ratio, dense_below=0)
    entry, where = find_model("testbed"), choose_device(device)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {out} cannot be made: {error.strerror}") from error
    with progress() as bar:
        task = bar.add_task("Rendering a scene", total=2 + repeats)
        pair = ModelPair.build(entry, options, weights, where)  # first, because its weights may be missing
        images, truth = _scene(views, seed)
        images = images.to(where)
        samples: dict[str, list[Run]] = {DENSE: [], LITE3R: []}
        for i in range(repeats):  # in turns, so that whatever else the machine does meanwhile slows both
            bar.update(task, advance=1, description=f"Running the test model, dense and with Lite3R, {i + 1} of {repeats}")
            for method in (DENSE, LITE3R):
                samples[method].append(pair.run(method, images, torch.float32, warm_up=where.type == "cuda" and i == 0))
        runs = {name: merge(sample) for name, sample in samples.items()}
        applied = str(describe(pair.model))
        bar.update(task, advance=1, description="Writing")
        clouds = {name: point_cloud(run.prediction, max_points=400_000) for name, run in runs.items()}
        files = {name: out / f"{name}.ply" for name in runs}
        for name, cloud in clouds.items():
            save_ply(cloud, files[name])
        rows = panels(runs)
        scale = (truth / runs[DENSE].prediction.depth)[truth > 0].median()
        rows.insert(1, Panel("depth, truth", torch.where(truth > 0, truth / scale, torch.nan), "depth"))
        picture = out / "demo.png"
        looks = [(f"points, {label}", render(cloud)) for label, cloud in zip(labels(runs), clouds.values(), strict=True)]
        save_picture(picture, rows, f"lite3r demo: {views} views of a rendered scene", looks)

    errors = {
        "depth against truth": {name: depth_error(run.prediction.depth, truth, "scene") for name, run in runs.items()},
        "depth against dense": {LITE3R: depth_error(runs[LITE3R].prediction.depth, runs[DENSE].prediction.depth, "none")},
    }
    if weights == RANDOM:
        warn("the weights are random: time and memory are real, the geometry and its errors are meaningless")
    say(applied)
    title = f"testbed: {views} views of {SIZE} x {SIZE} pixels, {where}, float32, median of {repeats}"
    console.print(table(facts_of_runs(title, runs, errors)))
    if note := what_ran(runs[LITE3R].density, pair.model, where):
        warn(note)
    else:
        say(_honest(where.type))
    for file in (*files.values(), picture):
        say(f"wrote {file}")


def _scene(views: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images ``[S, 3, H, W]`` and true depth ``[S, H, W]`` in metres, 0 where unknown, of a scene the model never saw."""
    from ..scene.procedural import ProcScenes, TextureBank

    bank = TextureBank.procedural(TEXTURES, TEXTURE_SIZE, "cpu", seed=FIRST_SEED + seed)
    sample = ProcScenes(bank, "cpu", seed=FIRST_SEED + seed, augment=False, arcs=(0.8,))(B=1, V=views, H=SIZE, W=SIZE)
    return sample["rgb"][0], sample["depth"][0] * sample["valid"][0]


def _honest(device: str) -> str:
    quality = (
        "Both models have the same weights and Lite3R was not calibrated, so the difference is what sparse attention alone costs this "
        "test model. The errors against the truth are those of a small model."
    )
    if device == "cuda":
        return f"{quality} So few tokens are below the length at which sparse attention pays; run `lite3r bench` for speed."
    return (
        f"{quality} Times on a CPU say nothing about a GPU: the sparse path runs here in plain PyTorch operators, and is switched on "
        "although it does not pay (dense_below=0). Run `lite3r bench` on a GPU for speed."
    )
