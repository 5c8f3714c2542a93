"""Whether a line of Lite3R is ever slower than what it starts from: pairs of models that run in turns.

    python benchmarks/models/never_slower.py --model vggt --json benchmarks/results/NAME.json

For each number of views and keep ratio the two models of a pair run alternately on the same images, after a warm-up of each, and the
ratio of each run to its neighbour's counts: clocks and temperature are the same for both. Pairs: the default line against the stock model,
the preset against the variant `strong` of `lite3r bench`; and with ``--pairs filter`` what FP8 takes with what it leaves in full precision
by default against FP8 of all Linears of the blocks; with ``--pairs branch`` what a linear branch takes that was calibrated against one that
was not and is zero, which is not judged. The GPU bounds where it needs longer than Python takes to launch, measured on
the model that is the baseline. The file is written anew after every row. Exits with 1 where a median ratio is worse than what is allowed,
or where one that was to run compiled did not: `ran` and `ran_against` say how both did.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lite3r_plugin.adapter.plugins import find_model
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.apply.swap import fast_of
from lite3r_plugin.bench import VARIANTS, BenchModel
from lite3r_plugin.bench.models import build, make_images
from lite3r_plugin.bench.records import machine
from lite3r_plugin.bench.variants import BRANCH, Variant, fill_projections, prepare
from lite3r_plugin.cli.options import config_fields, numbers
from lite3r_plugin.errors import short
from lite3r_plugin.files import to_json, write_atomically
from lite3r_plugin.ops.dispatch import SlowPathWarning
from lite3r_plugin.runtime.device import release_memory, synchronize, timed
from lite3r_plugin.runtime.fast import FastForward

ALLOWED = {"gpu": 1.03, "host": 1.08}
PAIRS = {  # ours, and what it must not be slower than
    "default": ("lite3r", "stock"),
    "preset": ("lite3r-strong", "strong"),
    "filter": ("lite3r-fp8", "lite3r-fp8"),
    "branch": ("lite3r-fp8", "lite3r-fp8"),
}
FILLED = {"branch"}  # where the linear branches of ours are as after calibration
AGAINST: dict[str, dict[str, Any]] = {"filter": {"fp8_filter": ("*",)}}  # fields of what ours is compared with


@dataclass
class Side:
    """One of a pair: its variant, its model, and a forward on the images at hand."""

    variant: Variant
    module: nn.Module
    line: str | None

    def forward(self, model: BenchModel, images: torch.Tensor) -> Callable[[], Any]:
        """A forward as the variant runs."""

        def call() -> Any:
            cast = contextlib.nullcontext() if self.variant.strong else torch.autocast(images.device.type, torch.bfloat16)
            with torch.no_grad(), cast:
                return model.run(self.module, images)

        return call

    def how(self) -> tuple[str, bool]:
        """How it ran, in the words of `lite3r bench`, and whether blocks were compiled if they were to be."""
        fast = self.fast
        return ("eager", True) if fast is None else (fast.ran, fast.not_compiled is None)

    @property
    def fast(self) -> FastForward | None:
        """What runs the whole model, where there is a preset."""
        site = next(iter(lite3r_modules(self.module).values()), None)
        return None if site is None else fast_of(site.state)


def made(name: str, model: BenchModel, options: dict[str, Any], device: torch.device) -> Side:
    """The model as the variant `name`."""
    variant, module = VARIANTS[name], build(model, device, seed=0)
    prepare(module, variant, options)
    return Side(variant, module, variant.line(options))


def bound_by(call: Callable[[], Any], device: torch.device) -> str:
    """``"gpu"`` where kernels run for nine tenths of a forward, or more, and on a CPU; else ``"host"``.

    How long Python takes to launch a forward does not tell: with a thousand launches waiting, it waits for the GPU.
    """
    if device.type != "cuda":
        return "gpu"
    seconds = statistics.median(timed(call, device) for _ in range(3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        synchronize(device)
    kernels = (event for event in profile.events() or () if event.device_type == torch.autograd.DeviceType.CUDA)
    return "gpu" if sum(event.device_time_total for event in kernels) / 1e6 > 0.9 * seconds else "host"


def in_turns(ours: Callable[[], Any], theirs: Callable[[], Any], device: torch.device, runs: int) -> tuple[list[float], list[float]]:
    """Milliseconds of `runs` runs of both, alternately, whoever comes first changing."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(runs):
        for which in (0, 1) if i % 2 else (1, 0):
            times[which].append(timed((ours, theirs)[which], device) * 1e3)
    return times


