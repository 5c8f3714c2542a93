"""What each way of approximating attention costs in quality, over data sets, numbers of views and keep ratios.

    python benchmarks/quality.py --small                                    # a CPU and some minutes
    python benchmarks/quality.py --device cuda --data 7scenes:PATH --data dtu-idr:PATH --data strecha:PATH

Writes every measure of every scene to a JSON file and the tables to a Markdown file. Results are stored after every variant, and
a run that is started again under the same conditions, weights included, goes on where it ended. `--model` takes any model that
`lite3r adapters` lists.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import quality_report
import torch
from torch import Tensor, nn

import lite3r_plugin
from lite3r_plugin import TokenLayout
from lite3r_plugin.adapter.models import ModelEntry
from lite3r_plugin.adapter.plugins import find_model
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.evaluation import choose_device, choose_dtype, model_inputs, quiet, run_model, sample_views
from lite3r_plugin.evaluation.predicting import Predicting, as_outputs
from lite3r_plugin.files import write_atomically
from lite3r_plugin.scene.data import Scene, open_scenes, pick_views
from lite3r_plugin.scene.metrics import Geometry, constant_geometry, fidelity, scene_metrics
from lite3r_plugin.testbed import weights_hash
from lite3r_plugin.tokens.cache import OrderCache
from lite3r_plugin.tokens.layout import token_order
from lite3r_plugin.training.calibrate import calibrate

HERE = Path(__file__).parent
BY_MEAN, AS_KEYS = (("block_choice", "mean"),), (("pin", "reference_keys"),)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run the model: a row of the table.

    Attributes:
        name: Of the method.
        keep_ratio: 1 for the dense model.
        fields: Of `Lite3RConfig`.
        calibrated: Fit the linear branch to training scenes first.
        raster: Blocks of tokens in raster order instead of tiles.
    """

    name: str
    keep_ratio: float = 1.0
    fields: tuple[tuple[str, Any], ...] = ()
    calibrated: bool = False
    raster: bool = False

    @property
    def key(self) -> str:
        """Name and keep ratio."""
        return self.name if self.keep_ratio == 1 else f"{self.name} {self.keep_ratio}"


def variants(keep_ratios: Sequence[float], order_ratio: float) -> list[Variant]:
    """All rows; the order of tokens and what is pinned are varied at `order_ratio` alone."""
    rows = [Variant("dense")]
    for keep in keep_ratios:
        sparse, means = (("linear_branch", "none"), ("block_means", False)), (("linear_branch", "none"), ("block_means", True))
        rows += [
            Variant("sparse", keep, sparse),
            Variant("sparse + linear, all", keep, (("linear_branch", "all"), ("block_means", False)), calibrated=True),
            Variant("sparse + linear, marginal", keep, (("linear_branch", "marginal"), ("block_means", False)), calibrated=True),
            Variant("sparse + means", keep, means),
            Variant("sparse + means + linear, all", keep, (("linear_branch", "all"), ("block_means", True)), calibrated=True),
            Variant("sparse + means + linear, marginal", keep, (("linear_branch", "marginal"), ("block_means", True)), calibrated=True),
            Variant("sparse + means, blocks by mean", keep, (*means, *BY_MEAN)),
            Variant("sparse + means + linear, marginal, blocks by mean", keep, BY_MEAN, calibrated=True),
            Variant("sparse + means, reference view as keys", keep, (*means, *AS_KEYS)),
            Variant("sparse + means + linear, marginal, reference view as keys", keep, AS_KEYS, calibrated=True),
        ]
        if keep == order_ratio:
            rows += [
                Variant("sparse, raster order", keep, sparse, raster=True),
                Variant("sparse + means, raster order", keep, means, raster=True),
                Variant("sparse, reference view not pinned", keep, (*sparse, ("pin", "special"))),
                Variant("sparse, nothing pinned", keep, (*sparse, ("pin", "none"))),
                Variant("sparse + means, reference view not pinned", keep, (*means, ("pin", "special"))),
            ]
    return rows


def raster_order(layout: TokenLayout, device: torch.device) -> Tensor:
    """As `lite3r_plugin.tokens.layout.token_order`, but patches row by row."""
    order, special = token_order(layout, device), layout.special_tokens
    return torch.cat((order[:special], order[special:].sort().values))


