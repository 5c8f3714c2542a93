"""What ratios chosen for each site are worth: `choose_keep_ratios` beside one ratio for all, as they are and calibrated, computing as much.

And what a choice of key blocks is worth, with `--block-choices`, and all that with another `--pin`, at equal density, with `--plain`.

    python benchmarks/quality_auto.py --views 16 --seconds 80 --json benchmarks/results/NAME.json
    python benchmarks/quality_auto.py --device cpu --views 8 --keep-ratios 0.25 --scenes 8 --size 112 --block-q 32 --block-k 16 \\
        --calibration 4 --judged 4 --batch 2 --seconds 1200
    python benchmarks/quality_auto.py --views 16 --uniform-only --block-choices mean error --seconds 80
    python benchmarks/quality_auto.py --views 16 --pin reference_keys --plain --seconds 80

For each number of views and each keep ratio there are four models with the weights of the testbed: `uniform`, `uniform + calibrate`, `auto`
(``mean_keep_ratio`` of that ratio) and `auto + calibrate`; `--uniform-only` leaves the last two out, `--calibration 0` what is calibrated.
With several `--block-choices` there are those for each. With `--plain` there is `plain + calibrate` besides: one ratio for all, blocks by
their means, `pin="reference"`; all others get the ratio at which they compute as much.

They see the scenes that `dense` sees, which is a model with Lite3R and ``keep_ratio=1``, so that all its other kernels are theirs. Scenes
that choose and calibrate have other seeds and textures than those that judge. Scenes follow in batches until `--scenes` or `--seconds` are
reached, each number of views with its share of the time; what is printed has paired 95 % intervals, scenes drawn with replacement.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import math
import time
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lite3r_plugin import KeepRatioProfile, apply_lite3r, calibrate, choose_keep_ratios
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.config import Pin
from lite3r_plugin.evaluation import choose_device
from lite3r_plugin.files import to_json, write_atomically
from lite3r_plugin.ops.options import ConfigBlockChoice
from lite3r_plugin.scene.metrics import Interval, depth_metrics, paired_bootstrap, pose_metrics
from lite3r_plugin.scene.procedural import ProcScenes, TextureBank
from lite3r_plugin.testbed import Testbed, weights_hash
from lite3r_plugin.version import __version__

CHOOSING, JUDGING = 31_337, 77_777  # seeds of textures; training saw others
MEASURES = {"AUC@30": "auc30", "AUC@5": "auc5", "AbsRel": "abs_rel"}

Values = dict[str, list[float]]


def rendered(views: int, size: int, device: torch.device, textures: int, batch: int) -> Any:
    """Batches of scenes without end, those whose cameras have all found a place."""
    scenes = ProcScenes(TextureBank.procedural(64, 64, str(device), seed=textures), str(device), 1_000_003 * textures + views)
    while True:
        sample = scenes(batch, views, size, size)
        whole = sample["ok"].all(1)  # few scenes have a camera that finds no free place
        if whole.any():
            yield {name: value[whole] for name, value in sample.items()}


def named(way: str, choice: str, ratio: float) -> str:
    """What an arm is called."""
    return f"{way}{'' if choice == 'auto' else f' by {choice}'} {ratio:g}"


def arms(args: argparse.Namespace, views: int, device: torch.device) -> tuple[dict[str, nn.Module], dict[str, KeepRatioProfile]]:
    """The models by name, and the chosen ratios by the end of that of their arm."""
    inputs: list[Tensor] = []
    scenes = rendered(views, args.size, device, CHOOSING + args.seed, args.batch)
    while len(inputs) < args.calibration:
        inputs += next(scenes)["rgb"].split(1)
    inputs = inputs[: args.calibration]

    def made(keep_ratio: Any, choice: Any = "auto", **more: Any) -> nn.Module:
        fields: Any = dict(dense_below=0, block_q=args.block_q, block_k=args.block_k, block_choice=choice, pin=args.pin) | more
        return apply_lite3r(Testbed.from_pretrained(device=device), keep_ratio=keep_ratio, **fields)

    def computed(model: nn.Module) -> float:
        with torch.no_grad(), autocast(device):
            model(inputs[0] if inputs else next(scenes)["rgb"])
        return density(model)

    def calibrated(name: str, model: nn.Module) -> None:
        start = time.monotonic()
        with autocast(device):
            report = calibrate(model, inputs, judged=min(args.judged, 8), progress=False)
        say(f"{name}: {str(report).split('relative error of attention')[0]}{time.monotonic() - start:.0f} s to calibrate")
        models[name] = model

    models, profiles = {"dense": made(1.0)}, {}
    given = {label: label for label in args.keep_ratios}
    for label in given if args.plain else ():
        calibrated(named("plain + calibrate", "auto", label), plain := made(label, "mean", pin="reference"))
        given[label] = as_much(label, computed(made(label)), computed(plain))
    for (label, ratio), choice in itertools.product(given.items(), args.block_choices):
        keep_ratios: dict[str, Any] = {"uniform": ratio}
        models[named("uniform", choice, label)] = made(ratio, choice)
        if not args.uniform_only:
            start, chosen = time.monotonic(), made("auto", choice)
            with autocast(device):
                profile = choose_keep_ratios(chosen, inputs, mean_keep_ratio=ratio, judged=min(args.judged, len(inputs)), progress=False)
            say(f"{profile}\n{time.monotonic() - start:.0f} s to choose")
            models[named("auto", choice, label)] = chosen
            keep_ratios["auto"] = profiles[named("", choice, label).strip()] = profile
        for way, keep_ratio in keep_ratios.items() if inputs else ():
            calibrated(named(f"{way} + calibrate", choice, label), made(keep_ratio, choice))
    return models, profiles


def as_much(ratio: float, density: float, wanted: float) -> float:
    """The ratio at which a model computes the share `wanted` of the scores that computes `density` of them at `ratio`.

    What is pinned is computed at any ratio, of the rest the ratio: 1 - density = (1 - ratio) (1 - pinned).
    """
    return 1.0 if density == 1 else 1 - (1 - ratio) * (1 - wanted) / (1 - density)


def pairs(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Arms that are compared: auto with uniform, and each other choice of blocks with the first, the rest alike."""
    found = []
    for ratio, end in itertools.product(args.keep_ratios, ("", " + calibrate") if args.calibration else ("",)):
        uniform, auto = ([named(way + end, choice, ratio) for choice in args.block_choices] for way in ("uniform", "auto"))
        plain = [named("plain" + end, "auto", ratio)] if args.plain and end else []
        found += [(arm, other) for arm in plain for other in (uniform if args.uniform_only else uniform + auto)]
        found += [] if args.uniform_only else list(zip(uniform, auto, strict=True))
        for arm, *others in (uniform,) if args.uniform_only else (uniform, auto):
            found += [(arm, other) for other in others]
    return found


