"""How well `max_memory` foresees the peak of a forward, and whether forwards run under a cap of the allocator.

    python benchmarks/models/memory_plan.py --model vggt --views 2,8,32,100 --max-memory 8GB --json benchmarks/results/NAME.json

Each row is the line ``apply_lite3r(model, max_memory=..., **fields)`` and one forward. On a GPU the peak is that of the allocator, which is
capped at the limit and 5 % more (`torch.cuda.set_per_process_memory_fraction`); on a CPU it is counted from every tensor that is made.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch

from lite3r_plugin import Lite3RConfig, apply_lite3r, plan_memory
from lite3r_plugin.adapter.plugins import find_model
from lite3r_plugin.bench import BenchModel
from lite3r_plugin.bench.models import build, make_images
from lite3r_plugin.bench.records import machine
from lite3r_plugin.cli.options import config_fields, numbers
from lite3r_plugin.errors import MemoryLimitError
from lite3r_plugin.files import to_json, write_atomically
from lite3r_plugin.runtime.device import release_memory
from lite3r_plugin.runtime.trace import traced

CAP = 1.05
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "fast": {"preset": "fast", "cuda_graphs": False, "compile_blocks": False},
    "fp8": {"preset": "fast", "precision": "fp8", "cuda_graphs": False, "compile_blocks": False, "keep_originals": False},
}


def measure(model: BenchModel, fields: dict[str, Any], limit: int, views: int, resolution: int, device: torch.device) -> dict[str, Any]:
    """One row: what was foreseen, and what was held."""
    module = build(model, device, seed=0)
    apply_lite3r(module, max_memory=limit, **fields)
    images = make_images(views, resolution, device, seed=0)
    cast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and "preset" not in fields)
    row: dict[str, Any] = {"views": views, "limit": limit, "fields": fields}
    with torch.no_grad(), cast:
        start = time.monotonic()
        plan = plan_memory(module, images)
        row |= {"planning_s": time.monotonic() - start, "predicted": plan.peak, "predicted_whole": plan.whole, "chunks": str(plan.chunks)}
        if not plan.fits:
            return row | {"refused": True}
        if device.type == "cuda":
            release_memory(device)
            torch.cuda.set_per_process_memory_fraction(
                min(1.0, CAP * limit / torch.cuda.get_device_properties(device).total_memory), device
            )
            try:
                model.run(module, images)
                torch.cuda.synchronize(device)
            except (MemoryLimitError, torch.cuda.OutOfMemoryError) as error:
                return row | {"error": f"{type(error).__name__}: {error}"}
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0, device)
            measured = torch.cuda.max_memory_allocated(device)
        else:
            with traced(module) as trace:
                _in_chunks(module, model, plan, images)
            measured = plan.standing + trace.peak
    return row | {"measured": measured, "error_percent": 100 * (plan.peak - measured) / measured}


def _in_chunks(module: Any, model: BenchModel, plan: Any, images: torch.Tensor) -> None:
    """A forward as it was planned: one that is watched runs without a plan."""
    from lite3r_plugin.runtime.chunks import in_chunks

    with in_chunks(module, module.forward.places, plan.chunks):
        model.run(module, images)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure all rows, print them, and store them after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vggt")
    parser.add_argument("--views", default="2,8,32,100")
    parser.add_argument("--resolution", type=int, default=518)
    parser.add_argument("--max-memory", default="8GB,16GB,80GB")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--config", action="append")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    device, asked = torch.device(options.device), config_fields(options.config)
    if device.type == "cuda" and device.index is None:  # the cap wants to know which
        device = torch.device("cuda", torch.cuda.current_device())
    model = BenchModel.of(find_model(options.model))
    report: dict[str, Any] = {"model": model.name, "resolution": options.resolution, **machine(device, None), "rows": []}
    for name in options.variants.split(","):
        for limit in options.max_memory.split(","):
            size = Lite3RConfig(max_memory=limit).max_memory
            assert isinstance(size, int)
            for views in numbers(options.views, "--views"):
                row = {"variant": name, **measure(model, {**asked, **VARIANTS[name]}, size, views, options.resolution, device)}
                report["rows"].append(row)
                print(json.dumps(row), flush=True)
                if options.json is not None:
                    write_atomically(options.json, to_json(report))
                gc.collect()
    return report["rows"]


if __name__ == "__main__":
    main()
