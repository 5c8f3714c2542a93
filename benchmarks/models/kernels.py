"""Where the time of one forward goes: milliseconds of the GPU by kind of kernel, and by kernel.

    python benchmarks/models/kernels.py --model vggt --views 2,8,32 --variants strong-exact,lite3r-fp8 --json benchmarks/results/NAME.json

Each variant is the line of `lite3r bench`, compiled and recorded as that line has it. One forward runs under `torch.profiler`, after two
without: kernels of a CUDA graph are seen as well. The sum of all kernels stands beside the median time of the whole forward without the
profiler, so that what is between kernels is seen too.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lite3r_plugin.adapter.plugins import find_model
from lite3r_plugin.bench.measure import measure
from lite3r_plugin.bench.models import BenchModel, build, make_images
from lite3r_plugin.bench.records import machine
from lite3r_plugin.bench.variants import BRANCH, VARIANTS, prepare
from lite3r_plugin.cli.options import config_fields, numbers
from lite3r_plugin.files import to_json, write_atomically
from lite3r_plugin.runtime.device import release_memory, synchronize

# The first pattern that a kernel's name matches is its kind. cuBLAS on Hopper names its products nvjet, then a letter for each dtype:
# q is FP8, h and t are half precision, s is FP32.
KINDS: tuple[tuple[str, str], ...] = (
    ("fused by the compiler", r"^triton_(poi|per|red)_"),  # named by what is in it
    ("sparse attention", r"_sparse_linear_kernel|_marginal|_linear_state|_is_used|_padded_means"),
    ("choice of blocks", r"_select|_variance|_columns_kernel|_starts_kernel|_indices_kernel"),
    ("norm, rotation and order of q and k", r"_prepare_kernel"),
    ("dense attention", r"sdpa|flash|fmha|mha_"),
    ("convolutions", r"conv|fprop|wgrad|dgrad|im2col|winograd"),
    ("products in FP8", r"nvjet(_sm\d+)?_q|e4m3|float8|f8"),
    ("other products", r"nvjet|gemm|cutlass|cublas|splitK|_linear_kernel|triton_tem|gemv"),
    ("passes around FP8", r"^_rows_kernel|^_scale_kernel|^_residual_kernel"),
    ("heads, fused", r"_upsample_kernel|_bias_kernel|_embedding_kernel"),
    ("fused by the compiler, with others", r"^triton_"),
    ("copies", r"[Mm]emcpy|[Mm]emset|copy|CatArray"),
)
TOP = 40


def kind_of(name: str) -> str:
    """The kind of a kernel by its name."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")


def kernels_of(call: Callable[[], Any], device: torch.device, trace: Path | None = None) -> dict[str, tuple[int, float]]:
    """Calls and milliseconds by kernel of one run of `call`; `trace`: where its Chrome trace goes."""
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        synchronize(device)
    found: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for event in profiler.events() or ():
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            count, ms = found[event.name]
            found[event.name] = count + 1, ms + event.time_range.elapsed_us() / 1e3
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    return dict(found)


def by_kind(kernels: dict[str, tuple[int, float]]) -> dict[str, float]:
    """Milliseconds by kind, most first."""
    kinds: dict[str, float] = defaultdict(float)
    for name, (_, ms) in kernels.items():
        kinds[kind_of(name)] += ms
    return dict(sorted(kinds.items(), key=lambda item: -item[1]))


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure all rows, print them, and store them after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vggt")
    parser.add_argument("--views", default="2,8,32")
    parser.add_argument("--resolution", type=int, default=518)
    parser.add_argument("--keep-ratio", type=float, default=0.1)
    parser.add_argument("--variants", default="strong-exact,lite3r-fp8")
    parser.add_argument("--config", action="append", help="a field of Lite3RConfig, as name=value")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit", help="where the package is not in its repository")
    parser.add_argument("--traces", type=Path, help="a folder for Chrome traces")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    device, model = torch.device(options.device), BenchModel.of(find_model(options.model))
    fields = {**config_fields(options.config), "keep_ratio": options.keep_ratio}
    report: dict[str, Any] = {
        "model": model.name, "resolution": options.resolution, "linear_branch": BRANCH[False],
        **machine(device, options.commit), "rows": [],
    }  # fmt: skip
    for name in options.variants.split(","):
        module = build(model, device, seed=0)
        prepare(module, VARIANTS[name], fields)
        for views in numbers(options.views, "--views"):
            images = make_images(views, options.resolution, device, seed=0)

            def call(images: torch.Tensor = images, module: Any = module) -> Any:
                with torch.no_grad():
                    return model.run(module, images)

            call(), call()
            trace = options.traces / f"{name}_{views}.json.gz" if options.traces else None
            whole, kernels = measure(call, device), kernels_of(call, device, trace)
            kinds = by_kind(kernels)
            most = sorted(kernels.items(), key=lambda item: -item[1][1])[:TOP]
            row = {
                "variant": name, "line": VARIANTS[name].line(fields), "views": views, "whole_ms": whole.median_ms,
                "kernels_ms": sum(kinds.values()), "kinds": kinds,
                "kernels": [{"name": kernel, "kind": kind_of(kernel), "calls": calls, "ms": ms} for kernel, (calls, ms) in most],
            }  # fmt: skip
            report["rows"].append(row)
            print(json.dumps({key: row[key] for key in row if key != "kernels"}), flush=True)
            if options.json is not None:
                write_atomically(options.json, to_json(report))
            del images
            release_memory(device)
        del module
    return report["rows"]


if __name__ == "__main__":
    main()
