"""Times the small passes around attention and FP8 products on a GPU, each against what torch does instead, and candidates of launches.

    python benchmarks/operators/bench_small.py [--json FILE] [--quick]

CUDA graphs, in turns, medians in microseconds; each result is compared with its definition in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lite3r_plugin.ops.fp8 import kernels as fp8
from lite3r_plugin.ops.qk_norm_rope import HeadNorm
from lite3r_plugin.ops.qk_norm_rope import kernels as prepare
from lite3r_plugin.ops.skinny_linear import kernels as skinny

Runs = dict[str, Callable[[], Any]]


def times(runs: Runs, rounds: int = 9) -> dict[str, float]:
    """Median microseconds of each, replayed in turns."""
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    found: dict[str, list[float]] = {}
    for name, run in runs.items():
        try:
            for _ in range(2):
                run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            graphs[name], found[name] = graph, []
        except Exception as error:
            print(f"  {name} did not run: {type(error).__name__}: {str(error).splitlines()[:1]}")
    for turn in range(rounds + 2):
        for name, graph in graphs.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            if turn > 1:
                found[name].append(start.elapsed_time(stop) * 1000)
    return {name: statistics.median(values) for name, values in found.items()}


def report(title: str, found: dict[str, float], errors: dict[str, float] | None = None) -> dict[str, Any]:
    print(f"\n{title}", flush=True)
    for name, value in sorted(found.items(), key=lambda item: item[1]):
        error = "" if errors is None or name not in errors else f"   error {errors[name]:.2e}"
        print(f"  {value:9.1f} us  {name}{error}", flush=True)
    return {"title": title, "us": found, "errors": errors or {}}


def error_of(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def measure_skinny(rows: int, device: str) -> dict[str, Any]:
    """One iteration of a camera head: four blocks of width 2048, 805 MB of weights."""
    sizes = [(6144, 2048), (2048, 2048), (8192, 2048), (2048, 8192)]
    weights = [(torch.randn(n, k, device=device) / k**0.5, torch.randn(n, device=device)) for _ in range(4) for n, k in sizes]
    xs = {k: torch.randn(rows, k, device=device) for k in (2048, 8192)}

    def all_of(one: Callable[..., Tensor]) -> Callable[[], None]:
        def run() -> None:
            for weight, bias in weights:
                one(xs[weight.shape[1]], weight, bias)

        return run

    runs: Runs = {"cublas": all_of(F.linear), "ours": all_of(skinny.linear)}
    tried: dict[str, skinny.Launch] = {}
    if rows <= 8:
        for n, warps in ((1, 4), (2, 2), (2, 4), (2, 8), (4, 2), (4, 4), (4, 8), (8, 4)):
            tried[f"lanes n{n} warps{warps}"] = skinny.Launch(n, 128 * warps, warps)
    if rows >= 8:
        block_m = min(64, max(16, 1 << (rows - 1).bit_length()))
        for n, k, warps, stages in (
            (32, 32, 2, 3),
            (64, 32, 2, 3),
            (64, 32, 4, 3),
            (64, 16, 4, 4),
            (64, 32, 4, 4),
            (128, 16, 4, 4),
            (128, 32, 8, 3),
        ):
            for parts in (4, 8, 16):
                tried[f"blocks m{block_m} n{n} k{k} warps{warps} stages{stages} parts{parts}"] = skinny.Launch(
                    n, k, warps, block_m, parts, stages
                )
    for name, launch in tried.items():
        runs[name] = all_of(lambda x, w, b, launch=launch: skinny.linear(x, w, b, launch))
    found = times(runs)
    weight, bias = weights[3]
    expected = F.linear(xs[8192].double(), weight.double(), bias.double())
    errors = {name: error_of(skinny.linear(xs[8192], weight, bias, launch), expected) for name, launch in tried.items() if name in found}
    errors |= {
        "cublas": error_of(F.linear(xs[8192], weight, bias), expected),
        "ours": error_of(skinny.linear(xs[8192], weight, bias), expected),
    }
    return report(f"A. FP32 Linears of a camera head, one iteration, {rows} rows", found, errors)


def measure_scale(tokens: int, outputs: int, device: str) -> dict[str, Any]:
    products, row, column, bias = (
        torch.randn(*shape, device=device) for shape in ((tokens, outputs), (tokens, 1), (outputs, 1), (outputs,))
    )
    runs: Runs = {"torch": lambda: products.mul_(row).mul_(column.t()).add_(bias)}
    launches = {f"ours {block}": block for block in ((1, 1024, 4), (2, 1024, 4), (4, 1024, 4), (4, 1024, 8), (8, 512, 4), (1, 512, 2))}
    for name, block in launches.items():
        runs[name] = lambda block=block: fp8._scale_products(products, row, column, bias, block)
    found = times(runs)
    given = torch.randn(tokens, outputs, device=device)
    expected = given.double() * row * column.t() + bias
    errors = {"torch": error_of(given * row * column.t() + bias, expected)}
    for name in list(runs)[1:]:
        errors[name] = error_of(fp8._scale_products(given.clone(), row, column, bias, launches[name]), expected)
    return report(f"B. scales of FP32 products [{tokens}, {outputs}]", found, errors)


def measure_residual(tokens: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    x, gain = torch.randn(1, tokens, 1024, device=device), torch.randn(1024, device=device)
    update = torch.randn(1, tokens, 1024, device=device, dtype=dtype)
    x, gain = (x, gain) if dtype == torch.float32 else (x.to(dtype), gain.to(dtype))
    expected = torch.addcmul(x.double(), update.double(), gain.double())
    runs: Runs = {"torch": lambda: torch.addcmul(x, update, gain)}
    for block in ((1, 1), (1, 2), (1, 4), (2, 2), (2, 4), (4, 4), (4, 8)):
        runs[f"ours {block}"] = lambda block=block: fp8._residual(x, update, gain, block)
    runs["copy of as many bytes"] = lambda: x.clone().add_(1)
    found = times(runs)
    errors = {name: error_of(run(), expected) for name, run in runs.items() if name != "copy of as many bytes"}
    return report(f"C. last residual [{tokens}, 1024] {dtype}", found, errors)


def measure_prepare(views: int, across: bool, dtype: torch.dtype, device: str) -> dict[str, Any]:
    tokens, heads, dim = 1374, 16, 64
    batch, tokens = (1, views * tokens) if across else (views, tokens)
    qkv = torch.randn(batch, tokens, 3, heads, dim, device=device, dtype=dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    positions = torch.randint(0, 38, (batch, tokens, 2), device=device)
    norm = HeadNorm("layer", torch.randn(dim, device=device), torch.randn(dim, device=device), 1e-5)
    order = torch.randperm(tokens, device=device) if across else None
    block = 128 if across else 64
    blocks = -(-tokens // block)

    def made(tried: dict[str, Any] | None) -> Any:
        if not across:
            out = [torch.empty_like(q, memory_format=torch.contiguous_format) for _ in range(2)]
            prepare._launch(q, k, None, None, norm, norm, positions, 100.0, out, None, block, 64, tried=tried)
            return out
        out = [torch.empty(batch, heads, blocks * block, dim, device=device, dtype=dtype) for _ in range(3)]
        means = [torch.empty(batch, heads, count, dim, device=device) for count in (blocks, -(-tokens // 64), -(-tokens // 64))]
        prepare._launch(q, k, v, order, norm, norm, positions, 100.0, out, means, block, 64, tried=tried)
        return out

    tried: dict[str, dict[str, Any] | None] = {"before": None}
    for trig in (1, 3, 2):
        for part in (1, 2, 4):
            for warps in (4, 8):
                tried[f"trig{trig} heads{part} warps{warps}"] = dict(TRIG=trig, HEADS=part, num_warps=warps)
    tried["trig0 heads2 warps8"] = dict(HEADS=2, num_warps=8)
    runs: Runs = {name: (lambda options=options: made(options)) for name, options in tried.items()}
    source = torch.empty((2 + across) * q.numel(), device=device, dtype=dtype)
    target = torch.empty_like(source)
    runs["copy of as many bytes"] = lambda: target.copy_(source)
    found = times(runs)
    expected = torch.cat([x.flatten() for x in made(None)])
    errors = {name: error_of(torch.cat([x.flatten() for x in made(options)]), expected) for name, options in tried.items()}
    return report(f"D. prepare at {views} views, {'global' if across else 'frame'} {dtype}", found, errors)


def main() -> None:
    """Measure all, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    records = []
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float32):
            records.append(measure_residual(43968 if dtype == torch.bfloat16 else 2748, dtype, "cuda"))
        records.append(measure_scale(2748, 3072, "cuda"))
        records.append(measure_scale(2748, 1024, "cuda"))
        for across in (False, True):
            records.append(measure_prepare(32, across, torch.bfloat16, "cuda"))
        for rows in (2, 1, 4, 8, 16, 32, 64):
            records.append(measure_skinny(rows, "cuda"))
            if args.json:
                args.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