@torch.no_grad()
def measure(args: argparse.Namespace, views: int, models: dict[str, nn.Module], device: torch.device, deadline: float) -> dict[str, Values]:
    """Values by model and measure, a scene each."""
    values: dict[str, Values] = {name: {measure: [] for measure in MEASURES} for name in models}
    count = 0
    for sample in rendered(views, args.size, device, JUDGING + args.seed, args.batch):
        for name, model in models.items():
            with autocast(device):
                out = model(sample["rgb"])
            for i, (mine, true) in enumerate(zip(out["world_to_camera"].float().cpu(), sample["w2c"].cpu(), strict=True)):
                poses = pose_metrics(mine, true)
                values[name]["AUC@30"].append(poses.auc30)
                values[name]["AUC@5"].append(poses.auc5)
                near = depth_metrics(out["depth"][i].float(), sample["depth"][i], sample["valid"][i]).abs_rel
                values[name]["AbsRel"].append(near)
        count += len(sample["rgb"])
        if count >= args.scenes or time.monotonic() > deadline:
            return values
    raise AssertionError("scenes do not end")


def autocast(device: torch.device) -> torch.autocast:
    """BF16 on a GPU, as in `lite3r eval`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def density(model: nn.Module) -> float:
    """Share of the scores that the last forward computed, over the sites that may be sparse."""
    shares = [site.calls.density if site.calls.density is not None else 1.0 for site in lite3r_modules(model).values() if site.sparse]
    return sum(shares) / len(shares)


def summary(args: argparse.Namespace, models: dict[str, nn.Module], values: dict[str, Values]) -> dict[str, Any]:
    """Means with their changes against dense, and what changes from one arm of a pair to the other."""
    rows: dict[str, Any] = {}
    for name, model in models.items():
        rows[name] = {"density": density(model)}
        for measure in MEASURES:
            mine, dense = values[name][measure], values["dense"][measure]
            change = paired_bootstrap(dense, mine)
            rows[name][measure] = {"mean": mean(mine), "change": change.to_dict()}
        changes = {m: shown(paired_bootstrap(values["dense"][m], values[name][m])) for m in MEASURES}
        told = ", ".join(f"{m} {rows[name][m]['mean']:.4g} ({changes[m]})" for m in MEASURES)
        say(f"{name:34} density {rows[name]['density']:.3f}: {told}")
    gains: dict[str, Any] = {}
    for first, second in pairs(args):
        gains[f"{second} - {first}"] = {m: paired_bootstrap(values[first][m], values[second][m]).to_dict() for m in MEASURES}
        lost = [rows[name]["AUC@30"]["mean"] - rows["dense"]["AUC@30"]["mean"] for name in (first, second)]
        gains[f"{second} - {first}"]["share of the loss of AUC@30"] = lost[1] / lost[0] if lost[0] else None
        told = ", ".join(f"{m} {shown(paired_bootstrap(values[first][m], values[second][m]))}" for m in MEASURES)
        say(f"{second} - {first}: {told}; loses {lost[1]:+.2f} of AUC@30 where the other loses {lost[0]:+.2f}")
    return {"rows": rows, "gains": gains}


def mean(values: list[float]) -> float:
    """Of those that are defined."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / max(len(known), 1)


