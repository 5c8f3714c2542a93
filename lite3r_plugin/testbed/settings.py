"""Settings of a training run, and the curriculum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from .model import TestbedConfig


@dataclass(frozen=True)
class Shape:
    """Of the samples of a step: height and width in pixels, number of views, and whether the model is compiled for it.

    Compilation takes seconds for each shape, which a shape that is rare does not bring back.
    """

    height: int
    width: int
    views: int
    compiled: bool = True


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum: its share of the schedule, and the shapes that its steps take in turn."""

    share: float
    shapes: tuple[Shape, ...]


_EIGHT, _FOUR, _SIXTEEN = (Shape(224, 224, views) for views in (8, 4, 16))
CURRICULUM = (
    # half resolution is a quarter of the tokens; with full resolution in between, the positions that it lacks stay learnt
    Stage(0.4, (Shape(112, 112, 8), _EIGHT, Shape(112, 112, 8), _FOUR)),
    Stage(
        0.6,
        (_EIGHT, _FOUR, _EIGHT, _SIXTEEN, _EIGHT, _FOUR, _EIGHT, Shape(168, 224, 8, compiled=False))
        + (
            _EIGHT,
            _FOUR,
            _EIGHT,
            _SIXTEEN,
            _EIGHT,
            _FOUR,
            _EIGHT,
            Shape(224, 168, 8, compiled=False),
            _EIGHT,
            Shape(224, 224, 2, compiled=False),
        ),
    ),
)
SMOKE = (Stage(0.5, (Shape(24, 24, 4),)), Stage(0.5, (Shape(48, 48, 8), Shape(32, 48, 2, compiled=False))))
SMOKE_MODEL = TestbedConfig(dim=64, depth=2, stem=16)


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a run.

    Attributes:
        out: Folder for the weights and the metrics.
        minutes: Length of the run, compilation and evaluation included.
        resume: Folder of weights to start from.
        grow: Start from `grow.deeper` of them.
        window: Start and end of the part of the schedule that this run covers, within [0, 1]. Runs that follow each other share one
            schedule.
        worlds: Folder of packed worlds to train on, beside procedural scenes.
        world_share: Share of the samples that come from them.
        workers: Processes that render them, for each process that trains.
        views_per_step: Views of a step at 224 x 224 pixels, for each process; at other sizes as many as have that many pixels.
        learning_rate, weight_decay, warmup: Of both optimizers; warm-up in steps.
        camera_weight: Weight of the camera losses, beside 1 for depth and points.
        match_weight: Weight of the correspondence loss; a third of it in the last third of the schedule.
        pool, refresh: Clips that are kept of each source for each process, and steps after which some of them are replaced: reading a
            view six times on average costs little, and rendering it is a tenth of the work.
        textures, seed: Size of the texture bank, and seed of everything.
        evaluation_scenes: Held-out scenes of each kind, of eight views.
        log_every, evaluate_every: In seconds.
        compile: Compile the blocks of the model.
        smoke: A run of seconds with a tiny model, to see that everything works; `max_steps` ends it.
        max_steps: End after so many steps, if given.
    """

    out: Path
    minutes: float = 10.0
    resume: Path | None = None
    grow: bool = False
    window: Sequence[float] = (0.0, 1.0)
    worlds: Path | None = None
    world_share: float = 0.5
    workers: int = 4
    views_per_step: int = 96
    learning_rate: float = 5e-4
    weight_decay: float = 0.05
    warmup: int = 100
    camera_weight: float = 2.0
    match_weight: float = 0.2
    pool: int = 2048
    refresh: int = 16
    textures: int = 384
    seed: int = 0
    evaluation_scenes: int = 24
    log_every: float = 20.0
    evaluate_every: float = 170.0
    compile: bool = True
    smoke: bool = False
    max_steps: int | None = None

    def __post_init__(self) -> None:
        if self.minutes <= 0 or self.views_per_step < 1 or not 0 <= self.window[0] < self.window[1] <= 1:
            raise ConfigError(f"minutes > 0, views_per_step >= 1 and a window within [0, 1] are needed, got {self}")
        if self.grow and self.resume is None:
            raise ConfigError("only weights that are given can be grown: pass resume too")
