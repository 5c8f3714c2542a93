"""`lite3r bench`: how fast a model is as it is, as strong as a dense one gets, and with Lite3R."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError, plural
from .options import LARGEST_SEED, Config, Device, KeepRatio, Model, Repeats, Resolution, config_fields, numbers, plain_fields
from .reports import Html, Plots, bench_report, check_reports, write_reports

DEFAULT_VARIANTS = "stock,strong,strong-exact,strong-fp8,lite3r,lite3r-strong,lite3r-fp8"
TABLE_WIDTH = 165


def bench(
    context: typer.Context,
    model: Model,
    views: Annotated[str, typer.Option(help="Numbers of views, separated by commas.")] = "2,4,8,16,32",
    keep_ratio: KeepRatio = None,
    config: Config = None,
    resolution: Resolution = None,
    variants: Annotated[
        str,
        typer.Option(
            help=f"Some of {DEFAULT_VARIANTS.replace(',', ', ')}, in the order in which they are to run; by default all.",
            show_default=False,
        ),
    ] = DEFAULT_VARIANTS,
    peers: Annotated[
        str | None,
        typer.Option(
            help="Others to measure beside, each in a process of its own: strided-keys, torchao-float8, fastvggt=PATH, saf3r=PATH, the "
            "path of a checkout; separated by commas.",
            show_default=False,
        ),
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the report here, after every cell.", show_default=False)] = None,
    markdown_path: Annotated[
        Path | None, typer.Option("--markdown", help="Write the table and the conditions here, as text.", show_default=False)
    ] = None,
    html: Html = None,
    plots: Plots = None,
    device: Device = "auto",
    compile_: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the blocks where the preset is.")] = True,
    graphs: Annotated[bool, typer.Option(help="Record CUDA graphs where the preset is.")] = True,
    fill_branch: Annotated[
        bool, typer.Option("--fill-branch", help="Measure the linear branch as after calibration; before, it is zero and takes no time.")
    ] = False,
    repeats: Repeats = 5,
    time_budget: Annotated[float | None, typer.Option(help="Seconds after which no further cell is started.", show_default=False)] = None,
    commit: Annotated[
        str | None, typer.Option(help="The commit under test, where the package is not in its repository.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of weights and images.")] = 0,
) -> None:
    """Measure a model as it is, as strong as a dense model gets, and with Lite3R, in one process on the same images."""
    from rich.console import Console

    from ..adapter.plugins import find_model
    from ..bench import Bench, BenchModel
    from ..bench.peers import chosen
    from ..bench.table import markdown, table
    from ..evaluation import choose_device
    from ..files import check_output, write_atomically

    entry = find_model(model)
    entry.require_library()
    run = Bench(
        model=BenchModel.of(entry),
        views=numbers(views, "--views"),
        variants=[name.strip() for name in variants.split(",")],
        resolution=resolution or entry.resolution,
        options=plain_fields(config_fields(config, keep_ratio)),
        device=choose_device(device),
        compile=compile_,
        graphs=graphs,
        fill_branch=fill_branch,
        repeats=repeats,
        time_budget=time_budget,
        peers={} if peers is None else chosen(peers, entry.name),
        path=json_path,
        commit=commit,
        seed=seed,
        log=lambda line: print(line, flush=True),
    )
    if json_path is not None:
        check_output(json_path, ".json")
    if markdown_path is not None:
        check_output(markdown_path, ".md")
    check_reports(html, plots)
    report = run.run()
    if all(cell.status != "ok" for cell in report.cells):
        first = report.cells[0]
        where = f"{first.variant} at {plural(first.views, 'view')}"
        raise InputError(f"nothing was measured: no cell ran; {where}: {first.status}, {first.error}")
    console = Console(emoji=False)
    console.width = max(console.width, TABLE_WIDTH)
    console.print(table(report))
    for line in dict.fromkeys(f"{cell.variant}: {cell.line}" for cell in report.cells if cell.line is not None):
        console.print(f"  {line}", markup=False, highlight=False)
    for key, value in report.conditions.items():
        console.print(f"  {key}: {value}", markup=False, highlight=False)
    if markdown_path is not None:
        write_atomically(markdown_path, markdown(report))
    if html is not None or plots is not None:
        write_reports(html, plots, bench_report(context, report))
