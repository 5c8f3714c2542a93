"""Times FP8 on VGGT's sizes, in one process on one GPU: passes, Linears, and the whole MLP, against BF16 and peers.

    python benchmarks/operators/bench_fp8.py --json benchmarks/results/h100_fp8.json

Whole MLP: LayerNorm, 1024 -> 4096, GELU, 4096 -> 1024, its quantisation included. BF16 is what is fastest of eager,
torch.compile and torch.compile with autotuned matrix products (GELU in their epilogue); ours is what a converted block
runs. Peers: TransformerEngine's LayerNormMLP with current scaling and cached FP8 weights, and torchao's row-wise dynamic
float8, compiled, autotuned too; each where it can be imported. Everything is timed as a CUDA graph, so nothing waits for
Python, and in turns, so that all see the same clocks. Inputs are random normal; caches are warm. The report is written
after every record.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib
import json
import math
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor, nn

from lite3r_plugin.costs.linear import fp8_pays
from lite3r_plugin.fp8.block import mlp
from lite3r_plugin.fp8.linear import Fp8Linear
from lite3r_plugin.ops.fp8 import kernels

CHANNELS, HIDDEN = 1024, 4096
# What `mode="max-autotune-no-cudagraphs"` does to matrix products; it tunes pointwise kernels step by step besides, for a minute.
AUTOTUNED: dict[str, Any] = {"max_autotune": True, "max_autotune_gemm_backends": "ATEN,TRITON", "epilogue_fusion": True}
Runs = dict[str, Callable[[], Any]]


def graphed(run: Callable[[], Any], repeats: int) -> torch.cuda.CUDAGraph:
    """A graph of `repeats` calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run()
    return graph


