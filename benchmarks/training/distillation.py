"""What training wins back, on the testbed: rows of ways to train, each measured against dense on the same scenes.

    python benchmarks/training/distillation.py --rows applied calibrated proj lora --keep-ratio 0.25 --json FILE     # on a GPU
    python benchmarks/training/distillation.py --small                                  # on a CPU, to see that it works

Teacher and student are one model, and all training is without labels but for the row `published`. Training scenes and held-out scenes are
drawn from other seeds and other textures. All rows run the same dense kernel wherever they are dense. A row is stored when it is done, and
a run that is started again goes on after the last one.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lite3r_plugin
from lite3r_plugin import DistillConfig, apply_lite3r, calibrate, convert, distill
from lite3r_plugin.adapter.outputs import ModelOutputs
from lite3r_plugin.adapter.plugins import find_model
from lite3r_plugin.files import write_atomically
from lite3r_plugin.peft import merge_lora
from lite3r_plugin.scene.metrics import depth_metrics, paired_bootstrap, pose_metrics
from lite3r_plugin.scene.procedural import ProcScenes, TextureBank
from lite3r_plugin.testbed import Testbed, TestbedConfig
from lite3r_plugin.training.data import Sample

MEASURES = ("abs_rel", "auc30", "auc15", "auc5")
TRAINING_SEED, HELD_OUT_SEED = 4_001, 91_001


@dataclasses.dataclass(frozen=True)
class Row:
    """A way to train.

    Attributes:
        name: What users type after ``--rows``.
        calibrated: Fit the linear branch in closed form first.
        training: Fields of `DistillConfig`; None: nothing is trained.
        precision: Of the model that is measured. With ``"fp8"`` it trains with fake quantisation and is converted.
    """

    name: str
    calibrated: bool = True
    training: dict[str, Any] | None = None
    precision: str = "full"


def rows(minutes: float, long: float) -> dict[str, Row]:
    """All rows by name; `minutes` for those that are compared with each other, `long` for the best one."""
    ours: dict[str, Any] = dict(learning_rate=1e-3, schedule="cosine", warmup_steps=20, minutes=minutes)
    best = ours | dict(minutes=long, lora_rank=32)
    every = [
        Row("applied", calibrated=False),
        Row("calibrated"),
        Row("published", calibrated=False, training=dict(DistillConfig.published().to_dict(), epochs=None, minutes=minutes)),
        Row("proj", training=ours | dict(trainable="proj")),
        Row("norms", training=ours | dict(trainable="proj+norms")),
        Row("lora", training=ours | dict(trainable="proj+lora")),
        Row("lora-global", training=ours | dict(trainable="proj+lora", lora_scopes=("global",))),
        Row("blocks", training=ours | dict(trainable="blocks", learning_rate=2e-4)),
        Row("local", training=ours | dict(trainable="proj+lora", mode="local", attention=1.0)),
        Row("lora-qat", training=ours | dict(trainable="proj+lora"), precision="fp8"),
        Row("best", training=best | dict(trainable="proj+lora")),
        Row("best-fp8", training=best | dict(trainable="proj+lora"), precision="fp8"),
    ]
    return {row.name: row for row in every}


class Scenes:
    """Rendered scenes on the device: images ``[N, S, 3, H, W]`` with depth and cameras.

    Args:
        seed: Of scenes and textures.
        count: N.
        views: S.
        size: H and W.
        device: Where they are rendered and lie.
    """

    def __init__(self, seed: int, count: int, views: int, size: int, device: torch.device) -> None:
        bank = TextureBank.procedural(*((128, 128) if size > 64 else (12, 32)), device, seed=seed)
        scenes = ProcScenes(bank, device, seed=seed + 1, max_views_per_chunk=32, compile=device.type == "cuda")
        parts = [scenes(1, views, size, size) for _ in range(count)]
        self.parts = {name: torch.cat([part[name] for part in parts]) for name in ("rgb", "depth", "valid", "K", "w2c", "ok")}

    def __len__(self) -> int:
        return len(self.parts["rgb"])

    def views(self, number: int) -> dict[str, Tensor]:
        """The same scenes with fewer views, spread over those that there are."""
        every = self.parts["rgb"].shape[1] // number
        return {name: value[:, ::every] for name, value in self.parts.items()}

    def training(self, seed: int, views_a_step: int, labels: bool) -> Iterator[Sample]:
        """Samples without end: some views of some scenes in random order, so that each view is the reference at times."""
        generator = torch.Generator().manual_seed(seed)
        total, size = self.parts["rgb"].shape[1], [v for v in ((8, 16, 32) if views_a_step >= 32 else (2, 4)) if v <= views_a_step]
        for step in itertools.count():
            views = min(size[step % len(size)], total)
            chosen = torch.randperm(len(self), generator=generator)[: views_a_step // views]
            order = torch.stack([torch.randperm(total, generator=generator)[:views] for _ in chosen])
            part = {name: value[chosen[:, None], order] for name, value in self.parts.items()}
            truth = ModelOutputs(
                depth=torch.where(part["valid"], part["depth"], torch.nan), world_to_camera=part["w2c"], intrinsics=part["K"]
            )
            yield Sample({"images": part["rgb"]}, truth if labels else None)


@torch.no_grad()
def measure(model: nn.Module, scenes: Scenes, views: int, views_at_once: int, autocast: bool) -> dict[str, list[float]]:
    """The `MEASURES` of each scene that has them."""
    found: dict[str, list[float]] = {name: [] for name in MEASURES}
    sample, at_once = scenes.views(views), max(1, views_at_once // views)
    for i in range(0, len(scenes), at_once):
        part = {name: value[i : i + at_once] for name, value in sample.items()}
        with torch.autocast(part["rgb"].device.type, torch.bfloat16, enabled=autocast):
            out = model(part["rgb"])
        for j in range(len(part["rgb"])):
            ok = part["ok"][j]
            pose = pose_metrics(out["world_to_camera"][j][ok].float(), part["w2c"][j][ok])
            depth = depth_metrics(out["depth"][j].float(), part["depth"][j], part["valid"][j])
            for name, value in zip(MEASURES, (depth.abs_rel, pose.auc30, pose.auc15, pose.auc5), strict=True):
                found[name].append(value)
    return found


def run(row: Row, keep_ratio: float, training: Scenes, held_out: Scenes, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Train and measure one row."""
    model = build(args, device)
    autocast = device.type == "cuda"
    blocks = dict(block_q=32, block_k=16) if args.small else {}  # so few tokens are too few blocks of the usual size to leave any out
    apply_lite3r(model, keep_ratio=keep_ratio, dense_below=0, precision="fp8_qat" if row.precision == "fp8" else "full", **blocks)
    result: dict[str, Any] = {"keep_ratio": keep_ratio, "row": dataclasses.asdict(row)}
    if row.calibrated:
        first = [sample.inputs for sample in itertools.islice(training.training(7, 16, labels=False), args.calibration)]
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            calibrate(model, first)
        result["calibration_seconds"] = time.perf_counter() - started
    if row.training is not None:
        fields = {**row.training, **json.loads(args.set)}
        if autocast:
            fields["mixed_precision"] = "bf16"
        if args.steps:
            fields |= dict(steps=args.steps, minutes=None)
        data = training.training(args.seed, args.views_a_step, labels=row.name == "published")
        report = distill(model, data, DistillConfig(**fields))
        say(str(report))
        result["distillation"] = str(report)
        if fields.get("trainable") == "proj+lora":
            merge_lora(model)
    if row.precision == "fp8":
        convert(model)
    model.eval()
    result["views"] = {views: measure(model, held_out, views, args.views_at_once, autocast) for views in args.views}
    return result


