"""What Lite3R costs a model in quality: dense and accelerated side by side on the same views."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Sequence
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
from ..scene.data import Scene, Views, pick_views
from ..scene.data.files import read_image
from ..scene.data.sampling import Rule
from ..scene.metrics import Comparison, Fidelity, fidelity
from ..version import __version__
from .run import Run, quiet, run_model

if TYPE_CHECKING:
    from rich.table import Table

DENSE: Literal["dense"] = "dense"
LITE3R: Literal["lite3r"] = "lite3r"
Method = Literal["dense", "lite3r"]
DRAW = 1_000_003  # what the seeds of two draws of views differ by
BITS = 255

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
    """

    conditions: dict[str, Any]
    comparison: Comparison
    fidelity: tuple[Fidelity, ...]
    densities: tuple[float, ...]

    @property
    def density(self) -> float:
        """Mean of `densities`."""
        return statistics.fmean(self.densities)

    def table(self) -> Table:
        """Means of all measures, and the difference of Lite3R and dense with its 95 % interval."""
        return self.comparison.table(DENSE, LITE3R)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-serialisable data; None where a measure is not defined."""
        means = {
            method: {row: _plain(self.comparison.mean(method, row)) for row in self.comparison.rows()} for method in self.comparison.scores
        }
        scenes, near = self.comparison.to_dict(), [score.to_dict() for score in self.fidelity]
        return {**self.conditions, "density": self.density, "means": means, "scenes": scenes, "fidelity": near}


def compare(
    pair: ModelPair,
    scenes: Sequence[Scene],
    views: int = 8,
    *,
    rule: Rule = "spread",
    draws: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_points: int = 20_000,
    progress: Progress = lambda done, total, what: None,
) -> Evaluation:
    """Measure depth, pose and points against the truth, dense and with Lite3R.

    Args:
        pair: The model.
        scenes: With cameras; depth and points are measured where there is depth.
        views: Views of each scene.
        rule: How they are picked, see `lite3r_plugin.scene.data.pick_views`.
        draws: Sets of views from each scene.
        seed: Of the choice of views.
        dtype: Of the computation; FP32 means no autocast.
        max_points: Points of each cloud that are compared.
        progress: Called before each set of views.

    Raises:
        InputError: no scenes, a scene with too few views or without cameras, or a prediction that cannot be measured.
    """
    if not len(scenes):
        raise InputError("there are no scenes to compare on")
    device = pair.device
    comparison, near, densities = Comparison(max_points=max_points), [], []
    total = len(scenes) * draws
    for number, scene in enumerate(scenes):
        for draw in range(draws):
            progress(number * draws + draw, total, scene.name)
            sample = sample_views(pair.entry, scene, pick_views(scene, views, rule, seed + DRAW * draw))
            images = model_inputs(pair.entry, sample).to(device)
            dense = pair.run(DENSE, images, dtype).prediction.geometry()
            run = pair.run(LITE3R, images, dtype)
            mine = run.prediction.geometry()
            comparison.add(sample.geometry(), {DENSE: dense, LITE3R: mine}, scene=number)
            near.append(fidelity(mine, dense))
            densities.append(1.0 if run.density is None else run.density)
    conditions = {
        "model": pair.entry.name,
        "config": describe(pair.model).config.to_dict(),
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "lite3r_plugin": __version__,
        "views": views,
        "rule": rule,
        "draws": draws,
        "seed": seed,
        "max_points": max_points,
    }
    return Evaluation(conditions, comparison, tuple(near), tuple(densities))


def sample_views(entry: ModelEntry, scene: Scene, indices: Sequence[int]) -> Views:
    """Views at the size that a model makes of the first one, cut and resized with exact cameras and depth; the first is the world.

    Args:
        entry: The model.
        scene: With cameras.
        indices: Numbers of frames of `scene`.

    Raises:
        InputError: the scene has no cameras, or its files cannot be read.
    """
    from PIL import Image

    first = scene.frames[indices[0]].image
    height, width = (read_image(first) if isinstance(first, Path) else first).shape[-2:]
    size = entry.preprocess([Image.new("RGB", (width, height))]).shape[-2:]
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


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
