"""What Lite3R costs a model in quality: dense and accelerated side by side on the same views."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..adapter.models import ModelEntry
from ..apply.checkpoint import load_lite3r
from ..apply.report import describe
from ..apply.seal import holds_dense_model
from ..apply.verbs import apply_lite3r, lite3r_disabled
from ..config import Lite3RConfig
from ..errors import InputError
from ..runtime.sdpa import DenseKernels, sdpa_backend
from ..scene.data import Scene, Views, pick_views
from ..scene.data.files import read_image
from ..scene.data.sampling import Rule
from ..scene.metrics import Comparison, Fidelity, fidelity
from ..version import __version__
from .protocol import Protocol, ProtocolName, find_protocol
from .run import Run, quiet, run_model

if TYPE_CHECKING:
    from rich.table import Table

DENSE: Literal["dense"] = "dense"
LITE3R: Literal["lite3r"] = "lite3r"
Method = Literal["dense", "lite3r"]
DRAW = 1_000_003  # what the seeds of two draws of views differ by
BITS = 255
VIEWS, MAX_POINTS = 8, 20_000

Progress = Callable[[int, int, str], None]
"""Called with the number of sets of views that are done, of all, and what comes next."""


@dataclass(frozen=True)
class ModelPair:
    """A model that runs dense and with Lite3R, as a rule with one copy of its weights.

    Attributes:
        entry: How it is run.
        model: With Lite3R.
        original: The dense model where it is not in `model` to switch back to: with FP8, or with weights that were trained. Else None.
    """

    entry: ModelEntry
    model: nn.Module
    original: nn.Module | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @classmethod
    def build(cls, entry: ModelEntry, config: Lite3RConfig, weights: str | None = None, device: torch.device | str = "cpu") -> ModelPair:
        """The model of `entry` with Lite3R as `config` says.

        Args:
            entry: What to build.
            config: For `apply_lite3r`.
            weights: As in `ModelEntry.build`.
            device: Where to put it.

        Raises:
            InputError: the library or the weights cannot be had.
            Lite3RError: Lite3R cannot be applied.
        """
        with quiet():
            model = apply_lite3r(entry.build(weights, device), config)
            original = entry.build(weights, device) if config.precision == "fp8" else None
        return cls(entry, model, original)

    @classmethod
    def load(cls, entry: ModelEntry, checkpoint: Path, weights: str | None = None, device: torch.device | str = "cpu") -> ModelPair:
        """The model of `entry` with the Lite3R of a checkpoint.

        Args:
            entry: What to build.
            checkpoint: The folder, as `lite3r_plugin.apply.source.find_checkpoint` finds it.
            weights: As in `ModelEntry.build`.
            device: Where to put it.

        Raises:
            InputError: the library or the weights cannot be had.
            Lite3RError: as `load_lite3r`.
        """
        with quiet():
            model = load_lite3r(entry.build(weights, device), checkpoint)
            original = None if holds_dense_model(checkpoint) else entry.build(weights, device)
        return cls(entry, model, original)

    def run(self, method: Method, images: Tensor, dtype: torch.dtype, repeats: int = 1, warm_up: bool = False) -> Run:
        """`run_model` of `DENSE` or `LITE3R`; the other arguments are its own."""
        if method == LITE3R:
            return run_model(self.entry, self.model, images, dtype, repeats, warm_up)
        with lite3r_disabled(self.model) if self.original is None else contextlib.nullcontext():
            return run_model(self.entry, self.original or self.model, images, dtype, repeats, warm_up)


@dataclass(frozen=True)
class Evaluation:
    """What `compare` found.

    Attributes:
        conditions: Model, configuration, device, dtype, versions, and how views were picked, as JSON-serialisable data.
        comparison: Measures of `DENSE`, `LITE3R` and a constant prediction against the reference, a set of views each.
        fidelity: How far Lite3R is from dense, a set of views each.
        densities: Share of the score blocks computed, 1 where every site ran dense, a set of views each.
        seconds: What each run took, by method, a set of views each.
        protocol: By which it was judged, if by one.
    """

    conditions: dict[str, Any]
    comparison: Comparison
    fidelity: tuple[Fidelity, ...]
    densities: tuple[float, ...]
    seconds: Mapping[str, tuple[float, ...]]
    protocol: Protocol | None = None

    @property
    def density(self) -> float:
        """Mean of `densities`."""
        return statistics.fmean(self.densities)

    @property
    def rows(self) -> list[str]:
        """The measures: those of the protocol, or all usual ones, that the data allows."""
        return self.comparison.rows() if self.protocol is None else self.comparison.rows(self.protocol.rows)

    def table(self) -> Table:
        """Means of all measures, and the difference of Lite3R and dense with its 95 % interval."""
        if self.protocol is None:
            return self.comparison.table(DENSE, LITE3R)
        heading = f"{self.protocol.heading}: {self.protocol.views}, {_sizes(self.conditions['sizes'])}"
        most = self.protocol.most_views
        cut = 0 if most is None else sum(count > most for count in self.conditions["views_of_scenes"])
        picked = f"Of {cut} scenes with more than {most} views, {most} are taken {self.protocol.rule}. " if cut else ""
        note = f"{picked}{self.protocol.caption} {self.dense_kernels()}"
        return self.comparison.table(DENSE, LITE3R, self.protocol.rows, heading, note)

    def dense_kernels(self) -> str:
        """A sentence on which kernels ran dense attention; empty without a protocol."""
        if self.protocol is None:
            return ""
        ran, same = (self.conditions[name] for name in ("dense_kernels", "same_dense_kernel"))
        names = f"{', '.join(ran[DENSE]) or 'none seen'} (dense), {', '.join(ran[LITE3R]) or 'none seen'} (Lite3R where it is dense)"
        if same is None:
            return f"No dense attention of one shape was seen in both, so its kernels cannot be compared: {names}."
        if not same:
            return f"Dense attention did not run on the same kernels in both, which alone moves results: {names}."
        return f"Dense attention ran on the same kernels in both: {names}."

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-serialisable data; None where a measure is not defined."""
        means = {method: {row: _plain(self.comparison.mean(method, row)) for row in self.rows} for method in self.comparison.scores}
        found = {row: self.comparison.difference(DENSE, LITE3R, row) for row in self.rows}
        return {
            **self.conditions,
            "density": self.density,
            "seconds": {method: list(times) for method, times in self.seconds.items()},
            "means": means,
            "differences": {row: interval.to_dict() for row, interval in found.items()},
            "scenes": self.comparison.to_dict(),
            "fidelity": [score.to_dict() for score in self.fidelity],
        }


