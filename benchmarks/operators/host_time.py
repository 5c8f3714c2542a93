"""Microseconds of Python that eager code takes on a GPU, at 2 views of VGGT-L's sizes: the operator, a site, a block in BF16 and in FP8.

    python benchmarks/operators/host_time.py --json out.json

Calls are queued and waited for only at the end. `host` is until the last is queued, `wall` until the GPU is done; where both are the same,
Python is what takes the time. Blocks are those of the testbed's aggregator in VGGT-L's width, with random weights; the convolutions before
them count in. It is done within half a minute.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lite3r_plugin import apply_lite3r, convert
from lite3r_plugin.ops.qk_norm_rope import HeadNorm
from lite3r_plugin.ops.sla import sparse_linear_attention
from lite3r_plugin.testbed import Testbed, TestbedConfig

WIDTH, HEAD_DIM, DEPTH, SIDE = 1024, 64, 4, 37  # of VGGT-L, but for the depth; patches along a side of an image
SPECIAL, VIEWS = 5, 2


def measure(call: Callable[[], Any], count: int, device: torch.device, rounds: int = 7, repeats: int = 10) -> dict[str, float]:
    """Median microseconds for each of the `count` things that a call does."""
    for _ in range(3):
        call()
    host, wall = [], []
    for _ in range(rounds):
        _wait(device)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        host.append(time.perf_counter() - start)
        _wait(device)
        wall.append(time.perf_counter() - start)
    return {name: statistics.median(times) / (repeats * count) * 1e6 for name, times in (("host", host), ("wall", wall))}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def operator(device: torch.device) -> Callable[[], Any]:
    """The whole operator on all tokens of both views, as a site calls it."""
    tokens, heads = VIEWS * (SIDE * SIDE + SPECIAL), WIDTH // HEAD_DIM
    q, k, v = torch.randn(1, tokens, 3, heads, HEAD_DIM, device=device).to(torch.bfloat16).permute(2, 0, 3, 1, 4)
    norm = HeadNorm("layer", torch.ones(HEAD_DIM, device=device), torch.zeros(HEAD_DIM, device=device), 1e-5)
    positions, order = torch.randint(0, SIDE, (1, tokens, 2), device=device), torch.randperm(tokens, device=device).int()
    options: dict[str, Any] = dict(
        order=order, pinned_tokens=VIEWS * SPECIAL, q_norm=norm, k_norm=norm, positions=positions, rope_base=100.0
    )
    proj = torch.zeros(HEAD_DIM, HEAD_DIM, device=device)
    return lambda: sparse_linear_attention(q, k, v, keep_ratio=0.1, linear="all", proj=proj, block_means=True, **options)


def aggregator(device: torch.device, **options: Any) -> Any:
    """The testbed's aggregator in BF16, with Lite3R if there are options."""
    torch.manual_seed(0)
    config = TestbedConfig(dim=WIDTH, head_dim=HEAD_DIM, depth=DEPTH, mlp_ratio=4, registers=SPECIAL - 1)
    model = Testbed(config).to(device, torch.bfloat16).eval().requires_grad_(False)
    precision = options.pop("precision", "full")
    if options:
        apply_lite3r(model, **options)
    if precision == "fp8":
        convert(model)
    return model.aggregator


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.device(args.device)
    records: dict[str, dict[str, float]] = {}
    lite3r: dict[str, Any] = dict(keep_ratio=0.1, dense_below=0)
    with torch.inference_mode():
        records["operator"] = measure(operator(device), 1, device)
        for name, options in (
            ("stock block", {}),
            ("block with fused sites", lite3r),
            ("FP8 block", lite3r | {"precision": "fp8", "fp8_filter": ("*",)}),
        ):
            made = aggregator(device, **options)
            side = SIDE * made.patch_size
            images = torch.rand(1, VIEWS, 3, side, side, device=device, dtype=torch.bfloat16)
            records[name] = measure(lambda made=made, images=images: made(images), 2 * DEPTH, device)
            if name == "block with fused sites":
                site = made.frame_blocks[0].attn
                x = torch.randn(VIEWS, SIDE * SIDE + SPECIAL, WIDTH, device=device, dtype=torch.bfloat16)
                positions = torch.randint(0, SIDE, (*x.shape[:2], 2), device=device)
                records["dense site with fused norm and rotation"] = measure(lambda site=site, x=x, p=positions: site(x, pos=p), 1, device)
    for name, found in records.items():
        print(f"{name:42s} host {found['host']:8.1f} us   wall {found['wall']:8.1f} us")
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
