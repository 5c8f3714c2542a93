"""Times the passes over feature maps of VGGT's DPT head: torch's kernels against Lite3R's, in one process on one GPU.

    python benchmarks/operators/bench_heads.py --out benchmarks/results/h200_heads.json

The maps are those of 518 x 518 pixels, in BF16 with channels side by side: each up-sampling, bias of a convolution and position embedding,
with how often the head has it; the last up-sampling adds an embedding. The head takes 8 views at a time; 32 at once is what
`frames_chunk_size=None` makes of it. Torch adds a bias after cuDNN as is timed here, and an embedding in two passes. GB/s are of the bytes
that must move, read and written once. Everything is timed as a CUDA graph of several calls, so nothing waits for Python; caches are warm,
so that small maps come from L2. One JSON line per pass, one per number of views with the sums over the head; the file holds all of them
and is rewritten after each.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from roofline import measure_peaks, queued_ms

from lite3r_plugin.ops import feature_maps
from lite3r_plugin.ops.feature_maps import naive
from lite3r_plugin.runtime.graphs import capture, warm_up

PATCHES, PIXELS = 37, 518
CALLS = 10  # in a graph


@dataclass(frozen=True)
class Pass:
    """A pass over maps ``[views, channels, size, size]``, and how often a head has it; `to` is the other size of an up-sampling."""

    kind: str
    channels: int
    size: int
    times: int
    to: int = 0

    def bytes(self, views: int, width: int) -> int:
        """What must be read and written, in numbers of `width` bytes; an embedding is small."""
        return views * self.channels * width * (self.size**2 + (self.to or self.size) ** 2)


def passes(patches: int = PATCHES, pixels: int = PIXELS) -> list[Pass]:
    """Those of VGGT's DPT head, for images of so many patches and pixels."""
    half, one, two, four, eight = (patches + 1) // 2, patches, 2 * patches, 4 * patches, 8 * patches
    ups = [Pass("upsample", 256, a, 1, b) for a, b in ((half, one), (one, two), (two, four), (four, eight))]
    ups.append(Pass("upsample+embedding", 128, eight, 1, pixels))
    projections = [(256, one, 1), (512, one, 1), (1024, one, 2)]
    resized = [(256, four, 1), (512, two, 1), (1024, half, 1)]
    fusion = [(256, half, 2), (256, one, 4 + 1), (256, two, 4 + 1), (256, four, 4 + 1), (256, eight, 1)]
    last = [(128, eight, 1), (32, pixels, 1), (2, pixels, 1)]
    biases = [Pass("bias", *sizes) for sizes in (*projections, *resized, *fusion, *last)]
    return ups + biases + [Pass("embedding", *sizes) for sizes in projections]


def calls(work: Pass, views: int, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The pass by torch, and by Lite3R."""
    x = torch.randn(views, work.channels, work.size, work.size, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    if work.kind == "upsample":
        size = (work.to, work.to)
        return lambda: naive.upsample(x, size, align_corners=True), lambda: feature_maps.upsample(x, size, align_corners=True)
    if work.kind == "bias":
        bias = torch.zeros(work.channels, device=device, dtype=dtype)  # it is added many times
        return lambda: naive.add_bias_(x, bias), lambda: feature_maps.add_bias_(x, bias)
    across, down = torch.randn(2, work.to or work.size, work.channels // 2, device=device, dtype=dtype)
    if work.to:
        size, aligned = (work.to, work.to), dict(align_corners=True)
        return (
            lambda: naive.upsample_with_embedding(x, size, across, down, **aligned),
            lambda: feature_maps.upsample_with_embedding(x, size, across, down, **aligned),
        )
    return lambda: naive.add_embedding(x, across, down), lambda: feature_maps.add_embedding(x, across, down)


def microseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median of a call."""
    if device.type != "cuda":
        return queued_ms(call, device) * 1e3

    def several() -> None:
        for _ in range(CALLS):
            call()

    warm_up(call, device)
    graph, _ = capture(several, device)
    return queued_ms(graph.replay, device, budget_ms=40) / CALLS * 1e3


@torch.no_grad()
def measurements(works: list[Pass], views: int, device: torch.device, dtype: torch.dtype, until: float) -> Iterator[dict[str, Any]]:
    """A record of each pass, and the sums over the head, of those that were begun before `until`."""
    sums, left = {"torch_ms": 0.0, "ours_ms": 0.0}, 0
    for work in works:
        if time.monotonic() > until:
            left += 1
            continue
        theirs, ours = (microseconds(call, device) for call in calls(work, views, device, dtype))
        moved = work.bytes(views, dtype.itemsize)
        sums["torch_ms"] += work.times * theirs / 1e3
        sums["ours_ms"] += work.times * ours / 1e3
        yield dict(
            views=views, kind=work.kind, channels=work.channels, size=work.size, to=work.to or work.size, times=work.times,
            torch_us=theirs, ours_us=ours, torch_gb_per_s=moved / theirs / 1e3, ours_gb_per_s=moved / ours / 1e3, speedup=theirs / ours,
        )  # fmt: skip
    yield dict(views=views, kind="head", **sums, left_out=left)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Parse, measure, print, store. Returns the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", default="8,32")
    parser.add_argument("--patches", type=int, default=PATCHES, help="along each axis of an image, 14 pixels each")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--time-budget", type=float, default=30, help="seconds after which no further pass is begun")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    start = time.monotonic()
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device(args.device)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    conditions: dict[str, Any] = dict(
        torch=torch.__version__, commit=commit, date=datetime.date.today().isoformat(), dtype=args.dtype, patches=args.patches,
        unit="µs of a call, median; ms of a head", l2="warm",
    )  # fmt: skip
    if device.type == "cuda":
        import triton

        conditions |= dict(gpu=torch.cuda.get_device_name(device), triton=triton.__version__, cuda=torch.version.cuda)
        conditions["copy_gb_per_s"] = measure_peaks(device).bytes / 1e9
    print(json.dumps(conditions, ensure_ascii=False), flush=True)
    records: list[dict[str, Any]] = []
    for views in map(int, args.views.split(",")):
        works = passes(args.patches, 14 * args.patches)
        for record in measurements(works, views, device, getattr(torch, args.dtype), start + args.time_budget):
            records.append(record)
            print(json.dumps(record), flush=True)
            if args.out:
                args.out.write_text(json.dumps(dict(conditions=conditions, records=records), indent=1) + "\n")
    return records


if __name__ == "__main__":
    main()