def shown(interval: Interval) -> str:
    """With a star where it leaves out 0."""
    return f"{interval.difference:+.3g} [{interval.low:+.3g}, {interval.high:+.3g}]{' *' if interval.clear else ''}"


def say(text: str) -> None:
    """At once."""
    print(text, flush=True)


def main() -> None:
    """Parse, measure, print, store after each number of views."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, nargs="+", default=[16])
    parser.add_argument("--keep-ratios", type=float, nargs="+", default=[0.25, 0.125])
    parser.add_argument("--uniform-only", action="store_true", help="choose no ratios")
    parser.add_argument("--block-choices", nargs="+", choices=get_args(ConfigBlockChoice), default=["auto"], help="compared with the first")
    parser.add_argument("--pin", choices=get_args(Pin), default="reference")
    parser.add_argument("--plain", action="store_true", help="`plain + calibrate` besides, and for all others the ratio to compute as much")
    parser.add_argument("--scenes", type=int, default=480, help="for each number of views, at most")
    parser.add_argument("--seconds", type=float, default=80, help="begin no batch after so many")
    parser.add_argument("--calibration", type=int, default=8, help="scenes that are calibrated on; 0: leave that out")
    parser.add_argument("--judged", type=int, default=4, help="of these, how many choose ratios, and how many judge calibrations")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--block-q", type=int, default=128)
    parser.add_argument("--block-k", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not args.calibration and not (args.uniform_only and not args.plain):
        parser.error("--calibration 0 goes with --uniform-only and without --plain, which need its scenes")
    device, start = choose_device(args.device), time.monotonic()
    result: dict[str, Any] = {
        "conditions": dict(
            model="testbed", views=args.views, size=args.size, blocks=[args.block_q, args.block_k], block_choices=args.block_choices,
            pin=args.pin, plain=args.plain, calibration=args.calibration, judged=args.judged, seed=args.seed, batch=args.batch,
            torch=torch.__version__, lite3r_plugin=__version__,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            dtype="bfloat16 autocast" if device.type == "cuda" else "float32", date=datetime.date.today().isoformat(),
            weights_sha256=weights_hash(Testbed.from_pretrained()),
        ),
        "groups": {},
    }  # fmt: skip
    for i, views in enumerate(args.views, 1):
        models, profiles = arms(args, views, device)
        values = measure(args, views, models, device, start + args.seconds * i / len(args.views))
        say(f"{views} views, {len(values['dense']['AUC@30'])} scenes, {time.monotonic() - start:.0f} s")
        found = summary(args, models, values)
        result["groups"][str(views)] = found | {
            "scenes": len(values["dense"]["AUC@30"]),
            "profiles": {ratio: profile.to_dict() for ratio, profile in profiles.items()},
            "values": {name: {m: [round(x, 4) for x in of] for m, of in measures.items()} for name, measures in values.items()},
        }
        if args.json:
            write_atomically(args.json, to_json(result))


if __name__ == "__main__":
    main()
