"""Two checkouts of this repository side by side on one GPU: the operator, its training step, the FP8 MLP, whole VGGT as a CUDA graph.

    python benchmarks/operators/compare_checkouts.py OLD NEW --rounds 4 --json out.json

Each round runs a process for the one and then for the other, so that both see the same clocks. Only what both have under the same
public names is timed. VGGT is timed where its library is importable.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def graphed(call: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds of replays of `call` as a CUDA graph, each started on an idle GPU."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return timed(graph.replay, repeats)


def timed(call: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds of `call`, each started on an idle GPU."""
    import torch

    times = []
    for i in range(repeats + 2):
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        if i >= 2:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def measure() -> dict[str, float]:
    """Milliseconds by what was timed, of the package that is first on the path."""
    import torch

    from lite3r_plugin import apply_lite3r, remove_lite3r
    from lite3r_plugin.ops.sla import sparse_linear_attention

    found: dict[str, float] = {}
    torch.manual_seed(0)
    proj = torch.randn(64, 64, device="cuda") * 0.02
    options: dict[str, Any] = dict(keep_ratio=0.1, linear="marginal", block_means=True, proj=proj)
    for tokens in (2748, 10_992, 43_968):
        q, k, v = torch.randn(3, 1, 16, tokens, 64, device="cuda", dtype=torch.bfloat16).unbind(0)
        with torch.no_grad():
            found[f"operator {tokens}, graph"] = graphed(lambda q=q, k=k, v=v: sparse_linear_attention(q, k, v, **options), 30)
            found[f"operator {tokens}, eager"] = timed(lambda q=q, k=k, v=v: sparse_linear_attention(q, k, v, **options), 50)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]

        def step(leaves: list[Any] = leaves) -> None:
            torch.autograd.grad(sparse_linear_attention(*leaves, **options).sum(), leaves)

        found[f"forward and backward {tokens}"] = timed(step, 20)
    try:
        from vggt.models.vggt import VGGT  # pyright: ignore[reportMissingImports]
    except ImportError:
        return found
    with torch.device("cuda"):
        model = VGGT(enable_point=False, enable_track=False)
    model = model.cuda().eval().bfloat16().requires_grad_(False)  # what the model keeps outside of tables is made on the CPU
    for precision in ("full", "fp8"):  # the second cannot be taken out again
        net = apply_lite3r(model.aggregator, keep_ratio=0.1, precision=precision)
        for views in (2, 8, 24):
            images = torch.rand(1, views, 3, 518, 518, device="cuda", dtype=torch.bfloat16)
            with torch.no_grad():
                found[f"VGGT aggregator, {views} views, {precision}, eager"] = timed(lambda images=images, net=net: net(images), 10)
                try:
                    found[f"VGGT aggregator, {views} views, {precision}, graph"] = graphed(lambda images=images, net=net: net(images), 10)
                except RuntimeError as error:
                    print(f"no graph: {error}"[:300], file=sys.stderr)
                    torch.cuda.synchronize()
        if precision == "full":
            remove_lite3r(net)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", action="store_true")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure()))
        return
    results: dict[str, dict[str, list[float]]] = {"old": {}, "new": {}}
    table: dict[str, Any] = {}
    for _ in range(args.rounds):
        for which in ("old", "new"):
            root = getattr(args, which).resolve()
            environment = dict(os.environ)
            environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "adapters"), environment.get("PYTHONPATH", "")])
            command = [sys.executable, __file__, ".", ".", "--worker"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            for name, value in json.loads(done.stdout.splitlines()[-1]).items():
                results[which].setdefault(name, []).append(value)
        table = summarize(results)
        if args.json:
            args.json.write_text(json.dumps(table, indent=1) + "\n")
    for name, row in table.items():
        print(f"{name:45s} {row['old_ms']:9.3f} {row['new_ms']:9.3f}  {row['ratio']:.3f}")


def summarize(results: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Medians over rounds and their ratio, of what both checkouts have."""
    table = {}
    for name in results["old"].keys() & results["new"].keys():
        old, new = (statistics.median(results[which][name]) for which in ("old", "new"))
        table[name] = {"old_ms": old, "new_ms": new, "ratio": new / old, "old": results["old"][name], "new": results["new"][name]}
    return dict(sorted(table.items()))


if __name__ == "__main__":
    main()
