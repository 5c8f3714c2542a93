"""Milliseconds of a frame of StreamVGGT when it has seen many: its own code, Lite3R with dense and with sparse attention.

    python benchmarks/models/streaming.py --frames 100 --json benchmarks/results/streamvggt_518.json

A frame is a call of the aggregator with the cache of all frames before, which is where time grows; heads take the same for every frame.
All arms run in one process on the same frames, with the same random weights, in BF16 by autocast. `host` is the model as it is; `dense`
is Lite3R with ``keep_ratio=1``: keys prepared once, attention to all of them; `sparse` is Lite3R with ``--keep-ratio``. The cache is grown
frame by frame, as a user's is, and the frames behind ``--frames`` are timed one by one. `difference` is that of the last frame's tokens to
`host`, relative; of random weights it says whether the arms compute the same, and nothing of quality.

StreamVGGT (https://github.com/wzzheng/StreamVGGT) is to be importable: its ``src`` on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lite3r_plugin import apply_lite3r, describe, remove_lite3r
from lite3r_plugin.files import write_atomically
from lite3r_plugin.runtime.device import peak, release_memory, timed

ARMS: dict[str, float | None] = {"host": None, "dense": 1.0, "sparse": 0.1}
"""The keep ratio of each; None: without Lite3R."""


def build(device: torch.device) -> nn.Module:
    """StreamVGGT's aggregator in full size with random weights, the same every time."""
    from streamvggt.models.aggregator import Aggregator  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    with device:
        return Aggregator().eval()


def begin(model: Any) -> list[Any]:
    """The cache before the first frame."""
    return [None] * model.depth


def step(model: Any, frame: Tensor, past: list[Any], index: int) -> Tensor:
    """Tokens of a frame ``[1, 1, 3, H, W]`` after `index` others, whose cache `past` it writes to."""
    tokens, _, _ = model(frame, past_key_values=past, use_cache=True, past_frame_idx=index)
    return tokens[-1]


def frames(count: int, height: int, width: int, device: torch.device) -> Iterator[Tensor]:
    """Random ones, the same every time."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield torch.rand(1, 1, 3, height, width, generator=generator).to(device)


@torch.inference_mode()
def measure(model: nn.Module, count: int, repeats: int, size: tuple[int, int], device: torch.device) -> tuple[dict[str, Any], Tensor]:
    """Times of the `repeats` frames after `count` others, and the last one's tokens."""
    past, out = begin(model), torch.empty(0)
    release_memory(device)
    times = []

    def next_frame(frame: Tensor, index: int) -> None:
        nonlocal out
        out = step(model, frame, past, index)

    with torch.autocast(device.type, torch.bfloat16):
        for index, frame in enumerate(frames(count + repeats, *size, device)):
            seconds = timed(functools.partial(next_frame, frame, index), device)
            if index >= count:
                times.append(seconds * 1e3)
    memory, _ = peak(device)
    return dict(ms=statistics.median(times), least_ms=min(times), most_ms=max(times), peak_bytes=memory), out.float().cpu()


def run(args: argparse.Namespace, save: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """One record for each arm."""
    device, size = torch.device(args.device), (args.height, args.width)
    model = build(device)
    records: list[dict[str, Any]] = []
    reference = torch.empty(0)
    for arm, ratio in ARMS.items():
        ratio = args.keep_ratio if arm == "sparse" else ratio
        if ratio is not None:
            apply_lite3r(model, keep_ratio=ratio, linear_branch=args.linear_branch, dense_below=args.dense_below)
        record, out = measure(model, args.frames, args.repeats, size, device)
        reference = out if ratio is None else reference
        record |= dict(arm=arm, frames=args.frames, height=args.height, width=args.width, device=_name(device), torch=torch.__version__)
        record["difference"] = float((out - reference).norm() / reference.norm())
        record["x"] = (records[0]["ms"] if records else record["ms"]) / record["ms"]
        if ratio is not None:
            calls = [site.calls for site in describe(model).sites if site.scope == "global"]
            record |= dict(keep_ratio=ratio, sparse=sum(c.sparse for c in calls), dense=sum(c.dense for c in calls))
            record["host"] = sum(c.host for c in calls)
            remove_lite3r(model)
        records.append(record)
        print(f"{arm:8} {record['ms']:9.2f} ms a frame, x {record['x']:.2f}, difference {record['difference']:.1e}", flush=True)
        save(records)
    return records


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print, and write after every arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=100, help="frames in the cache when timing begins")
    parser.add_argument("--repeats", type=int, default=5, help="frames that are timed")
    parser.add_argument("--height", type=int, default=392)
    parser.add_argument("--width", type=int, default=518)
    parser.add_argument("--keep-ratio", type=float, default=0.1)
    parser.add_argument("--linear-branch", default="marginal", choices=("all", "marginal", "none"))
    parser.add_argument("--dense-below", type=int, default=None, help="as in Lite3RConfig: from how many keys on it is sparse")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)

    def save(records: list[dict[str, Any]]) -> None:
        if args.json is not None:
            write_atomically(args.json, json.dumps({"records": records}, indent=1) + "\n")

    return run(args, save)


if __name__ == "__main__":
    main()