def compare(
    pair: ModelPair,
    scenes: Sequence[Scene],
    views: int | None = None,
    *,
    protocol: ProtocolName | None = None,
    rule: Rule | None = None,
    draws: int | None = None,
    seed: int | None = None,
    dtype: torch.dtype = torch.float32,
    max_points: int | None = None,
    progress: Progress = lambda done, total, what: None,
) -> Evaluation:
    """Measure depth, pose and points against the truth, dense and with Lite3R.

    Args:
        pair: The model.
        scenes: With cameras; depth and points are measured where there is depth.
        views: Views of each scene, 8 unless a number is given.
        protocol: Judge in one of the ways of `lite3r_plugin.evaluation.protocol`: ``"da3bench"``, poses of all views of each scene as the
            Depth Anything 3 benchmark judges them (arXiv 2511.10647), or ``"lite3r"``, one random pair of views of each of 32 scenes as
            the Lite3R paper does (arXiv 2605.11354). It fixes views, rule and draws; da3bench also seed and max_points, for it
            has no use for them. None: as the other arguments say.
        rule: How views are picked, see `lite3r_plugin.scene.data.pick_views`; spread unless one is given.
        draws: Sets of views from each scene, 1 unless a number is given.
        seed: Of the choice of views, 0 unless a number is given.
        dtype: Of the computation; FP32 means no autocast.
        max_points: Points of each cloud that are compared, 20,000 unless a number is given.
        progress: Called before each set of views.

    Raises:
        InputError: no scenes, a scene with too few views or without cameras, a prediction that cannot be measured, no protocol of that
            name, or an argument that it fixes.
    """
    judged = None if protocol is None else find_protocol(protocol)
    if judged is not None:
        judged.refuse(views=views, rule=rule, draws=draws, seed=seed, max_points=max_points)
        scenes = scenes[: judged.most_scenes]
    if not len(scenes):
        raise InputError("there are no scenes to compare on")
    views, rule, draws = VIEWS if views is None else views, rule or "spread", 1 if draws is None else draws
    seed, max_points = seed or 0, MAX_POINTS if max_points is None else max_points
    device = pair.device
    comparison, near, densities = Comparison(max_points=max_points), [], []
    kernels = {DENSE: DenseKernels(), LITE3R: DenseKernels()}
    counts, sizes = [], []
    seconds: dict[str, list[float]] = {DENSE: [], LITE3R: []}
    total = len(scenes) * draws
    for number, scene in enumerate(scenes):
        for draw in range(draws):
            progress(number * draws + draw, total, scene.name)
            indices = pick_views(scene, views, rule, seed + DRAW * draw) if judged is None else judged.pick(scene, seed)
            sample = sample_views(pair.entry, scene, indices, None if judged is None else judged.shape)
            images = model_inputs(pair.entry, sample).to(device)
            reference = sample.geometry()
            if judged is not None and judged.poses_only:
                reference = dataclasses.replace(reference, valid=torch.zeros_like(reference.depth, dtype=torch.bool))
            with _kernels(judged, kernels[DENSE]):
                stock = pair.run(DENSE, images, dtype)
            with _kernels(judged, kernels[LITE3R]):
                run = pair.run(LITE3R, images, dtype)
            dense, mine = stock.prediction.geometry(), run.prediction.geometry()
            for method, ran in ((DENSE, stock), (LITE3R, run)):
                seconds[method].append(ran.seconds)
            comparison.add(reference, {DENSE: dense, LITE3R: mine}, scene=number)
            near.append(fidelity(mine, dense))
            densities.append(1.0 if run.density is None else run.density)
            counts.append((len(indices), len(scene)))
            sizes.append((sample.images.shape[-2], sample.images.shape[-1]))
    conditions = {
        "model": pair.entry.name,
        "config": describe(pair.model).config.to_dict(),
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "lite3r_plugin": __version__,
        "protocol": protocol,
        "views": views,
        "rule": rule,
        "draws": draws,
        "seed": seed,
        "max_points": max_points,
    }
    if judged is not None:
        conditions |= {
            "views": judged.views,
            "rule": judged.rule,
            "seed": seed if "seed" in judged.open else None,
            "max_points": max_points if "max_points" in judged.open else None,
            "notes": [judged.caption, *judged.notes],
            "views_of_sets": [taken for taken, _ in counts],
            "views_of_scenes": [held for _, held in counts],
            "sizes": sorted(set(sizes)),
            "preferred_dense_kernel": judged.backend,
            "dense_kernels": {method: ran.names for method, ran in kernels.items()},
            "same_dense_kernel": kernels[LITE3R].agree(kernels[DENSE]),
        }
    taken = {method: tuple(times) for method, times in seconds.items()}
    return Evaluation(conditions, comparison, tuple(near), tuple(densities), taken, judged)