class Bench:
    """The model and how it is run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = choose_device(args.device)
        self.dtype = choose_dtype(args.dtype, self.device)
        self.entry: ModelEntry = find_model(args.model)
        with quiet():
            self.model: nn.Module = self.entry.build(args.weights, self.device)
        self.args = args
        self.projections: dict[str, dict[str, Tensor]] = {}
        self.training: list[Tensor] | None = None

    @contextlib.contextmanager
    def running(self, variant: Variant) -> Iterator[None]:
        """The model as `variant`."""
        if variant.keep_ratio == 1:
            yield
            return
        lite3r_plugin.apply_lite3r(self.model, keep_ratio=variant.keep_ratio, dense_below=0, **dict(variant.fields))
        try:
            for site in lite3r_modules(self.model).values() if variant.raster else ():
                site.state.orders = OrderCache(raster_order)
            if variant.calibrated:
                self._calibrated(variant)
            yield
        finally:
            lite3r_plugin.remove_lite3r(self.model)

    def run(self, inputs: Tensor) -> tuple[Geometry, float]:
        """The prediction for ``[S, 3, H, W]``, and the density."""
        run = run_model(self.entry, self.model, inputs.to(self.device), self.dtype)
        return run.prediction.geometry(), 1.0 if run.density is None else run.density

    def _calibrated(self, variant: Variant) -> None:
        """Fit once a variant, on scenes with other textures than any that is evaluated."""
        sites = {fqn: m for fqn, m in lite3r_modules(self.model).items() if "proj_lin" in m._modules}
        if variant.key not in self.projections:
            if self.training is None:
                views = min(8, *self.args.views)
                scenes = open_scenes(f"procedural:scenes={self.args.calibration},views={views},seed=7,{self.rendering}", None)
                self.training = [model_inputs(self.entry, sample_views(self.entry, scene, range(views))) for scene in scenes]
            entry, autocast = self.entry, torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
            with autocast, quiet():
                inputs = (x.to(self.device) for x in self.training)
                report = calibrate(Predicting(entry, self.model), inputs, outputs=as_outputs)
            say(str(report))
            self.projections[variant.key] = {fqn: m.proj_lin.weight.detach().clone() for fqn, m in sites.items()}
        with torch.no_grad():
            for fqn, weight in self.projections[variant.key].items():
                sites[fqn].proj_lin.weight.copy_(weight)

    @property
    def rendering(self) -> str:
        """Option of procedural scenes: where they are rendered."""
        return f"device={self.device.type}"


def measures(predicted: Geometry, reference: Geometry, teacher: Geometry | None) -> dict[str, float | None]:
    """One scene, flat, to six digits: the measures that `quality_report` prints, and more."""
    scores = scene_metrics(predicted, reference, points=False)
    row = {f"pose.{name}": value for name, value in dataclasses.asdict(scores.pose).items()}
    if scores.depth is not None:
        row |= {f"depth.{name}": getattr(scores.depth, name) for name in ("abs_rel", "rmse", "delta1", "delta2", "delta3")}
    if teacher is not None:
        near = fidelity(predicted, teacher)
        row |= {f"teacher.{name}": value for name, value in dataclasses.asdict(near).items()}
    return {name: float(f"{value:.6g}") if math.isfinite(value) else None for name, value in row.items()}


def scenes_of(spec: str, views: int, draws: int) -> list[tuple[Scene, list[int]]]:
    """Draws of views from all scenes that have enough."""
    found = open_scenes(spec)
    enough = [scene for scene in found if len(scene) >= views]
    return [(scene, pick_views(scene, views, "spread", 1_000_003 * draw)) for draw in range(draws) for scene in enough]


def evaluate(bench: Bench, store: dict[str, Any], data: str, views: int, rows: Sequence[Variant], save: Any) -> None:
    """All `rows` on one data set with one number of views, into ``store["groups"]``."""
    layout, _, rest = data.partition(":")
    name, label = f"{layout}/{views}", data if layout == "procedural" else f"{layout}:{Path(rest).name}"
    if store["groups"].get(name, {}).get("data") != label:
        store["groups"][name] = {"data": label, "views": views, "rows": {}}
    group = store["groups"][name]
    if all(row.key in group["rows"] for row in rows):
        return
    spec, draws = (f"{data},views={views}", 1) if layout == "procedural" else (data, bench.args.draws)
    drawn = scenes_of(spec, views, draws)
    samples = [sample_views(bench.entry, scene, indices) for scene, indices in drawn]
    references = [sample.geometry() for sample in samples]
    inputs = [model_inputs(bench.entry, sample) for sample in samples]
    teachers: list[Geometry | None] = [None] * len(samples)
    group["sets"] = len(samples)
    if samples:
        group["size"] = list(inputs[0].shape[-2:])
    with ThreadPoolExecutor(bench.args.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for row in rows:
            if row.key in group["rows"] and row.keep_ratio != 1:
                continue
            with bench.running(row):
                results = [bench.run(x) for x in inputs]
            predicted = [prediction for prediction, _ in results]
            if row.keep_ratio == 1:
                teachers = list(predicted)
                constants = [constant_geometry(reference) for reference in references]
                scored = list(pool.map(measures, constants, references, [None] * len(samples)))
                group["rows"]["constant"] = {"density": None, "scenes": scored}
            scored = list(pool.map(measures, predicted, references, teachers))
            density = sum(d for _, d in results) / max(len(results), 1)
            group["rows"][row.key] = {"density": density, "keep_ratio": row.keep_ratio, "scenes": scored}
            save()
            say(f"{data} {views} views: {row.key}")


def say(text: str) -> None:
    """To standard error, so that progress and results do not mix."""
    print(text, file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    """Options; `--small` changes the defaults."""
    small = "--small" in sys.argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="few procedural scenes, one number of views, one keep ratio")
    parser.add_argument("--model", default="testbed")
    parser.add_argument("--weights", help="a file or a Hub id; by default the model's own")
    parser.add_argument(
        "--data", action="append", default=[], help="LAYOUT:PATH, at the middle keep ratio, beside procedural scenes; may be repeated"
    )
    parser.add_argument("--scenes", type=int, default=4 if small else 24, help="procedural scenes")
    parser.add_argument("--calibration", type=int, default=2 if small else 16, help="procedural scenes that the linear branch is fitted to")
    parser.add_argument("--draws", type=int, default=6, help="sets of views from each real scene")
    parser.add_argument("--views", type=int, nargs="+", default=[4] if small else [8, 16, 32])
    parser.add_argument("--keep-ratios", type=float, nargs="+", default=[0.25] if small else [0.5, 0.25, 0.125])
    parser.add_argument("--device", default="cpu" if small else "auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--workers", type=int, default=2 if small else 8, help="threads that measure")
    parser.add_argument("--json", type=Path, default=HERE / "results" / ("quality_small.json" if small else "quality.json"))
    parser.add_argument("--markdown", type=Path, default=HERE / ("results/quality_small.md" if small else "quality.md"))
    return parser.parse_args()


def main() -> None:
    """Measure what is not there yet, then write the tables."""
    args = parse()
    bench = Bench(args)
    gpu = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "CPU"
    conditions = {
        "model": args.model, "weights": args.weights or "default", "device": gpu, "dtype": str(bench.dtype).removeprefix("torch."),
        "torch": torch.__version__, "lite3r_plugin": lite3r_plugin.__version__, "calibration": args.calibration,
        "blocks": "128 x 64", "rule": "spread", "scenes": args.scenes, "draws": args.draws, "weights_sha256": weights_hash(bench.model),
    }  # fmt: skip
    store: dict[str, Any] = {"conditions": conditions, "groups": {}}
    if args.json.exists():
        old = json.loads(args.json.read_text())
        before = old.get("conditions", {})
        if other := sorted(name for name in before.keys() | conditions.keys() if before.get(name) != conditions.get(name)):
            say(f"{args.json} was measured with other {', '.join(other)}: starting anew")
        else:
            store = old

    def save() -> None:
        write_atomically(args.json, json.dumps(store, indent=None, separators=(",", ":"), allow_nan=False) + "\n")

    middle = args.keep_ratios[len(args.keep_ratios) // 2]
    rows = variants(args.keep_ratios, middle)
    for views in args.views:
        evaluate(bench, store, f"procedural:scenes={args.scenes},seed=1,{bench.rendering}", views, rows, save)
        for data in args.data:
            evaluate(bench, store, data, views, [row for row in rows if row.keep_ratio in (1, middle)], save)
    save()
    write_atomically(args.markdown, quality_report.markdown(store, f"results/{args.json.name}"))
    say(f"wrote {args.json} and {args.markdown}")


if __name__ == "__main__":
    main()
