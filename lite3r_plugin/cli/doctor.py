"""`lite3r doctor`: what a model does as it comes, and which steps of Lite3R would pay here."""

from __future__ import annotations

from typing import Annotated

import typer

from .adapters import made_by
from .options import LARGEST_SEED, Config, Device, Dtype, Json, KeepRatio, config_fields


def doctor(
    model: Annotated[
        str,
        typer.Argument(
            help="Name of a model that `lite3r adapters` lists, or a function that makes it, as MODEL.py:factory.", show_default=False
        ),
    ],
    views: Annotated[int, typer.Option(min=1, help="Views of the images.")] = 8,
    resolution: Annotated[int, typer.Option(min=1, help="Height and width of the images.")] = 518,
    memory: Annotated[
        str | None, typer.Option(help="Bytes that there are, such as 8GB; by default what the device has.", show_default=False)
    ] = None,
    keep_ratio: KeepRatio = None,
    config: Config = None,
    json_path: Json = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the images.")] = 0,
) -> None:
    """Run a model with random weights and say what it attends with, what runs in FP32, what is kept for nobody, where time and memory go,
    how many views fit, and which steps of Lite3R would pay. A model of your own is run on what its factory gives beside it.
    """
    import torch

    from ..adapter.plugins import find_model
    from ..adapter.weights import RANDOM
    from ..bench.models import make_images
    from ..diagnosis import doctor as examine
    from ..evaluation import choose_device, choose_dtype
    from ..files import check_output, to_json, write_atomically
    from .show import say

    fields, where = config_fields(config, keep_ratio), choose_device(device)
    number = choose_dtype(dtype, where)
    if json_path is not None:
        check_output(json_path, ".json")
    if ":" in model:
        module, inputs = made_by(model)
        module = module.to(where)
    else:
        entry = find_model(model)
        module, inputs = entry.build(RANDOM, where), entry.arguments(make_images(views, resolution, where, seed))
    with torch.autocast(where.type, number, enabled=number != torch.float32):
        found = examine(module, inputs, memory=memory, **fields)
    say(str(found))
    if json_path is not None:
        write_atomically(json_path, to_json(found.to_dict()))
        say(f"wrote {json_path}")