def against_dense(result: dict[str, Any], dense: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Mean differences with intervals, points for AUC and percent of the dense mean for AbsRel, by number of views."""
    found: dict[str, dict[str, Any]] = {}
    for views, measures in result["views"].items():
        found[str(views)] = {}
        for name, values in measures.items():
            base = dense["views"][views][name]
            interval = paired_bootstrap(base, values)
            mean = sum(x for x in base if x == x) / max(1, sum(x == x for x in base))
            unit = 100 / mean if name == "abs_rel" else 1.0
            bounds = {"difference": interval.difference * unit, "low": interval.low * unit, "high": interval.high * unit}
            found[str(views)][name] = bounds | {"dense": mean}
    return found


def build(args: argparse.Namespace, device: torch.device) -> Testbed:
    """The testbed as it comes with the package, or a tiny one with random weights."""
    if args.small:
        torch.manual_seed(0)
        return Testbed(TestbedConfig(dim=64, depth=2, head_dim=32, stem=16)).eval().to(device)
    return find_model("testbed").build(None, device)  # pyright: ignore[reportReturnType]


def say(text: str) -> None:
    """To standard error, so that progress and results do not mix."""
    print(text, file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    """Options; `--small` changes the defaults."""
    small = "--small" in sys.argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model, few tiny scenes, few steps")
    parser.add_argument("--rows", nargs="+", default=["applied", "calibrated", "proj", "lora"])
    parser.add_argument("--keep-ratio", type=float, nargs="+", default=[0.25])
    parser.add_argument("--minutes", type=float, default=1.25, help="of training, for the rows that are compared")
    parser.add_argument("--long", type=float, default=5.0, help="of training, for the best row")
    parser.add_argument("--steps", type=int, default=2 if small else None, help="end after so many steps instead")
    parser.add_argument("--set", default="{}", help="further fields of DistillConfig for every row, as JSON")
    parser.add_argument("--views", type=int, nargs="+", default=[2, 4] if small else [8, 16, 32])
    parser.add_argument("--scenes", type=int, default=6 if small else 400, help="held-out scenes")
    parser.add_argument("--pool", type=int, default=4 if small else 256, help="training scenes")
    parser.add_argument("--calibration", type=int, default=4 if small else 32, help="inputs that the linear branch is fitted to")
    parser.add_argument("--views-a-step", type=int, default=4 if small else 96)
    parser.add_argument("--views-at-once", type=int, default=8 if small else 128, help="in measuring")
    parser.add_argument("--size", type=int, default=48 if small else 224, help="pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu" if small else "cuda")
    parser.add_argument("--json", type=Path, required=not small, help="file for the results")
    return parser.parse_args()


def main() -> None:
    """Measure what is not there yet."""
    args, started = parse(), time.perf_counter()
    device = torch.device(args.device)
    conditions = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", "torch": torch.__version__,
        "lite3r_plugin": lite3r_plugin.__version__, "dtype": "bfloat16" if device.type == "cuda" else "float32", "size": args.size,
        "scenes": args.scenes, "pool": args.pool, "views_a_step": args.views_a_step, "calibration": args.calibration,
    }  # fmt: skip
    store: dict[str, Any] = {"conditions": conditions, "rows": {}}
    if args.json and args.json.exists():
        old = json.loads(args.json.read_text())
        if old["conditions"] != conditions:
            sys.exit(f"{args.json} was measured under other conditions: name another file")
        store = old

    def save() -> None:
        if args.json:
            write_atomically(args.json, json.dumps(store, separators=(",", ":")) + "\n")

    held_out = Scenes(HELD_OUT_SEED, args.scenes, max(args.views), args.size, device)
    training = Scenes(TRAINING_SEED, args.pool, max(args.views), args.size, device)
    say(f"[{time.perf_counter() - started:.0f} s] rendered {len(held_out)} and {len(training)} scenes")
    model = build(args, device)
    dense = {"views": {v: measure(model, held_out, v, args.views_at_once, device.type == "cuda") for v in args.views}}
    del model
    known = rows(args.minutes, args.long)
    for keep_ratio, name in itertools.product(args.keep_ratio, args.rows):
        key = f"{name} {keep_ratio} {args.set}"
        if key in store["rows"]:
            continue
        begun = time.perf_counter()
        result = run(known[name], keep_ratio, training, held_out, args, device)
        result["seconds"] = time.perf_counter() - begun
        result["against_dense"] = against_dense(result, dense)
        del result["views"]
        store["rows"][key] = result
        save()
        for views, measures in result["against_dense"].items():
            parts = [f"{m} {d['difference']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}]" for m, d in measures.items()]
            say(f"[{time.perf_counter() - started:.0f} s] {key}, {views} views: " + "  ".join(parts))


if __name__ == "__main__":
    main()
