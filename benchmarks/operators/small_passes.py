"""Times the small passes around attention and FP8 products on a GPU, each against what torch does instead, and other launches of them.

    python benchmarks/operators/small_passes.py --only A --json out.json

    A   Linears of a camera head in FP32 on few rows, their weights in FP32 and in BF16
    B   the scales of FP32 products of FP8 matrices
    C   the last residual of a block
    D   norm and rotary embedding ahead of attention
    E   rows in FP8, by warps of a row
    F   the choice of blocks, by warps of a row of scores
    G   states of key blocks, and their sums over marginal blocks

CUDA graphs, in turns, medians in microseconds; each result is compared with its definition in FP64 in the same run. Each letter is done
within a minute.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from lite3r_plugin import TokenLayout, Views
from lite3r_plugin.ops.block_map import kernels as block_map
from lite3r_plugin.ops.fp8 import kernels as fp8
from lite3r_plugin.ops.qk_norm_rope import HeadNorm, naive
from lite3r_plugin.ops.qk_norm_rope import kernels as prepare
from lite3r_plugin.ops.skinny_linear import kernels as skinny
from lite3r_plugin.ops.skinny_linear import naive as definition
from lite3r_plugin.ops.skinny_linear import parts
from lite3r_plugin.ops.sla.kernels import linear as states
from lite3r_plugin.ops.sla.kernels import marginal
from lite3r_plugin.tokens.layout import token_order

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


def measure_skinny(rows: int, launches: bool, device: str) -> dict[str, Any]:
    """One iteration of a camera head: four blocks of width 2048, 805 MB of weights in FP32, 403 in BF16; inputs and sums in FP32."""
    sizes = [(6144, 2048), (2048, 2048), (8192, 2048), (2048, 8192)]
    weights = [(torch.randn(n, k, device=device) / k**0.5, torch.randn(n, device=device)) for _ in range(4) for n, k in sizes]
    stored = {"": weights, "bf16 ": [(weight.bfloat16(), bias) for weight, bias in weights]}
    xs = {k: torch.randn(rows, k, device=device) for k in (2048, 8192)}
    ways: dict[str, Callable[..., Tensor]] = {"cublas": F.linear, "ours": skinny.linear}
    ways |= {"bf16 copied, cublas": definition.linear, "bf16 ours": skinny.linear, "bf16 in parts": parts.linear}
    tried = {"": [(1, 4, 4), (2, 4, 2), (2, 4, 4), (2, 4, 8), (4, 4, 2), (4, 4, 8), (8, 4, 4)]}
    tried["bf16 "] = [*tried[""], (1, 8, 4), (2, 8, 2), (2, 8, 4), (2, 8, 8), (4, 8, 4), (4, 8, 8), (1, 16, 4)]
    for dtype, shapes in tried.items() if launches else ():
        for n, inputs, warps in shapes:  # outputs of a program, inputs and warps of a step
            launch = skinny.Launch(n, 32 * inputs * warps, warps)
            ways[f"{dtype}ours n{n} {inputs} inputs a thread warps{warps}"] = functools.partial(skinny.linear, shape=launch)

    def all_of(name: str, one: Callable[..., Tensor]) -> Callable[[], None]:
        def run() -> None:
            for weight, bias in stored["bf16 " if name.startswith("bf16 ") else ""]:
                one(xs[weight.shape[1]], weight, bias)

        return run

    runs: Runs = {name: all_of(name, one) for name, one in ways.items()}
    rounded = {k: x.bfloat16() for k, x in xs.items()}
    runs["all in bf16, cublas"] = lambda: [F.linear(rounded[w.shape[1]], w, b.bfloat16()) for w, b in stored["bf16 "]]
    found = times(runs)
    errors = {}
    for name, one in ways.items():
        weight, bias = stored["bf16 " if name.startswith("bf16 ") else ""][3]
        if name in found:
            errors[name] = error_of(one(xs[8192], weight, bias), F.linear(xs[8192].double(), weight.double(), bias.double()))
    return report(f"A. Linears of a camera head in FP32, one iteration, {rows} rows", found, errors)


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
    order = token_order(TokenLayout((Views((37, 37), views, 5),)), device) if across else None

    def ours() -> Any:
        if across:
            return prepare.prepare_qkv(q, k, v, order=order, q_norm=norm, k_norm=norm, positions=positions, rope_base=100.0)
        return prepare.norm_rope(q, k, q_norm=norm, k_norm=norm, positions=positions, rope_base=100.0)

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Any:
        if across:
            return naive.prepare_qkv(q, k, v, order=order, q_norm=norm, k_norm=norm, positions=positions, rope_base=100.0)
        return [naive.norm_rope(x, norm=norm, positions=positions, rope_base=100.0).to(v.dtype) for x in (q, k)]

    source = torch.empty((2 + across) * q.numel(), device=device, dtype=dtype)
    target = torch.empty_like(source)
    runs: Runs = {"ours": ours, "torch": lambda: torchs(q, k, v), "copy of as many bytes": lambda: target.copy_(source)}
    for together, warps in ((1, 4), (2, 4), (4, 4), (1, 8), (2, 8), (4, 8), (1, 16), (2, 16)):
        options = {"HEADS": together, "num_warps": warps}
        runs[f"ours, {together} heads, {warps} warps"] = _with_options(ours, prepare, "launch_options", options)
    found = times(runs)
    exact = torchs(q.double(), k.double(), v.double())
    errors = {
        name: max(error_of(x[:, :, : y.shape[2]], y) for x, y in zip(made, exact, strict=True))
        for name, made in (("ours", ours()), ("torch", torchs(q, k, v)))
    }
    return report(f"D. norm and rotation at {views} views, {'global' if across else 'frame'} {dtype}", found, errors)


def measure_rows(tokens: int, device: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """The four passes of a block of width 1,024, one after the other as a block has them; each result is that of one warp a row."""
    x, update = torch.randn(2, 1, tokens, 1024, device=device, dtype=dtype)
    wide = torch.randn(1, tokens, 4096, device=device, dtype=dtype)
    heads = torch.randn(1, tokens, 16, 64, device=device, dtype=dtype).transpose(1, 2)
    weight, bias, gain = torch.randn(3, 1024, device=device)
    passes: Runs = {
        "norm": lambda: fp8.layer_norm_quantize(x, weight, bias, 1e-6),
        "heads": lambda: fp8.heads_quantize(heads),
        "residual and norm": lambda: fp8.residual_norm_quantize(x, update, gain, weight, bias, 1e-6)[1],
        "gelu": lambda: fp8.gelu_quantize(wide),
    }
    chosen, repeats = fp8.warps, 20  # one alone takes less than it takes to start a graph

    def with_warps(run: Callable[[], Any], factor: int) -> Callable[[], Any]:
        def call() -> Any:
            with mock.patch.object(fp8, "warps", lambda width: min(16, factor * chosen(width))):
                for _ in range(repeats - 1):
                    run()
                return run()

        return call

    runs = {f"{name}, {factor} x": with_warps(run, factor) for name, run in passes.items() for factor in (1, 2, 4, 8)}
    errors = {}
    for name, run in runs.items():
        found, expected = run(), passes[name.rsplit(",", 1)[0]]()
        errors[name] = float(max((a.float() - b.float()).abs().max() for a, b in zip(found[:2], expected[:2], strict=True)))
    found = {name: value / repeats for name, value in times(runs).items()}
    return report(f"E. rows in FP8, {tokens} of them, warps times what is chosen, of 20 in turn", found, errors)


def _with_options(run: Callable[[], Any], module: Any, function: str, options: dict[str, int]) -> Callable[[], Any]:
    """`run` while the `function` of a `module` that chooses launches gives `options`."""

    def call() -> Any:
        with mock.patch.object(module, function, return_value=options):
            return run()

    return call


def measure_selection(views: int, device: str) -> dict[str, Any]:
    """A tenth of the key blocks of each query block of 16 heads, with the blocks of one view pinned."""
    tokens, heads = views * 1374, 16
    q_mean, k_mean = (torch.randn(1, heads, -(-tokens // block), 64, device=device) for block in (128, 64))
    kept = k_mean.shape[2] // 10

    def ours() -> Any:
        return block_map.block_map_with_bits(q_mean, k_mean, kept=kept, pinned=22)

    k = torch.randn(1, heads, tokens, 64, device=device, dtype=torch.bfloat16)

    def by_error() -> Any:
        spread = block_map.key_spread(k, tokens=tokens, scale=0.125, block_k=64)
        return block_map.block_map_with_bits(q_mean, k_mean, kept=kept, pinned=22, by_error=spread)

    runs: Runs = {"ours, and scores": ours, "scores alone": lambda: q_mean @ k_mean.mT, "by error, its variances too": by_error}
    for warps in (1, 2, 4, 8, 16):
        runs[f"{warps} warps, and scores"] = _with_options(ours, block_map, "launch_options", {"num_warps": warps})
    return report(f"F. choice of {kept} of {k_mean.shape[2]} blocks at {views} views", times(runs))


def measure_states(views: int, device: str) -> list[dict[str, Any]]:
    """States of the key blocks of 16 heads, and their sums over those that are marginal: nine of ten."""
    tokens, heads, dtype = views * 1374, 16, torch.bfloat16
    rows, columns = -(-tokens // 128), -(-tokens // 64)
    k, v = torch.randn(2, 1, heads, rows * 128, 64, device=device, dtype=dtype)
    bits = torch.randint(-(2**31), 2**31 - 1, (heads, rows, -(-columns // 32)), device=device, dtype=torch.int32)
    for _ in range(2):
        bits &= torch.randint_like(bits, -(2**31), 2**31 - 1)
    proj = torch.randn(64, 64, device=device, dtype=dtype)

    def of_blocks() -> Any:
        return states.block_states(k[0], v[0], tokens, "softmax", 64, proj=proj)

    runs: Runs = {"ours": of_blocks, "copy of as many bytes": lambda: (k.clone(), v[..., : columns * 32, :].clone())}
    for warps in (1, 2, 4, 8):
        for stages in (1, 3):
            runs[f"{warps} warps, {stages} stages"] = _with_options(
                of_blocks, states, "state_options", {"num_warps": warps, "num_stages": stages}
            )
    found = [report(f"G. states of {columns} blocks at {views} views", times(runs))]
    made = of_blocks()
    into = torch.empty(heads, rows, 64, 64, device=device, dtype=dtype), torch.empty(heads, rows, 64, device=device)

    def sums() -> None:
        marginal.marginal_sums(bits, *made, into, columns=columns, scale=1.0, transposed=False)

    runs = {"ours": sums}
    for sizes in ((128, 32, 128), (128, 64, 128), (128, 32, 256), (128, 64, 256), (64, 64, 256), (64, 32, 128), (128, 128, 128)):
        for warps in (4, 8):
            for stages in (3, 4):
                options = dict(zip(("TILE_OUT", "TILE_IN", "TILE"), sizes, strict=True)) | {"num_warps": warps, "num_stages": stages}
                runs[f"{sizes}, {warps} warps, {stages} stages"] = _with_options(sums, marginal, "sums_options", options)
    return [*found, report(f"G. sums of states at {views} views", times(runs))]


def main() -> None:
    """Measure what is asked for, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list("ABCDEFG"), default=list("ABCDEFG"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    bf16, fp32 = torch.bfloat16, torch.float32
    passes: dict[str, list[Callable[[], Any]]] = {
        "A": [functools.partial(measure_skinny, rows, rows in (2, 8), "cuda") for rows in (2, 8, 1, 4, 16, 32, 64)],
        "B": [functools.partial(measure_scale, 2748, outputs, "cuda") for outputs in (3072, 1024)],
        "C": [functools.partial(measure_residual, tokens, dtype, "cuda") for tokens, dtype in ((43968, bf16), (2748, fp32))],
        "D": [functools.partial(measure_prepare, views, across, bf16, "cuda") for across in (False, True) for views in (2, 8, 32, 100)],
        "E": [functools.partial(measure_rows, tokens, "cuda") for tokens in (2748, 10_992, 43_968)],
        "F": [functools.partial(measure_selection, views, "cuda") for views in (8, 32, 100)],
        "G": [functools.partial(measure_states, views, "cuda") for views in (8, 32, 100)],
    }
    records = []
    with torch.no_grad():
        for letter in args.only:
            for measure in passes[letter]:
                made = measure()
                records += made if isinstance(made, list) else [made]
                if args.json:
                    args.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
