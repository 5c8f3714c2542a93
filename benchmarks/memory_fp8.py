"""Bytes of a model in FP8 beside BF16: its weights, the peak of loading it onto a GPU, and the peak of a forward.

    python benchmarks/memory_fp8.py --model vggt --views 2,8,32 --json benchmarks/results/h100_fp8_memory.json

What is compared are variants of `lite3r bench`, run eagerly with ``weights="bf16_everywhere"``: `strong` and
`lite3r-strong`, and `lite3r-fp8` with all Linears of the blocks in FP8. The weights are random, which changes
no size. The model that is loaded has no weights before (it is on the meta device), so what loading allocates is the
weights and whatever is made on the way. The file is written anew after every number. Exits with 1 when the blocks take
more than 0.52 of their BF16 bytes, loading takes more than 1.05 of what the model then holds, `describe` tells another
peak than was measured, or the loaded model gives something else than the one that was saved.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lite3r_plugin import apply_lite3r, describe, load_lite3r, save_lite3r
from lite3r_plugin.adapter.plugins import find_model
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.bench.models import BenchModel, build, make_images, output_differences, reference, tensors
from lite3r_plugin.bench.records import weight_bytes
from lite3r_plugin.bench.variants import DENSE, FP8, fill_projections
from lite3r_plugin.files import write_atomically
from lite3r_plugin.runtime.device import peak, release_memory

BLOCKS, LOADING, SAME = 0.52, 1.05, 1e-3  # the most that is allowed
# Without compiled blocks and graphs, whose memory is another matter.
IN_BF16 = {"weights": "bf16_everywhere"}
VARIANTS: dict[str, dict[str, Any]] = {"strong": DENSE | {"fuse": False}, "lite3r-strong": {}, "lite3r-fp8": FP8 | {"fp8_filter": ("*",)}}
Save = Callable[[dict[str, Any]], None]


def made(model: BenchModel, variant: str, options: dict[str, Any], device: torch.device) -> nn.Module:
    """`model` with random weights as `variant`."""
    module = apply_lite3r(build(model, device, seed=0), **{**options, **IN_BF16, **VARIANTS[variant]})
    fill_projections(module)
    return module


def block_bytes(module: nn.Module) -> int:
    """Bytes of everything that the transformer blocks of a model with Lite3R hold: weights, scales, biases, norms, branches."""
    blocks = [module.get_submodule(name) for name in next(iter(lite3r_modules(module).values())).state.blocks]
    return sum({id(t): t.nbytes for block in blocks for t in (*block.parameters(), *block.buffers())}.values())


@torch.no_grad()
def forward(model: BenchModel, module: nn.Module, views: int, resolution: int, device: torch.device) -> tuple[int | None, Any]:
    """Peak bytes of a forward, weights included, and its outputs. The second call counts: the first one compiles kernels."""
    images = make_images(views, resolution, device, seed=0).to(torch.bfloat16)
    model.run(module, images)
    release_memory(device)
    outputs = tensors(model.run(module, images))
    most = peak(device)[0]  # before the outputs are copied for comparison
    return most, reference(outputs)


def dense_and_sparse(
    model: BenchModel, views: list[int], resolution: int, options: dict[str, Any], device: torch.device, result: dict[str, Any], save: Save
) -> None:
    """The variants in BF16."""
    for variant in ("strong", "lite3r-strong"):
        module = made(model, variant, options, device)
        found: dict[str, Any] = {"weights": weight_bytes(module), "forward_peak": {}}
        if lite3r_modules(module):
            found["blocks"] = block_bytes(module)
        result[variant] = found
        for count in views:
            found["forward_peak"][count] = forward(model, module, count, resolution, device)[0]
            save(result)
        del module
        release_memory(device)


def in_fp8(
    model: BenchModel, views: list[int], resolution: int, options: dict[str, Any], device: torch.device, result: dict[str, Any], save: Save
) -> None:
    """The variant in FP8: saved whole, loaded onto the meta device, run."""
    with tempfile.TemporaryDirectory() as folder:
        module = made(model, "lite3r-fp8", options, device)
        expected = forward(model, module, views[0], resolution, device)[1]
        save_lite3r(module, folder, whole=True)
        del module
        # Some models cannot be built on the meta device: they read numbers off tensors.
        empty = build(model, device, seed=0).to("meta")
        release_memory(device)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of originals that are not kept
            loaded = load_lite3r(empty, folder, device=device, **IN_BF16, keep_originals=False)
        most = peak(device)[0]
    report = describe(loaded)
    stored, in_bf16 = report.fp8_bytes
    blocks = block_bytes(loaded)
    found: dict[str, Any] = {
        "weights": weight_bytes(loaded), "held": sum(weight_bytes(loaded).values()),
        "linears": report.linears, "config": report.config.to_dict(),
        "blocks": blocks, "blocks_ratio": blocks / result["lite3r-strong"]["blocks"],
        "linear_weights": stored, "linear_weights_in_bf16": in_bf16, "linear_weights_ratio": stored / in_bf16,
        "loading_peak": None if most is None else most - before, "allocated_before_loading": before,
        "loading_peak_by_describe": report.peak_bytes, "forward_peak": {}, "forward_peak_by_describe": {},
    }  # fmt: skip
    result["lite3r-fp8"] = found
    save(result)
    for count in views:
        found["forward_peak"][count], outputs = forward(model, loaded, count, resolution, device)
        found["forward_peak_by_describe"][count] = describe(loaded).peak_bytes
        found["described"] = str(describe(loaded)).splitlines()
        if count == views[0]:
            found["loaded_differs_by"] = max(output_differences(outputs, expected).values())
        save(result)


def wrong(result: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    fp8 = result["lite3r-fp8"]
    faults = []
    if not fp8["blocks_ratio"] <= BLOCKS:
        faults.append(f"the blocks take {fp8['blocks_ratio']:.4f} of BF16, more than {BLOCKS}")
    if fp8["loading_peak"] is not None and not fp8["loading_peak"] <= LOADING * fp8["held"]:
        faults.append(f"loading peaks at {fp8['loading_peak']} bytes, the model holds {fp8['held']}")
    if fp8["forward_peak"] != fp8["forward_peak_by_describe"]:
        faults.append(f"describe tells other peaks, {fp8['forward_peak_by_describe']}, than were measured, {fp8['forward_peak']}")
    if not fp8["loaded_differs_by"] <= SAME:
        faults.append(f"the loaded model differs from the saved one by {fp8['loaded_differs_by']}")
    return faults


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, print, store, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vggt", help="a name that `lite3r adapters` lists")
    parser.add_argument("--views", default="2,8,32")
    parser.add_argument("--resolution", type=int, default=518)
    parser.add_argument("--keep-ratio", type=float, default=0.1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    views = [int(n) for n in args.views.split(",")]
    result: dict[str, Any] = {
        "conditions": dict(
            model=args.model, resolution=args.resolution, device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            torch=torch.__version__, date=datetime.date.today().isoformat(), weights="random", unit="bytes; peaks by number of views",
            run="eager",
        )
    }  # fmt: skip

    def save(result: dict[str, Any]) -> None:
        if args.json:
            write_atomically(args.json, json.dumps(result, indent=1) + "\n")

    what = (BenchModel.of(find_model(args.model)), views, args.resolution, {"keep_ratio": args.keep_ratio}, device, result, save)
    dense_and_sparse(*what)
    in_fp8(*what)
    faults = result["wrong"] = wrong(result)
    save(result)
    print(json.dumps(result, indent=1))
    print(*(faults or ["all as it should be"]), sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
