"""Bytes of a model in FP8 beside BF16: its weights, the peak of loading it onto a GPU, and the peak of a forward.

    python benchmarks/memory_fp8.py --model vggt --views 2,8 --json benchmarks/results/h100_fp8_memory.json

Both have what the strong variants of `lite3r bench` have: BF16 weights and the exact fixes. In FP8 are the Linears of the
transformer blocks. The weights are random, which changes no size. The model that is loaded has no weights before (it is on
the meta device), so what loading allocates is the weights and whatever is made on the way. Exits with 1 when the weights
of the blocks take more than 0.52 of their BF16 bytes, loading takes more than 1.02 of what the model then holds, or the
loaded model gives something else than the one that was saved.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lite3r_plugin import describe, load_lite3r, save_lite3r
from lite3r_plugin.bench.measure import peak, release_memory
from lite3r_plugin.bench.models import BenchModel, build, fidelity, find_model, make_images, reference, tensors
from lite3r_plugin.bench.runner import weight_bytes
from lite3r_plugin.bench.variants import VARIANTS, prepare

BLOCKS, LOADING, SAME = 0.52, 1.02, 1e-3  # the most that is allowed


def made(model: BenchModel, variant: str, options: dict[str, Any], device: torch.device) -> nn.Module:
    """`model` with random weights as `variant`."""
    module = build(model, device, seed=0)
    prepare(module, VARIANTS[variant], options)
    return module


@torch.no_grad()
def forward(model: BenchModel, module: nn.Module, views: int, resolution: int, device: torch.device) -> tuple[int | None, Any]:
    """Peak bytes of a forward, weights included, and its outputs. The second call counts: the first one compiles kernels."""
    images = make_images(views, resolution, device, seed=0).to(torch.bfloat16)
    model.run(module, images)
    release_memory(device)
    outputs = reference(tensors(model.run(module, images)))
    return peak(device)[0], outputs


def measure(model: BenchModel, views: list[int], resolution: int, options: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Everything that the report holds."""
    dense = made(model, "strong", options, device)
    result: dict[str, Any] = {"bf16": {"weights": weight_bytes(dense), "forward_peak": {}}, "fp8": {"forward_peak": {}}}
    for count in views:
        result["bf16"]["forward_peak"][count] = forward(model, dense, count, resolution, device)[0]
    del dense
    release_memory(device)

    with tempfile.TemporaryDirectory() as folder:
        module = made(model, "lite3r-strong", options, device)
        expected = forward(model, module, views[0], resolution, device)[1]
        save_lite3r(module, folder, whole=True)
        del module
        # Some models cannot be built on the meta device: they read numbers off tensors.
        empty = made(model, "strong", options, device).to("meta")
        release_memory(device)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        loaded = load_lite3r(empty, folder, device=device)
        most = peak(device)[0]
    report = describe(loaded)
    stored, in_bf16 = report.fp8_bytes
    result["fp8"] |= {
        "weights": weight_bytes(loaded), "linears": report.linears, "config": report.config.to_dict(),
        "blocks": stored, "blocks_in_bf16": in_bf16, "blocks_ratio": stored / in_bf16, "described_peak": report.peak_bytes,
        "loading_peak": None if most is None else most - before, "held": sum(weight_bytes(loaded).values()),
    }  # fmt: skip
    for count in views:
        result["fp8"]["forward_peak"][count], outputs = forward(model, loaded, count, resolution, device)
        if count == views[0]:
            result["fp8"]["loaded_differs_by"] = max(fidelity(outputs, expected).values())
    return result


def main() -> None:
    """Parse, measure, print, store, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vggt", help="a name that `lite3r adapters` lists")
    parser.add_argument("--views", default="2,8")
    parser.add_argument("--resolution", type=int, default=518)
    parser.add_argument("--keep-ratio", type=float, default=0.1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = {"keep_ratio": args.keep_ratio, "precision": "fp8"}
    result = measure(find_model(args.model), [int(n) for n in args.views.split(",")], args.resolution, options, device)
    result["conditions"] = dict(
        model=args.model, resolution=args.resolution, device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        torch=torch.__version__, date=datetime.date.today().isoformat(), weights="random", unit="bytes; peaks by number of views",
    )  # fmt: skip
    text = json.dumps(result, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    fp8 = result["fp8"]
    loading = fp8["loading_peak"] is None or fp8["loading_peak"] <= LOADING * fp8["held"]
    print(f"blocks {fp8['blocks_ratio']:.4f} of BF16; loading peaks at {fp8['loading_peak']} bytes for {fp8['held']} held")
    sys.exit(0 if fp8["blocks_ratio"] <= BLOCKS and loading and fp8["loaded_differs_by"] <= SAME else 1)


if __name__ == "__main__":
    main()
