"""What `lite3r bench` and `lite3r eval` write for people: one page, and pictures for papers."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..bench import BenchReport
    from ..evaluation import Evaluation
    from ..scene.export import Report

Html = Annotated[Path | None, typer.Option("--html", help="Write a page with plots, numbers and conditions here.", show_default=False)]
Plots = Annotated[Path | None, typer.Option("--plots", help="Folder for the plots as *.png, made if needed.", show_default=False)]

ARGUMENTS = "lite3r_plugin.arguments"  # of the command line, in `typer.Context.meta`
PRINT_DPI = 300
NUMBERS = ("means", "differences", "scenes", "fidelity", "seconds", "density")  # of `Evaluation.to_dict`


def check_reports(html: Path | None, plots: Path | None) -> None:
    """Raise `InputError` where they could not be written, before any work."""
    from ..files import check_output

    if html is not None:
        check_output(html, ".html")
    if plots is not None:
        try:
            plots.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"the folder {plots} cannot be made: {error.strerror}") from error


def write_reports(html: Path | None, plots: Path | None, report: Report) -> None:
    """Write the page and the plots that are wanted, and say so."""
    from ..bench.plots import save_figure
    from ..scene.export import save_report
    from .show import say

    if html is not None:
        save_report(html, report)
        say(f"wrote {html} (plots, numbers, conditions; open it in a browser)")
    if plots is not None:
        for what, figure in report.figures.items():
            path = plots / f"{what.replace(' ', '_')}.png"
            save_figure(figure, path, PRINT_DPI)
            say(f"wrote {path}")


def bench_report(context: typer.Context, report: BenchReport) -> Report:
    """What `lite3r bench` measured."""
    from ..bench.plots import memory_over_views, time_over_views
    from ..bench.table import table
    from ..scene.export import Facts, Report, facts_of_table

    stored = report.to_dict()
    of = report.conditions
    figures = {"time over views": time_over_views(stored)}
    sentences = [f"Weights: {of['weights']}.", "Times are medians of whole forwards; bars reach from the fastest run to the slowest."]
    if any(cell.winner is not None and cell.winner.peak_bytes for cell in report.cells):
        figures["memory over views"] = memory_over_views(stored)
    else:
        sentences.append("Memory was not measured: it is on a GPU alone.")
    lines = {cell.variant: cell.line for cell in report.cells if cell.line is not None}
    variants = tuple((name, summary, lines.get(name, "")) for name, summary in of["variants"].items())
    return Report(
        title=f"lite3r bench: {of['model']} at {of['resolution']} px on {of['device']}",
        sentences=tuple(sentences),
        figures=figures,
        tables=(facts_of_table(table(report)), Facts("What was run", ("variant", "what it is", "line"), variants)),
        lines=_lines(context, of),
        conditions={name: value for name, value in of.items() if name != "variants"},
    )


def eval_report(
    context: typer.Context, result: Evaluation, record: Mapping[str, Any], others: Sequence[Mapping[str, Any]], notes: Sequence[str]
) -> Report:
    """What `lite3r eval` measured, `record`, beside what it did before."""
    from ..evaluation.plots import quality_over_speed, speedup
    from ..scene.export import Report, facts_of_table

    figures: dict[str, Figure] = {"quality over speed": quality_over_speed([record, *others])}
    return Report(
        title=f"lite3r eval: {record['model']} on {record['data']}",
        sentences=(
            f"Density {result.density:.3f}: the share of attention scores that was computed. A set of views took dense "
            f"{speedup(record):.2f} times as long. Bars are 95 % intervals of the paired difference from dense.",
            *notes,
        ),
        figures=figures,
        tables=(facts_of_table(result.table()),),
        lines=_lines(context, record),
        conditions={name: value for name, value in record.items() if name not in NUMBERS},
    )


def _lines(context: typer.Context, conditions: Mapping[str, Any]) -> str:
    """The command as it was typed, with the versions that ran it."""
    versions = {"lite3r-plugin": "lite3r_plugin", "commit": "commit", "torch": "torch", "triton": "triton", "Python": "python"}
    told = [f"{name} {conditions[key]}" for name, key in versions.items() if conditions.get(key)]
    return f"# {', '.join(told)}\n{shlex.join(['lite3r', *context.meta[ARGUMENTS]])}"
