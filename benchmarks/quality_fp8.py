"""What FP8 costs the trained testbed, by itself, over so many rendered scenes that a change of 1 % can be told from chance.

    python benchmarks/quality_fp8.py --seconds 150 --json benchmarks/results/h100_testbed_fp8.json

Both models are dense and see the same images: one in BF16 (autocast, as in `lite3r eval`), one with its blocks in FP8.
AUC@5 of a model whose poses are some 9 degrees off rests on few pairs of views: `lite3r eval` on 40 scenes leaves an interval
of 15 %. It takes 2,000 to 5,000 scenes for one of 2 %, so scenes are rendered and run in batches here. AbsRel needs some
tens. Scenes follow until `--scenes` or `--seconds` are reached; intervals are of 95 %, scenes drawn with replacement.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from pathlib import Path
from typing import Any

import torch

from lite3r_plugin import apply_lite3r, describe
from lite3r_plugin.config import Fp8Backend
from lite3r_plugin.scene.metrics import depth_metrics, paired_bootstrap, pose_metrics
from lite3r_plugin.scene.procedural import ProcScenes, TextureBank
from lite3r_plugin.testbed import Testbed

TEXTURES = 77_777  # their seed; training saw others
POSES = ("rotation_mean", "translation_mean", "auc5", "auc15", "auc30")


@torch.no_grad()
def measure(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, tuple[list[float], list[float]]], str]:
    """Values of BF16 and FP8 by measure, a scene each; and what runs FP8."""
    dense = Testbed.from_pretrained(device=device)
    backend: Fp8Backend = args.backend
    fp8 = apply_lite3r(Testbed.from_pretrained(device=device), keep_ratio=1, precision="fp8", fp8_backend=backend)
    scenes = ProcScenes(TextureBank.procedural(64, 64, str(device), seed=TEXTURES + args.seed), str(device), 1_000_003 * (args.seed + 1))
    values: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ("abs_rel", *POSES)}
    start, told = time.monotonic(), 0.0
    while len(values["auc5"][0]) < args.scenes and (seconds := time.monotonic() - start) < args.seconds:
        sample = scenes(args.batch, args.views, args.size, args.size)
        whole = sample["ok"].all(1)  # few scenes have a camera that finds no free place
        sample = {name: value[whole] for name, value in sample.items()}
        if not whole.any():
            continue
        for side, model in enumerate((dense, fp8)):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                out = model(sample["rgb"])
            for i, (mine, true) in enumerate(zip(out["world_to_camera"].float().cpu(), sample["w2c"].cpu(), strict=True)):
                poses = pose_metrics(mine, true)
                for name in POSES:
                    values[name][side].append(getattr(poses, name))
                if len(values["abs_rel"][side]) < args.depth_scenes:
                    depth = depth_metrics(out["depth"][i].float(), sample["depth"][i], sample["valid"][i])
                    values["abs_rel"][side].append(depth.abs_rel)
        if seconds - told > 20:
            told = seconds
            print(f"[{seconds:.0f} s] {len(values['auc5'][0])} scenes", flush=True)
    return values, ", ".join(f"{count} {kind}" for kind, count in describe(fp8).linears.items())


def summary(values: tuple[list[float], list[float]]) -> dict[str, Any]:
    """Means, and the change with its interval: as it is, and in percent of the dense mean."""
    interval = paired_bootstrap(*values)
    dense, fp8 = (sum(side) / len(side) for side in values)
    percent = [100 * x / dense for x in (interval.difference, interval.low, interval.high)]
    return dict(dense=dense, fp8=fp8, scenes=interval.scenes, change=interval.to_dict(), percent=percent)


def main() -> None:
    """Parse, measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=150, help="begin no batch after so many")
    parser.add_argument("--depth-scenes", type=int, default=400, help="scenes whose depth is measured, which takes longest")
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--backend", default="auto", help="as fp8_backend")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    values, runs = measure(args, device)
    result: dict[str, Any] = {name: summary(pair) for name, pair in values.items()}
    for name, row in result.items():
        change, low, high = row["percent"]
        print(f"{name:17} {row['dense']:8.4f} -> {row['fp8']:8.4f}: {change:+.2f} % [{low:+.2f}, {high:+.2f}] over {row['scenes']} scenes")
    result["conditions"] = dict(
        linears=runs, views=args.views, size=args.size, seed=args.seed, batch=args.batch, torch=torch.__version__,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        dtype="bfloat16 autocast" if device.type == "cuda" else "float32", date=datetime.date.today().isoformat(),
    )  # fmt: skip
    result["values"] = {
        name: [[round(x, 5) for x in side] for side in pair] for name, pair in values.items() if name in ("abs_rel", "auc5")
    }
    if args.json:
        args.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