def row(pair: str, ours: Side, theirs: Side, model: BenchModel, images: torch.Tensor, runs: int) -> dict[str, Any]:
    """A row of the report."""
    device = images.device
    for side in (ours, theirs):  # how it ran is told of this number of views
        if (fast := side.fast) is not None:
            fast.forget()
    calls = [side.forward(model, images) for side in (ours, theirs)]
    for call in calls:
        for _ in range(3):  # compiles, records, and replays once
            call()
    bound = bound_by(calls[1], device)
    mine, others = in_turns(calls[0], calls[1], device, runs)
    ratios = [a / b for a, b in zip(mine, others, strict=True)]
    ratio = statistics.median(ratios)
    allowed = None if pair in FILLED else ALLOWED[bound]
    (ran, as_told), (ran_against, against_as_told) = ours.how(), theirs.how()
    return {
        "pair": pair, "against": theirs.variant.name, "line": ours.line, "line_against": theirs.line, "ms": statistics.median(mine),
        "ms_against": statistics.median(others), "ratio": ratio, "ratio_min": min(ratios), "ratio_max": max(ratios), "runs": runs,
        "bound_by": bound, "allowed": allowed, "ran": ran, "ran_against": ran_against,
        "ok": as_told and against_as_told and (allowed is None or ratio <= allowed),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure all rows, print them, and store them after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vggt")
    parser.add_argument("--views", default="1,2,3,4,8,16,32")
    parser.add_argument("--keep", default="0.1,0.3")
    parser.add_argument("--pairs", default="default,preset")
    parser.add_argument("--resolution", type=int, default=518)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--config", action="append", help="a field of Lite3RConfig for all, as name=value")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="where the package is not in its repository")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    device, model, asked = torch.device(options.device), BenchModel.of(find_model(options.model)), config_fields(options.config)
    report: dict[str, Any] = {
        "model": model.name, "resolution": options.resolution, "weights": "random: time alone", "allowed": ALLOWED,
        **machine(device, options.commit), "rows": [],
    }  # fmt: skip
    warnings.simplefilter("ignore", SlowPathWarning)  # what does not run fast is what is measured
    for pair in options.pairs.split(","):
        for keep in map(float, options.keep.split(",")):
            ours, theirs = (
                made(name, model, {**asked, "keep_ratio": keep, **fields}, device)
                for name, fields in zip(PAIRS[pair], ({}, AGAINST.get(pair, {})), strict=True)
            )
            if pair in FILLED:
                fill_projections(ours.module)
            for views in numbers(options.views, "--views"):
                images = make_images(views, options.resolution, device, seed=0)
                found: dict[str, Any] = {"views": views, "keep_ratio": keep, "linear_branch": BRANCH[pair in FILLED]}
                try:
                    found |= row(pair, ours, theirs, model, images, options.runs)
                except torch.cuda.OutOfMemoryError as error:
                    found |= {"pair": pair, "error": short(error)}
                report["rows"].append(found)
                print(json.dumps(found), flush=True)
                if options.json is not None:
                    write_atomically(options.json, to_json(report))
            del ours, theirs
            torch._dynamo.reset()
            release_memory(device)
    return report


if __name__ == "__main__":
    sys.exit(0 if all(found.get("ok") for found in main()["rows"]) else 1)
