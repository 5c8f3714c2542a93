"""One forward over very many views by the public line: seconds, memory, and how many views the memory of the GPU is enough for.

    python benchmarks/models/many_views.py --model vggt --views 500,1000 --keep-ratio 0.02 --json benchmarks/results/NAME.json

Weights are random, so this is time and memory alone. `first_s` is the first forward of a layout, which compiles. Memory grows by the view:
`fit` is where the line through the peaks of the least and the greatest number of views meets the memory of the GPU, and no measurement.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from lite3r_plugin import apply_lite3r
from lite3r_plugin.adapter.plugins import find_model
from lite3r_plugin.bench.models import BenchModel, build, make_images
from lite3r_plugin.bench.records import machine
from lite3r_plugin.bench.variants import BRANCH
from lite3r_plugin.cli.options import config_fields, numbers
from lite3r_plugin.errors import short
from lite3r_plugin.files import to_json, write_atomically
from lite3r_plugin.ops.dispatch import SlowPathWarning
from lite3r_plugin.runtime.device import memory_of, peak, release_memory, synchronize, timed


def fit(rows: list[dict[str, Any]], memory: int | None) -> int | None:
    """The number of views whose peak would be `memory`, by a line through the first and the last of `rows`.

    None where that is known to be wrong, since memory ran out with as many views or fewer.
    """
    done = sorted((row["views"], row["peak_bytes"]) for row in rows if row.get("peak_bytes"))
    if memory is None or len(done) < 2:
        return None
    (few, low), (many, high) = done[0], done[-1]
    found = int(few + (memory - low) * (many - few) / (high - low))
    return None if any("error" in row and row["views"] <= found for row in rows) else found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, and store after each number of views."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vggt")
    parser.add_argument("--views", default="500,1000")
    parser.add_argument("--height", type=int, default=392)
    parser.add_argument("--width", type=int, default=518)
    parser.add_argument("--keep-ratio", type=float, default=0.02)
    parser.add_argument("--repeats", type=int, default=2, help="0: the first forward alone, whose time holds that of compiling")
    parser.add_argument("--config", action="append", help="a field of Lite3RConfig, as name=value")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="where the package is not in its repository")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    device, model = torch.device(options.device), BenchModel.of(find_model(options.model))
    fields = {"preset": "fast", "precision": "fp8", **config_fields(options.config), "keep_ratio": options.keep_ratio}
    module = apply_lite3r(build(model, device, seed=0), **fields)
    release_memory(device)
    memory = memory_of(device)
    report: dict[str, Any] = {
        "model": model.name, "weights": "random: time and memory alone", "size": [options.height, options.width],
        "line": f"apply_lite3r(model, {', '.join(f'{name}={value!r}' for name, value in fields.items())})",
        "linear_branch": BRANCH[False], "memory_bytes": memory, "fit": None, "rows": [], **machine(device, options.commit),
    }  # fmt: skip
    warnings.simplefilter("ignore", SlowPathWarning)  # what is not recorded is part of what is measured
    for views in numbers(options.views, "--views"):
        row: dict[str, Any] = {"views": views}
        side = max(options.height, options.width)
        images = make_images(views, side, device, seed=0)[..., : options.height, : options.width].contiguous()
        release_memory(device)
        try:
            with torch.no_grad():
                start = time.perf_counter()
                model.run(module, images)
                synchronize(device)
                row["first_s"] = time.perf_counter() - start
                release_memory(device)
                times = [timed(lambda images=images: model.run(module, images), device) for _ in range(options.repeats)]
                row["peak_bytes"], row["reserved_bytes"] = peak(device)
            row |= {"seconds": statistics.median(times), "times": times} if times else {}
        except torch.cuda.OutOfMemoryError as error:
            row["error"] = short(error)
        report["rows"].append(row)
        report["fit"] = fit(report["rows"], memory)
        print(json.dumps(row), flush=True)
        if options.json is not None:
            write_atomically(options.json, to_json(report))
        del images
    print(f"fit: {report['fit']}")
    return report


if __name__ == "__main__":
    main()
