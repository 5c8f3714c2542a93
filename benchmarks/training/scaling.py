"""Distillation on all GPUs beside one: samples a second at an equal batch a GPU, and the losses at an equal batch in all.

    python benchmarks/training/scaling.py --json FILE                                                  # on a machine with several GPUs
    python benchmarks/training/scaling.py --device cpu --model testbed --views 2 --size 48 --steps 3   # two processes, to see that it works

Speed is that of `step.py`, run by itself and by ``accelerate launch``. For the losses the testbed is trained twice, with the batches of
all processes in one process and then a batch a process: in FP32, where the same run is the same but for the order of sums, and in BF16.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from lite3r_plugin import DistillConfig, apply_lite3r, distill
from lite3r_plugin.adapter.plugins import find_model
from lite3r_plugin.files import write_atomically

PRECISIONS = {"float32": None, "bfloat16": "bf16"}
HERE = Path(__file__)


def curve(args: argparse.Namespace, folder: Path) -> None:
    """Train the testbed and write its losses to ``PRECISION.json`` in `folder`: one process of those that share a run."""
    from accelerate import PartialState

    state = PartialState(cpu=args.device == "cpu")
    generator = torch.Generator().manual_seed(0)
    data = [torch.rand(1, args.curve_views, 3, args.curve_size, args.curve_size, generator=generator) for _ in range(8)]
    for name, precision in PRECISIONS.items():
        model = apply_lite3r(
            find_model("testbed").build(None, state.device), keep_ratio=0.25, block_q=64, block_k=32, attention_backend=args.backend
        )
        out = folder / name
        config = DistillConfig(
            steps=args.steps, accumulate=args.processes // state.num_processes, mixed_precision=precision, output_dir=str(out),
            trackers=("jsonl",), log_every=1, learning_rate=1e-3, warmup_steps=2,
        )  # fmt: skip
        distill(model, data, config)
        if state.is_main_process:
            lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
            (folder / f"{name}.json").write_text(json.dumps([line["loss"] for line in lines if "loss" in line]))
    if state.num_processes > 1:
        state.wait_for_everyone()
        torch.distributed.destroy_process_group()


def launch(args: argparse.Namespace, processes: int, script: Path, options: list[str]) -> None:
    """Run `script` in so many processes. Raises `CalledProcessError` or `TimeoutExpired` where it does not end well, or in time."""
    environment = dict(os.environ)
    command = [sys.executable, str(script), *options]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *command[1:]]
    if args.device == "cpu":
        environment |= {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run(command, env=environment, check=True, timeout=args.seconds)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure and write. Returns what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, help="one a GPU, unless a number is given; on a CPU two")
    parser.add_argument("--model", default="vggt", help="whose speed is measured")
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--size", type=int, default=518)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="of which losses are compared")
    parser.add_argument("--curve-views", type=int, default=4)
    parser.add_argument("--curve-size", type=int, default=112)
    parser.add_argument("--backend", default="auto", help="of sparse attention, where losses are compared")
    parser.add_argument("--one", type=Path, help="what step.py wrote of one process, instead of another run")
    parser.add_argument("--seconds", type=float, default=150.0, help="that each of the four runs may take")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--curve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.processes = args.processes or (torch.cuda.device_count() if args.device == "cuda" else 2)
    if args.curve:
        curve(args, args.curve)
        return {}
    result: dict[str, Any] = {"processes": args.processes, "model": args.model, "views": args.views, "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        losses = {}
        for count in (1, args.processes):
            out = folder / f"curve{count}"
            out.mkdir()
            given = ["--curve", str(out), "--processes", str(args.processes), "--steps", str(args.steps), "--device", args.device]
            given += ["--curve-views", str(args.curve_views), "--curve-size", str(args.curve_size), "--backend", args.backend]
            launch(args, count, HERE, given)
            losses[count] = {name: json.loads((out / f"{name}.json").read_text()) for name in PRECISIONS}
        alone, together = losses[1], losses[args.processes]
        result["losses"] = losses
        result["largest_relative_difference"] = {
            name: max(abs(a - b) / a for a, b in zip(alone[name], together[name], strict=True)) for name in PRECISIONS
        }
        rates = {}
        for count in (1, args.processes):
            file = args.one if count == 1 and args.one else folder / f"speed{count}.json"
            given = ["--ways", "distill", "--model", args.model, "--views", str(args.views), "--size", str(args.size)]
            given += ["--repeats", str(args.repeats), "--device", args.device, "--json", str(file)]
            if file != args.one:
                launch(args, count, HERE.with_name("step.py"), given)
            rows = json.loads(file.read_text())["rows"]
            rates[count] = next(row for row in rows if row["way"] == "distill" and row["views"] == args.views)
        result |= {"speed": rates, "times_as_fast": rates[args.processes]["samples_per_second"] / rates[1]["samples_per_second"]}
    print(json.dumps({key: value for key, value in result.items() if key != "losses"}), file=sys.stderr, flush=True)
    if args.json:
        write_atomically(args.json, json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
