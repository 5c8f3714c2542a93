"""`lite3r doctor`: what a model does as it comes, and which steps of Lite3R would pay here."""

from __future__ import annotations

from typing import Annotated

import typer

from .adapters import made_by
from .options import LARGEST_SEED, Config, Device, Dtype, Json, KeepRatio, Resolution, config_fields


def doctor(
    model: Annotated[
        str,
        typer.Argument(
            help="Name of a model that `lite3r adapters` lists, or a function that makes it, as MODEL.py:factory.", show_default=False
        ),
    ],
    views: Annotated[int | None, typer.Option(min=1, help="Views of the images; by default 8.", show_default=False)] = None,
    resolution: Resolution = None,
    memory: Annotated[
        str | None, typer.Option(help="Bytes that there are, such as 8GB; by default what the device has.", show_default=False)
    ] = None,
    keep_ratio: KeepRatio = None,
    config: Config = None,
    json_path: Json = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Annotated[int | None, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the images; by default 0.", show_default=False)] = None,
) -> None:
    """Run a model with random weights and say what it attends with, what runs in FP32, what is kept for nobody, where time and memory go,
    how many views fit, and which steps of Lite3R would pay. A model of your own is run on what its factory gives beside it.
    """
    import torch

    from ..adapter.plugins import find_model
    from ..adapter.weights import RANDOM
    from ..bench.models import make_images
    from ..diagnosis import doctor as examine
    from ..errors import InputError
    from ..evaluation import choose_device, choose_dtype
    from ..files import check_output, to_json, write_atomically
    from .show import say

    fields, where = config_fields(config, keep_ratio), choose_device(device)
    number = choose_dtype(dtype, where)
    if json_path is not None:
        check_output(json_path, ".json")
    if ":" in model:
        if any(given is not None for given in (views, resolution, seed)):
            raise InputError(f"{model} gives its own images: leave out --views, --resolution and --seed")
        module, inputs = made_by(model)
        if inputs is None:
            raise InputError(f"{model} returned a model alone: let it return a pair of that and its inputs")
        module = module.to(where)
    else:
        entry = find_model(model)
        images = make_images(views or 8, resolution or entry.resolution, where, seed or 0)
        module, inputs = entry.build(RANDOM, where), entry.arguments(images)
    with torch.autocast(where.type, number, enabled=number != torch.float32):
        found = examine(module, inputs, memory=memory, **fields)
    say(str(found))
    if json_path is not None:
        write_atomically(json_path, to_json(found.to_dict()))
        say(f"wrote {json_path}")