def times(runs: Runs, rounds: int = 15) -> tuple[dict[str, float], dict[str, str]]:
    """Median milliseconds of a call of each, measured in turns; and why others could not run."""
    graphs, failed, repeats = {}, {}, {}
    for name, run in runs.items():
        try:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            for _ in range(2):
                run()
            start.record()
            run()
            stop.record()
            torch.cuda.synchronize()
            repeats[name] = max(1, min(20, int(4 / max(start.elapsed_time(stop), 0.05))))
            graphs[name] = graphed(run, repeats[name])
        except Exception as error:  # a peer that fails must not take the rest with it
            failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    measured: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            graph.replay()
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            measured[name].append(start.elapsed_time(stop) / repeats[name])
    return {name: statistics.median(values) for name, values in measured.items()}, failed


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def measure_passes(tokens: int) -> dict[str, Any]:
    """GB/s of each pass, and as a share of those of a copy of as many bytes."""
    x, wide, norm = random(1, tokens, CHANNELS), random(1, tokens, HIDDEN), nn.LayerNorm(CHANNELS, device="cuda", dtype=torch.bfloat16)
    update, gain = random(1, tokens, CHANNELS), random(CHANNELS)
    heads = random(1, tokens, 16, 64).transpose(1, 2)
    small, large = 3 * x.numel() + 4 * tokens, 3 * wide.numel() + 4 * tokens
    runs: dict[str, tuple[int, Callable[[], Any]]] = {
        "quantize 1024": (small, lambda: kernels.quantize(x)),
        "quantize 4096": (large, lambda: kernels.quantize(wide)),
        "LayerNorm": (small, lambda: kernels.layer_norm_quantize(x, norm.weight, norm.bias, norm.eps)),
        "residual + LayerNorm": (
            7 * x.numel() + 4 * tokens,
            lambda: kernels.residual_norm_quantize(x, update, gain, norm.weight, norm.bias, norm.eps),
        ),
        "GELU": (large, lambda: kernels.gelu_quantize(wide)),
        "SwiGLU": (5 * wide.numel() // 2 + 4 * tokens, lambda: kernels.swiglu_quantize(wide)),
        "heads": (small, lambda: kernels.heads_quantize(heads)),
    }
    copies: Runs = {}
    for size in {size for size, _ in runs.values()}:
        source = torch.empty(size // 2, device="cuda", dtype=torch.uint8)
        target = torch.empty_like(source)
        copies[f"copy {size}"] = lambda source=source, target=target: target.copy_(source)
    found, failed = times({name: run for name, (_, run) in runs.items()} | copies)
    result: dict[str, Any] = {"tokens": tokens, "failed": failed}
    for name, (size, _) in runs.items():
        if name in found:
            rate, copied = size / found[name] / 1e6, size / found[f"copy {size}"] / 1e6
            result[name] = dict(ms=found[name], gb_per_s=rate, copy_gb_per_s=copied, share=rate / copied)
    return result


def measure_linears(tokens: int) -> Iterator[dict[str, Any]]:
    """BF16 against FP8 for single Linears, their input in FP8 already or not; and what `runtime.fp8_pays` says."""
    for inputs, outputs in ((1024, 3072), (1024, 1024), (1024, 4096), (4096, 1024)):
        linear = nn.Linear(inputs, outputs, device="cuda", dtype=torch.bfloat16)
        fp8, light = Fp8Linear.quantized(linear, "scaled_mm"), Fp8Linear.quantized(linear, "weight_only")
        x = random(tokens, inputs)
        rows = kernels.quantize(x)
        found, failed = times(
            {
                "bf16": lambda linear=linear, x=x: linear(x),
                "fp8 fused": lambda fp8=fp8, rows=rows: fp8(rows),
                "fp8": lambda fp8=fp8, x=x: fp8(x),
                "weight_only": lambda light=light, x=x: light(x),
            },
            rounds=9,
        )
        pays = {f: fp8_pays(x.device, tokens, inputs, outputs, fused=f == "fp8 fused") for f in ("fp8 fused", "fp8")}
        yield dict(tokens=tokens, inputs=inputs, outputs=outputs, ms=found, pays=pays, failed=failed)


def measure_mlp(tokens: int, autotune: bool) -> dict[str, Any]:
    """The whole MLP. `autotune`: with matrix products chosen by measuring, in BF16 and in torchao."""
    start = time.monotonic()
    torch._dynamo.reset()  # it compiles one forward for so many modules only, and then runs eager ones
    x = random(1, tokens, CHANNELS)
    layers = [nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, CHANNELS)]
    dense = nn.Sequential(*layers).cuda().bfloat16().requires_grad_(False).eval()
    norm, first, _, second = dense
    up, down = (Fp8Linear.quantized(linear, "scaled_mm") for linear in (first, second))  # pyright: ignore[reportArgumentType]

    def ours() -> Tensor:
        rows = kernels.layer_norm_quantize(x, norm.weight, norm.bias, norm.eps, up.infinities)  # pyright: ignore[reportArgumentType]
        return mlp(rows, up, down, "gelu")

    runs: Runs = {"bf16 eager": lambda: dense(x)}
    plain = torch.compile(copy.deepcopy(dense), dynamic=False)
    runs["bf16 compiled"] = lambda: plain(x)
    if autotune:
        tuned = torch.compile(copy.deepcopy(dense), dynamic=False, options=AUTOTUNED)
        runs["bf16 autotuned"] = lambda: tuned(x)
    runs["ours"] = ours
    failed: dict[str, str] = {}
    peers: Runs = {"torchao": lambda: _torchao(dense, x), "te": lambda: _te(dense, x)}
    if autotune:
        peers["torchao autotuned"] = lambda: _torchao(dense, x, AUTOTUNED)
    for name, make in peers.items():
        try:
            runs[name] = make()
        except Exception as error:  # not installed, or broken in one of many ways
            failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    found, more = times(runs)
    reference = dense.float()(x.float())
    errors = {name: ((runs[name]().float() - reference).norm() / reference.norm()).item() for name in found if not name.startswith("bf16")}
    bf16 = min((n for n in found if n.startswith("bf16")), key=found.__getitem__)
    if not autotune:
        failed["bf16 autotuned"] = "left out"
    return dict(
        tokens=tokens, ms=found, errors=errors, failed=failed | more, best_bf16=bf16, speedup=found[bf16] / found["ours"],
        seconds=time.monotonic() - start,
    )  # fmt: skip


def _torchao(dense: nn.Module, x: Tensor, options: dict[str, Any] | None = None) -> Callable[[], Any]:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    model = copy.deepcopy(dense)
    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    compiled = torch.compile(model, dynamic=False, options=options)
    return lambda: compiled(x)


def _te(dense: nn.Module, x: Tensor) -> Callable[[], Any]:
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8CurrentScaling

    recipe = Float8CurrentScaling()
    with torch.no_grad(), te.quantized_model_init(enabled=True, recipe=recipe):
        model = te.LayerNormMLP(CHANNELS, HIDDEN, eps=1e-5, params_dtype=torch.bfloat16, device="cuda").eval()
        for name, source in zip(
            ("layer_norm_weight", "layer_norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"), dense.parameters(), strict=True
        ):
            getattr(model, name).copy_(source)
    rows = x.flatten(0, 1)
    padded = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % 16))

    def run() -> Tensor:
        with te.autocast(enabled=True, recipe=recipe):
            return model(padded)[: len(rows)][None]

    return run