def sample_views(entry: ModelEntry, scene: Scene, indices: Sequence[int], shape: tuple[int, int] | None = None) -> Views:
    """Views at the size that a model makes of the first one, cut and resized with exact cameras and depth; the first is the world.

    Args:
        entry: The model.
        scene: With cameras.
        indices: Numbers of frames of `scene`.
        shape: Height and width of an image: the views get the size that the model makes of it. None: of the first view.

    Raises:
        InputError: the scene has no cameras, or its files cannot be read.
    """
    from PIL import Image

    if shape is None:
        first = scene.frames[indices[0]].image
        pixels = read_image(first) if isinstance(first, Path) else first
        shape = (pixels.shape[-2], pixels.shape[-1])
    size = entry.preprocess([Image.new("RGB", (shape[1], shape[0]))]).shape[-2:]
    sample = scene.sample(indices, (size[0], size[1]))
    if sample.world_to_camera is None or sample.intrinsics is None:
        raise InputError(f"{scene.origin} has no cameras; quality can only be measured against a reference")
    return sample.relative()


def model_inputs(entry: ModelEntry, views: Views) -> Tensor:
    """The model's input ``[S, 3, H, W]``, float32 on the CPU, of views at a size that it takes, as `sample_views` gives them.

    Pixels are rounded to 8 bits and lie in memory as those of files do, so that the prediction is, bit for bit, that of views which
    are stored as images.
    """
    pixels = (views.images * BITS).round() / BITS
    return entry.normalize(pixels.contiguous(memory_format=torch.channels_last))


@contextlib.contextmanager
def _kernels(protocol: Protocol | None, kernels: DenseKernels) -> Iterator[None]:
    """Prefer the protocol's dense kernel, and note which ran. Nothing without a protocol."""
    if protocol is None:
        yield
        return
    with sdpa_backend(protocol.backend), kernels:
        yield


def _sizes(sizes: Sequence[tuple[int, int]]) -> str:
    shown = ", ".join(f"{width} x {height}" for height, width in sizes[:3])
    return f"{shown}{', ...' if len(sizes) > 3 else ''} pixels"


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
