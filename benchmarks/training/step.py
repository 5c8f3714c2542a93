"""What a step of distillation costs beside a plain LoRA step of the dense model, and what calibration costs: time and peak memory.

    python benchmarks/training/step.py --views 8 24 --calibrate 2x16 4x8 --json FILE
    python benchmarks/training/step.py --model testbed --views 2 --size 32 --device cpu --repeats 2            # to see that it works

Both train LoRA of the same rank on the same Linears in BF16 autocast, with checkpointing of the transformer blocks. The dense step has
labels and one forward pass; distillation runs the teacher, which is the same model, before its student. Calibration gets so many inputs
of so many views, twice, since kernels are compiled in the first run; its memory stands beside that of a forward of one of its inputs.
`scaling.py` runs this on one GPU and on all of them.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lite3r_plugin
from lite3r_plugin import DistillConfig, apply_lite3r, calibrate, distill
from lite3r_plugin.adapter.plugins import find_model
from lite3r_plugin.files import write_atomically
from lite3r_plugin.runtime.device import synchronize

RANK = 16


def inputs(args: argparse.Namespace, views: int, device: torch.device) -> Iterator[Tensor]:
    """Random images ``[1, S, 3, H, W]`` without end."""
    generator = torch.Generator(device).manual_seed(0)
    while True:
        yield torch.rand(1, views, 3, args.size, args.size, generator=generator, device=device)


class Clock:
    """Passes inputs on, and takes the time between each and the next: that of a step. Ends after `limit` seconds of steps."""

    def __init__(self, source: Iterator[Tensor], device: torch.device, limit: float) -> None:
        self.source, self.device, self.limit, self.times = source, device, limit, [0.0]

    def __iter__(self) -> Iterator[Tensor]:
        for item in self.source:
            synchronize(self.device)
            self.times.append(time.perf_counter())
            if self.times[-1] - self.times[1] > self.limit and PartialState().num_processes == 1:  # others would wait
                return
            yield item

    def seconds(self, warm_up: int) -> float:
        """Median of the steps after the first ones."""
        found = self.times[1 + warm_up :]
        return statistics.median([b - a for a, b in itertools.pairwise(found)] or [math.nan])


def blocks_of(model: nn.Module, device: torch.device) -> tuple[list[str], list[str]]:
    """Names of the Linears of attention, and of the transformer blocks around them."""
    apply_lite3r(model)
    state = next(iter(lite3r_plugin.apply.lookup.look_up(model).states))
    linears = [
        f"{site.fqn}.{name}" for site in state.sites if site.scope in ("global", "frame")
        for name in (site.projections.qkv, site.projections.out)
    ]  # fmt: skip
    names = list(state.blocks)
    lite3r_plugin.remove_lite3r(model)
    return linears, names


def plain(args: argparse.Namespace, views: int, device: torch.device) -> float:
    """Seconds of a LoRA step of the dense model against labels."""
    model = find_model(args.model).build("random", device)
    linears, names = blocks_of(model, device)
    model.requires_grad_(False)
    blocks = [model.get_submodule(name) for name in names]
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    tuned = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=linears))
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-4)
    clock = Clock(inputs(args, views, device), device, args.seconds)
    for step, images in enumerate(clock):
        if step == args.warm_up + args.repeats + 1:
            break
        with torch.autocast(device.type, torch.bfloat16):
            out = tuned(images)
        loss = sum((value.float() - 0.5).abs().mean() for value in out.values() if isinstance(value, Tensor) and value.requires_grad)
        loss.backward()
        torch.nn.utils.clip_grad_norm_((p for p in tuned.parameters() if p.requires_grad), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return clock.seconds(args.warm_up)


def distilled(args: argparse.Namespace, views: int, device: torch.device) -> float:
    """Seconds of a step of `distill`."""
    model = apply_lite3r(find_model(args.model).build("random", device), keep_ratio=args.keep_ratio)
    clock = Clock(inputs(args, views, device), device, args.seconds)
    config = DistillConfig(
        trainable="proj+lora", lora_rank=RANK, checkpointing=True, mixed_precision="bf16", steps=args.warm_up + args.repeats + 1
    )
    report = distill(model, clock, config)
    return PartialState().num_processes / report.samples_per_second  # on several processes each reads the others' inputs, too


WAYS = {"plain": plain, "distill": distilled}


def calibrated(args: argparse.Namespace, count: int, views: int, device: torch.device) -> dict[str, Any]:
    """Seconds and memory of `calibrate` on `count` inputs of `views` views."""
    model = apply_lite3r(find_model(args.model).build("random", device), keep_ratio=args.keep_ratio, dense_below=0)
    given = list(itertools.islice(inputs(args, views, device), count))
    row: dict[str, Any] = {"way": "calibrate", "inputs": count, "views": views}
    with torch.autocast(device.type, torch.bfloat16):
        with torch.no_grad():
            model(given[0])
            row["forward_peak_gib"] = _peak(device, functools.partial(model, given[0]))[1]
        row["first_seconds"], _ = _peak(device, functools.partial(calibrate, model, given))
        row["seconds"], row["peak_gib"] = _peak(device, functools.partial(calibrate, model, given))
    if row["peak_gib"] is not None:
        row["extra_memory"] = row["peak_gib"] / row["forward_peak_gib"] - 1
    return row


def _peak(device: torch.device, call: Callable[[], Any]) -> tuple[float, float | None]:
    """Seconds of a call, and the most GiB in use meanwhile."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began, torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vggt")
    parser.add_argument("--views", type=int, nargs="+", default=[8, 24])
    parser.add_argument("--size", type=int, default=518)
    parser.add_argument("--keep-ratio", type=float, default=0.1)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--calibrate", nargs="*", default=[], metavar="INPUTSxVIEWS", help="such as 2x16")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=60.0, help="that the steps of a way may take, on one process")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    state = PartialState(cpu=args.device == "cpu")
    device = state.device
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", "torch": torch.__version__,
        "lite3r_plugin": lite3r_plugin.__version__, "model": args.model, "size": args.size, "keep_ratio": args.keep_ratio, "rank": RANK,
        "processes": state.num_processes, "checkpointing": True, "dtype": "bfloat16 autocast", "rows": [],
    }  # fmt: skip

    def add(row: dict[str, Any]) -> None:
        result["rows"].append(row)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if state.is_main_process:
            print(row, file=sys.stderr, flush=True)
            if args.json:
                write_atomically(args.json, json.dumps(result, indent=1) + "\n")

    for views, way in itertools.product(args.views, args.ways):
        seconds: list[float] = []
        whole, peak = _peak(device, lambda way=way, views=views, to=seconds: to.append(WAYS[way](args, views, device)))
        rate = state.num_processes / seconds[0]
        add({"views": views, "way": way, "seconds": seconds[0], "peak_gib": peak, "samples_per_second": rate, "seconds_in_all": whole})
    for text in args.calibrate:
        count, views = map(int, text.split("x"))
        add(calibrated(args, count, views, device))
    if state.num_processes > 1:
        state.wait_for_everyone()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
