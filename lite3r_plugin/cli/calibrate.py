"""`lite3r calibrate`: win quality back with a few photographs, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError, plural
from .options import Config, Device, Dtype, KeepRatio, MaxBytes, MaxPixels, Model, Weights, file_limits, lite3r_config

RATIOS_NAME = "keep_ratios.json"


def calibrate(
    images_dir: Annotated[Path, typer.Argument(help="Folder with photographs like those of later use; no labels.", show_default=False)],
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write the checkpoint to; load_lite3r reads it.", show_default=False)],
    views: Annotated[int, typer.Option(min=1, help="Photographs of each input; they are taken in the order of their names.")] = 4,
    most: Annotated[int, typer.Option("--max-inputs", min=2, help="Use at most so many inputs, evenly spread.")] = 32,
    weights: Weights = None,
    keep_ratio: KeepRatio = None,
    max_rel_error: Annotated[
        float | None,
        typer.Option(help="With --keep-ratio auto: the most that outputs may differ from dense; 0.02 by default.", show_default=False),
    ] = None,
    max_pose_loss: Annotated[
        float | None,
        typer.Option(
            help="With --keep-ratio auto: the most that AUC@30 may be below 100, dense cameras being the truth.", show_default=False
        ),
    ] = None,
    mean_keep_ratio: Annotated[
        float | None,
        typer.Option(help="With --keep-ratio auto: compute as much as with this ratio everywhere, at most.", show_default=False),
    ] = None,
    config: Config = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_pixels: MaxPixels = None,
    max_bytes: MaxBytes = None,
) -> None:
    """Fit the linear branches to photographs, judged by depth and cameras on photographs that a fit has not seen; save them.

    With --keep-ratio auto, a ratio for each site is chosen first, from the same photographs; it is in the checkpoint, and in
    keep_ratios.json for other commands and apply_lite3r.
    """
    import contextlib
    import tempfile

    import torch

    from ..adapter.plugins import find_model
    from ..adapter.weights import RANDOM
    from ..apply.checkpoint import save_lite3r
    from ..apply.profile import KeepRatioProfile
    from ..apply.verbs import apply_lite3r
    from ..evaluation import choose_device, choose_dtype, quiet
    from ..evaluation.predicting import Predicting, as_outputs
    from ..scene.images import find_images, load_images, spread
    from ..training.calibrate import calibrate as fit
    from ..training.ratios import check_budget, choose_keep_ratios
    from .show import progress, say, warn

    options = lite3r_config(config, keep_ratio, chooses=True)
    budgets: dict[str, Any] = dict(max_rel_error=max_rel_error, max_pose_loss=max_pose_loss, mean_keep_ratio=mean_keep_ratio)
    if options.waits:
        check_budget(**budgets)
    elif given := [f"--{name.replace('_', '-')}" for name, value in budgets.items() if value is not None]:
        raise InputError(f"{given[0]} says how ratios are chosen: add --keep-ratio auto")
    entry, within = find_model(model), file_limits(max_pixels, max_bytes)
    paths = find_images(images_dir)
    inputs = spread(_split(paths, max(views, entry.min_views), images_dir), most)
    where = choose_device(device)
    number = choose_dtype(dtype, where)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(f"the folder {out} cannot be made, or nothing written to it: {error.strerror}") from error
    with progress() as bar:
        task = bar.add_task("Loading images", total=1)
        with within:
            pictures = load_images([path for chosen in inputs for path in chosen])
        pixels = entry.inputs(pictures)
        bar.update(task, description=f"Building {entry.name}")
        with quiet():
            net = entry.build(weights, where)
        apply_lite3r(net, options)
        autocast = torch.autocast(where.type, number) if number != torch.float32 else contextlib.nullcontext()
        given, predicting = [x.to(where) for x in pixels.split(len(inputs[0]))], Predicting(entry, net)

        def told(what: str, done: int, total: int | None) -> None:
            bar.stage(task, what.capitalize(), done, total)

        with quiet(), autocast:
            profile = choose_keep_ratios(predicting, given, **budgets, outputs=as_outputs, progress=told) if options.waits else None
            result = fit(predicting, given, outputs=as_outputs, progress=told)
        save_lite3r(net, out)
        if isinstance(ratios := profile or options.keep_ratio, KeepRatioProfile):
            ratios.save(out / RATIOS_NAME)
        else:
            (out / RATIOS_NAME).unlink(missing_ok=True)  # of an earlier run: they are not those of this checkpoint
    if weights == RANDOM:
        warn("the weights are random: what was fitted means nothing")
    if left := len(paths) - sum(map(len, inputs)):
        say(f"{left} of {len(paths)} photographs not used: inputs have {len(inputs[0])} each")
    if profile is not None:
        say(str(profile))
    say(str(result))
    say(f"wrote {out} (load_lite3r(model, {str(out)!r}))")


def _split(paths: Sequence[Path], views: int, folder: Path) -> list[list[Path]]:
    """Inputs of `views` photographs that follow each other."""
    inputs = [list(paths[i : i + views]) for i in range(0, len(paths) - views + 1, views)]
    if len(inputs) < 2:
        raise InputError(
            f"calibration needs two inputs at least, one to fit and one to judge by: {folder} gives {plural(len(paths), 'photograph')}, "
            f"which is not twice {views}; add some, or take fewer with --views"
        )
    return inputs
