"""Settings of a training run, and the curriculum."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..scene.procedural import ARCS
from .model import TestbedConfig

VIEWS_PER_SCENE = 8


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum, in which all shapes are fixed.

    Attributes:
        share: Of the run's time, relative to the other stages of the run.
        size: Height and width of the images in pixels.
        views: Views of a sample; steps take turns. Divisors of `VIEWS_PER_SCENE`.
        arcs: Angles in radians over which the cameras of a scene spread.
    """

    share: float
    size: int
    views: tuple[int, ...]
    arcs: tuple[float, ...] = ARCS


CURRICULUM = (
    Stage(share=0.15, size=112, views=(4,), arcs=ARCS[:3]),
    Stage(share=0.5, size=112, views=(4, 8)),
    Stage(share=0.6, size=224, views=(8,)),
)
SMOKE = (Stage(share=0.3, size=32, views=(4,)), Stage(share=0.3, size=32, views=(4, 8)), Stage(share=0.4, size=48, views=(8,)))
SMOKE_MODEL = TestbedConfig(dim=64, depth=2, stem=16)


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a run.

    Attributes:
        out: Folder for the weights, the state to resume from, and the metrics.
        minutes: Length of the run, compilation and evaluation included.
        resume: Folder of an earlier run to start from.
        views_per_step: Views of a batch at 112 x 112 pixels; at other sizes as many as have the same number of pixels.
        learning_rate, weight_decay, warmup: Of both optimizers; warm-up in steps.
        camera_weight: Weight of the camera losses, beside 1 for depth and points.
        match_weight: Weight of the correspondence loss; a third of it in the last third of the run.
        replay: Steps that one batch of rendered scenes serves, each time with other orders, groups and colours of its views.
        stages: Stages of the curriculum that are run, counted from 1. A run that goes on where another ended leaves out the first.
        textures, seed: Size of the texture bank, and seed of everything.
        evaluation_scenes: Held-out scenes, each of eight views.
        log_every, evaluate_every: In seconds.
        compile: Compile the model and the renderer.
        smoke: A run of seconds with a tiny model, to see that everything works; `max_steps` ends it.
        max_steps: End after so many steps, if given.
    """

    out: Path
    minutes: float = 8.0
    resume: Path | None = None
    views_per_step: int = 384
    learning_rate: float = 8e-4
    weight_decay: float = 0.05
    warmup: int = 400
    camera_weight: float = 2.0
    match_weight: float = 0.2
    replay: int = 3
    stages: tuple[int, ...] = (1, 2, 3)
    textures: int = 384
    seed: int = 0
    evaluation_scenes: int = 64
    log_every: float = 20.0
    evaluate_every: float = 75.0
    compile: bool = True
    smoke: bool = False
    max_steps: int | None = None

    def __post_init__(self) -> None:
        if self.minutes <= 0 or (self.views_per_step % (12 * VIEWS_PER_SCENE) and not self.smoke):
            raise ConfigError(f"minutes > 0 and views_per_step a multiple of {12 * VIEWS_PER_SCENE} are needed, got {self}")
        if self.replay < 1 or not self.stages or not set(self.stages) <= set(range(1, len(CURRICULUM) + 1)):
            raise ConfigError(f"replay >= 1 and stages of 1 to {len(CURRICULUM)} are needed, got {self}")
