"""`lite3r convert-official`: what Lite3R's authors published, as a checkpoint of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Config, KeepRatio, Model, config_fields


def convert_official(
    file: Annotated[Path, typer.Argument(help="A checkpoint of the authors, such as vggt_fp8_qat_1ep.pt.", show_default=False)],
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder to write.", show_default=False)],
    base: Annotated[
        str | None,
        typer.Option(
            help="The dense model's weights, a file or a Hub id: the file's must be equal, and only what Lite3R adds is written.",
            show_default=False,
        ),
    ] = None,
    keep_ratio: KeepRatio = None,
    config: Config = None,
) -> None:
    """Convert a checkpoint that Lite3R's authors published into a folder that load_lite3r takes."""
    from ..evaluation import quiet
    from ..hub import convert_official as convert
    from .show import progress, say

    fields = config_fields(config, keep_ratio)
    with progress() as bar:
        bar.add_task(f"Converting {file.name}", total=1)
        with quiet():
            done = convert(file, model, out, base=base, **fields)
    say(str(done))