def _version(package: str) -> str | None:
    """Of the imported package; None where it cannot be imported."""
    try:
        return importlib.import_module(package).__version__
    except Exception:  # a broken installation fails in many ways
        return None


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    for record in result["passes"]:
        print(f"\npasses at {record['tokens']} tokens: GB/s (share of a copy of as many bytes)")
        for name, value in record.items():
            if isinstance(value, dict) and "share" in value:
                print(f"  {name:22} {value['gb_per_s']:7.0f}  ({value['share']:.2f})")
    print("\nLinears, ms")
    for record in result["linears"]:
        cells = "  ".join(f"{name} {value:.4f}" for name, value in record["ms"].items())
        print(f"  {record['tokens']:6} x {record['inputs']} -> {record['outputs']}: {cells}  pays: {record['pays']}")
    for record in result["mlp"]:
        print(f"\nMLP at {record['tokens']} tokens, ms (relative error): {record['speedup']:.2f} x {record['best_bf16']}")
        for name, value in sorted(record["ms"].items(), key=lambda item: item[1]):
            error = record["errors"].get(name)
            print(f"  {name:22} {value:.4f}" + ("" if error is None else f"  ({error:.3f})"))
    for record in (*result["passes"], *result["linears"], *result["mlp"]):
        for name, reason in record["failed"].items():
            print(f"  {record['tokens']} tokens, {name} did not run: {reason}")


def main() -> None:
    """Parse, measure, print, store after each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="2748,10992,43968")
    parser.add_argument("--no-autotune", action="store_true", help="leave out what is autotuned")
    parser.add_argument("--autotune-until", type=float, default=math.inf, help="autotune nothing for sizes begun after so many seconds")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    conditions = dict(
        gpu=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__, cuda=torch.version.cuda, commit=commit,
        date=datetime.date.today().isoformat(), channels=CHANNELS, hidden=HIDDEN, dtype="bfloat16", unit="ms, median, CUDA graphs",
        weights="random normal", l2="warm", autotuned=AUTOTUNED, te=_version("transformer_engine"), torchao=_version("torchao"),
    )  # fmt: skip
    result: dict[str, Any] = dict(conditions=conditions, passes=[], linears=[], mlp=[])
    start = time.monotonic()

    def store(kind: str, record: dict[str, Any]) -> None:
        result[kind].append(record)
        print(f"[{time.monotonic() - start:.0f} s] {kind} at {record['tokens']} tokens", flush=True)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")

    with torch.no_grad():
        sizes = [int(tokens) for tokens in args.tokens.split(",")]
        for tokens in sizes:
            store("mlp", measure_mlp(tokens, not args.no_autotune and time.monotonic() - start < args.autotune_until))
        for tokens in sizes:
            store("passes", measure_passes(tokens))
            for record in measure_linears(tokens):
                store("linears", record)
    show(result)


if __name__ == "__main__":
    main()
