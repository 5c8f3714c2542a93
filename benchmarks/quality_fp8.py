"""What FP8 costs the trained testbed, and BF16 its camera head, over so many scenes that a change of 1 % can be told from chance.

    python benchmarks/quality_fp8.py --seconds 150 --json benchmarks/results/NAME.json
    python benchmarks/quality_fp8.py --groups --seconds 100 --json benchmarks/results/NAME.json
    python benchmarks/quality_fp8.py --camera --seconds 150 --json benchmarks/results/NAME.json

All models are dense and see the same images: one in BF16 (autocast, as in `lite3r eval`), one as `precision="fp8"` has it; with
`--groups` one for each group of Linears, that group alone in FP8; ``--groups NAME ...`` takes some. With `--camera` there are two, both
as `weights="bf16"` has it, with a camera head that computes in FP32: one with all of its weights in FP32, and, compared with that, one
in which those of its Linears are rounded to BF16.
AUC@5 of a model whose poses are some 9 degrees off rests on few pairs of views: `lite3r eval` on 40 scenes leaves an interval
of 15 %. It takes 2,000 to 5,000 scenes for one of 2 %, so scenes are rendered and run in batches here. AbsRel needs some
tens. Scenes follow until `--scenes` or `--seconds` are reached; intervals are of 95 %, scenes drawn with replacement.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from lite3r_plugin import apply_lite3r, describe
from lite3r_plugin.config import Fp8Backend, Fp8Filter
from lite3r_plugin.scene.metrics import depth_metrics, paired_bootstrap, pose_metrics
from lite3r_plugin.scene.procedural import ProcScenes, TextureBank
from lite3r_plugin.testbed import Testbed, TestbedConfig, weights_hash

BF16, DEFAULT = "bf16", "the default"
CAMERA, ROUNDED = "camera head in FP32", "weights of the camera head's Linears in BF16"
TEXTURES = 77_777  # their seed; training saw others
INNER = f"*_blocks.[1-{TestbedConfig().depth - 2}]"
GROUPS: dict[str, Fp8Filter] = {
    DEFAULT: "inner",
    "inner blocks": (f"{INNER}.*",),
    "all Linears of the blocks": ("*",),
    "qkv": ("*.attn.qkv",),
    "output projection": ("*.attn.proj",),
    "MLP up": ("*.mlp.0",),
    "MLP down": ("*.mlp.2",),
    "first pair of blocks": ("*_blocks.0.*",),
    "last pair of blocks": (f"*_blocks.{TestbedConfig().depth - 1}.*",),
    "inner blocks but qkv": (f"{INNER}.attn.proj", f"{INNER}.mlp.*"),
    "inner blocks but MLP up": (f"{INNER}.attn.*", f"{INNER}.mlp.2"),
    "inner blocks but MLP down": (f"{INNER}.attn.*", f"{INNER}.mlp.0"),
    "two pairs in the middle": ("*_blocks.[23].*",),
}
ONE_BY_ONE = list(GROUPS)[:9]  # of each group what it costs; the others are filters that leave more of the inner blocks
POSES = ("rotation_mean", "translation_mean", "auc5", "auc15", "auc30")


Values = dict[str, list[float]]


@torch.no_grad()
def measure(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, Values], dict[str, str]]:
    """Values by model and measure, a scene each; and what runs the Linears of each model."""
    backend: Fp8Backend = args.backend

    def in_fp8(taken: Fp8Filter) -> torch.nn.Module:
        model = Testbed.from_pretrained(device=device)
        return apply_lite3r(model, keep_ratio=1, precision="fp8", fp8_backend=backend, fp8_filter=taken)

    def in_half(rounded: bool) -> torch.nn.Module:
        model = apply_lite3r(Testbed.from_pretrained(device=device), keep_ratio=1, weights="bf16")
        for linear in (module for module in model.camera_head.modules() if rounded and isinstance(module, torch.nn.Linear)):
            linear.weight.copy_(linear.weight.bfloat16())  # it stays in FP32, and so does what is computed with it
        return model

    models: dict[str, Any] = {BF16: Testbed.from_pretrained(device=device)}
    models |= {name: in_fp8(GROUPS[name]) for name in args.groups}
    models |= {CAMERA: in_half(rounded=False), ROUNDED: in_half(rounded=True)} if args.camera else {}
    scenes = ProcScenes(TextureBank.procedural(64, 64, str(device), seed=TEXTURES + args.seed), str(device), 1_000_003 * (args.seed + 1))
    values: dict[str, Values] = {name: {measure: [] for measure in ("abs_rel", *POSES)} for name in models}
    start, told = time.monotonic(), 0.0
    while len(values[BF16]["auc5"]) < args.scenes and (seconds := time.monotonic() - start) < args.seconds:
        sample = scenes(args.batch, args.views, args.size, args.size)
        whole = sample["ok"].all(1)  # few scenes have a camera that finds no free place
        sample = {name: value[whole] for name, value in sample.items()}
        if not whole.any():
            continue
        for of, model in zip(values.values(), models.values(), strict=True):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                out = model(sample["rgb"])
            for i, (mine, true) in enumerate(zip(out["world_to_camera"].float().cpu(), sample["w2c"].cpu(), strict=True)):
                poses = pose_metrics(mine, true)
                for name in POSES:
                    of[name].append(getattr(poses, name))
                if len(of["abs_rel"]) < args.depth_scenes:
                    depth = depth_metrics(out["depth"][i].float(), sample["depth"][i], sample["valid"][i])
                    of["abs_rel"].append(depth.abs_rel)
        if seconds - told > 20:
            told = seconds
            print(f"[{seconds:.0f} s] {len(values[BF16]['auc5'])} scenes", flush=True)
    runs = {name: describe(model).linears for name, model in models.items() if name not in (BF16, CAMERA)}
    return values, {name: ", ".join(f"{count} {kind}" for kind, count in linears.items()) for name, linears in runs.items()}


def summary(before: list[float], after: list[float]) -> dict[str, Any]:
    """Means, and the change with its interval: as it is, and in percent of the dense mean."""
    interval = paired_bootstrap(before, after)
    dense, fp8 = (sum(side) / len(side) for side in (before, after))
    percent = [100 * x / dense if dense else math.nan for x in (interval.difference, interval.low, interval.high)]
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
    parser.add_argument(
        "--groups", nargs="*", choices=GROUPS, help="measure these in FP8 by themselves; without names all that are no filters"
    )
    parser.add_argument("--camera", action="store_true", help="measure weights of the camera head in BF16")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    usual = [] if args.camera else [DEFAULT]
    args.groups = usual if args.groups is None else args.groups or ONE_BY_ONE
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.set_num_threads(2)  # poses are small matrices, for which many threads wait for one another
    values, runs = measure(args, device)
    references = {name: values[CAMERA if name == ROUNDED else BF16] for name in runs}
    found = {name: {measure: summary(before[measure], values[name][measure]) for measure in before} for name, before in references.items()}
    for model, rows in found.items():
        print(f"{model}: {runs[model]}")
        for name, row in rows.items():
            change, low, high = row["percent"]
            told = f"{change:+.2f} % [{low:+.2f}, {high:+.2f}] over {row['scenes']} scenes"
            print(f"  {name:17} {row['dense']:8.4f} -> {row['fp8']:8.4f}: {told}")
    result: dict[str, Any] = {"camera": found.pop(ROUNDED)} if args.camera else {}
    result |= {"groups": found} if found else {}
    result["conditions"] = dict(
        linears=runs, views=args.views, size=args.size, seed=args.seed, batch=args.batch, torch=torch.__version__,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        dtype="bfloat16 autocast" if device.type == "cuda" else "float32", date=datetime.date.today().isoformat(),
        weights_sha256=weights_hash(Testbed.from_pretrained()),
    )  # fmt: skip
    result["values"] = {model: {name: [round(x, 5) for x in of[name]] for name in ("abs_rel", "auc5")} for model, of in values.items()}
    if args.json:
        args.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
