"""The command `lite3r bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_VARIANTS = "stock,strong,strong-fp8,lite3r,lite3r-strong,lite3r-fp8"
TABLE_WIDTH = 150


def bench(
    model: Annotated[str, typer.Argument(help="Name of the model; `lite3r adapters` lists them.")],
    views: Annotated[str, typer.Option(help="Numbers of views, separated by commas.")] = "2,4,8,16,32",
    keep_ratio: Annotated[float | None, typer.Option(help="Share of the key blocks to keep.")] = None,
    resolution: Annotated[int, typer.Option(help="Height and width of the images.")] = 518,
    variants: Annotated[str, typer.Option(help=f"Some of {DEFAULT_VARIANTS}, in the order in which they are to run.")] = DEFAULT_VARIANTS,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Another field of Lite3RConfig as name=value, the value in JSON.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the report here, after every cell.")] = None,
    device: Annotated[str | None, typer.Option(help="Device, by default the GPU if there is one.")] = None,
    compile_: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the blocks of strong variants.")] = True,
    graphs: Annotated[bool, typer.Option(help="Capture strong variants into CUDA graphs.")] = True,
    runs: Annotated[int, typer.Option(min=1, help="Timed runs of a cell; 3 where one takes longer than 2 s.")] = 5,
    time_budget: Annotated[float | None, typer.Option(help="Seconds after which no further cell is started.")] = None,
    commit: Annotated[str | None, typer.Option(help="The commit under test, where the package is not in its repository.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and images.")] = 0,
) -> None:
    """Measure a model as it is, as strong as a dense model gets, and with Lite3R, in one process on the same images."""
    import torch
    from rich.console import Console

    from ..bench.models import find_model
    from ..bench.runner import Bench
    from ..bench.table import table
    from .options import parse_fields

    options = parse_fields(set_ or [], "--set")
    if keep_ratio is not None:
        options["keep_ratio"] = keep_ratio
    run = Bench(
        model=find_model(model), views=_numbers(views), variants=[name.strip() for name in variants.split(",")], resolution=resolution,
        options=options, device=torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")), compile=compile_, graphs=graphs,
        min_runs=runs, time_budget=time_budget, path=json_path, commit=commit, seed=seed, log=lambda line: print(line, flush=True),
    )  # fmt: skip
    report = run.run()
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    console.print(table(report))
    for key, value in report.conditions.items():
        console.print(f"  {key}: {value}", markup=False, highlight=False)


def _numbers(text: str) -> list[int]:
    from ..errors import InputError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--views takes numbers separated by commas, such as 2,4,8, got {text!r}") from error
