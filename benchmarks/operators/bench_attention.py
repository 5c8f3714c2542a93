"""Times attention alone, whole operators on the same tensors in one process: dense SDPA, peers, ours; with a roofline.

    python benchmarks/operators/bench_attention.py --json benchmarks/results/h100_operator_keep0.1.json

"ours" is all that a model pays: ordering, pooling, block map, sparse softmax with block means, linear branch, Proj. Times
are of calls in a queue (`fwd`), and of a CUDA graph of the forward pass (`graph`); `bwd` is the backward pass of training
steps in a queue. `least` is what matrix units, exponential units and memory would need by themselves at the peaks
that are measured in the same run. Peers that are not importable are left out, and said so: see benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from contestants import METHODS, Contestant, Problem, make_problem
from roofline import Peaks, in_turn_ms, measure_peaks, queued_ms
from torch import Tensor

from lite3r_plugin.errors import short
from lite3r_plugin.runtime.graphs import capture

HEADINGS = (
    "tokens",
    "method",
    "fwd ms",
    "graph",
    "bwd",
    "x fastest dense",
    "TFLOP/s",
    "of matmul",
    "of copy",
    "least: matmul/exp/memory",
    "bound by",
    "error",
)


def measure(contestant: Contestant, p: Problem, peaks: Peaks | None, backward: bool, references: dict[str, Tensor]) -> dict[str, Any]:
    """All that is measured of one method."""
    device = p.q.device
    record: dict[str, Any] = dict(method=contestant.name)

    def timed(call: Any) -> float:
        return queued_ms(call, device) * contestant.times

    with torch.no_grad():
        out = contestant.run()
        if contestant.same_as is not None:
            reference = references.setdefault(contestant.same_as, out)
            record["error"] = float((out.float() - reference.float()).norm() / reference.float().norm())
        record["forward_ms"] = timed(contestant.run)
        if contestant.graph and device.type == "cuda":
            try:
                graph, _ = capture(contestant.run, device)
                record["graph_ms"] = timed(graph.replay)
                del graph
            except Exception as error:  # whatever cannot be captured is a result
                record["graph_failure"] = short(error, 100)
    if backward and contestant.learns:
        grad = torch.randn(out.shape, device=device).to(out.dtype)
        step = in_turn_ms(contestant.run, lambda out: torch.autograd.grad(out, contestant.learns, grad), device)
        record["training_forward_ms"], record["backward_ms"] = (ms * contestant.times for ms in step)
    if peaks is not None:
        ms = min(record["forward_ms"], record.get("graph_ms", record["forward_ms"]))
        work = contestant.forward
        record |= dict(flops=work.flops, exps=work.exps, bytes=work.bytes, least_ms=peaks.least_ms(work))
        record |= dict(
            tflops=work.flops / ms / 1e9, of_matmul=work.flops / ms * 1e3 / peaks.flops, of_copy=work.bytes / ms * 1e3 / peaks.bytes
        )
        record["bound_by"] = peaks.bound(work, ms, record["forward_ms"])
        if contestant.backward is not None and "backward_ms" in record:
            record["backward_least_ms"] = peaks.least_ms(contestant.backward)
    return record


def measurements(p: Problem, methods: list[str], peaks: Peaks | None, backward: bool, deadline: float) -> Iterator[dict[str, Any]]:
    """One record for each method; with a reason where there is no time."""
    references: dict[str, Tensor] = {}
    for name in methods:
        if time.monotonic() > deadline:
            yield dict(method=name, reason="the time budget is used up")
            continue
        try:
            for contestant in METHODS[name](p):
                yield measure(contestant, p, peaks, backward, references)
        except ImportError as error:
            yield dict(method=name, reason=f"not importable: {error}")
        except Exception as error:  # out of memory, a kernel that fails: a result
            yield dict(method=name, reason=short(error, 150))
        if p.q.is_cuda:
            torch.cuda.empty_cache()


def row(record: dict[str, Any], dense_ms: float | None) -> list[str]:
    """The record as cells under HEADINGS."""

    def number(key: str, form: str = ".3f", scale: float = 1) -> str:
        return format(record[key] * scale, form) if key in record else "-"

    cells = [str(record["tokens"]), record["method"]]
    if "reason" in record:
        return [*cells, record["reason"]]
    ms = min(record["forward_ms"], record.get("graph_ms", record["forward_ms"]))
    least = "/".join(f"{ms:.3f}" for ms in record["least_ms"].values()) if "least_ms" in record else "-"
    return [
        *cells, number("forward_ms"), number("graph_ms"), number("backward_ms"), f"{dense_ms / ms:.2f}" if dense_ms else "-",
        number("tflops", ".0f"), number("of_matmul", ".0f", 100) + "%", number("of_copy", ".0f", 100) + "%", least,
        record.get("bound_by", "-"), number("error", ".1e"),
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Parse, measure, print, store. Returns the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="2748,10992,43968,137400", help="1374 is one view of 518 x 518 pixels")
    parser.add_argument("--keep-ratio", type=float, default=0.1)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--methods", default="dense,ours,sla,flex,saf3r")
    parser.add_argument("--no-backward", action="store_true")
    parser.add_argument("--time-budget", type=float, default=80, help="seconds after which no further method is begun")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    start = time.monotonic()
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device(args.device)
    peaks = measure_peaks(device) if device.type == "cuda" else None
    conditions: dict[str, Any] = dict(
        torch=torch.__version__, dtype=args.dtype, heads=args.heads, head_dim=args.head_dim, unit="ms, median"
    )
    if peaks is not None:
        import triton

        conditions |= dict(gpu=torch.cuda.get_device_name(device), triton=triton.__version__, cuda=torch.version.cuda)
        conditions["peaks"] = dict(tflops=peaks.flops / 1e12, texps=peaks.exps / 1e12, copy_gb_s=peaks.bytes / 1e9)
    print(json.dumps(conditions))
    print(" | ".join(HEADINGS))
    records: list[dict[str, Any]] = []
    for tokens in map(int, args.tokens.split(",")):
        p = make_problem(tokens, args.heads, args.head_dim, args.keep_ratio, device, getattr(torch, args.dtype))
        dense_ms: float | None = None
        for record in measurements(p, args.methods.split(","), peaks, not args.no_backward, start + args.time_budget):
            record |= dict(tokens=tokens, keep_ratio=args.keep_ratio)
            if record["method"].startswith("SDPA"):
                dense_ms = min(dense_ms or float("inf"), *(record[k] for k in ("forward_ms", "graph_ms") if k in record))
            records.append(record)
            print(" | ".join(row(record, dense_ms)), flush=True)
            if args.json:  # rewritten after each, so that a run that is cut off leaves what it has
                args.json.write_text(json.dumps(dict(conditions=conditions, records=records), indent=1) + "\n")
        del p
    print(f"{time.monotonic() - start:.0f} s")
    return records


if __name__ == "__main__":
    main()
