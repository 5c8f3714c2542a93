"""Ways to train that `distillation.py` compares."""

from __future__ import annotations

import dataclasses
from typing import Any

from lite3r_plugin import DistillConfig
from lite3r_plugin.config import Fp8Filter


@dataclasses.dataclass(frozen=True)
class Row:
    """A way to train.

    Attributes:
        name: What users type after ``--rows``.
        calibrated: Fit the linear branch in closed form first.
        training: Fields of `DistillConfig`; None: nothing is trained.
        precision: Of the model that is measured. With ``"fp8"`` it is converted.
        rounds: It trains with fake quantisation; without, an FP8 model is converted from one that was trained in full precision.
        views_a_step: Of all its scenes together.
        labels: It is given labels.
        chosen: Each site has a keep ratio of its own, of the same mean (`choose_keep_ratios`).
        recipe: Which of the `candidates` it is, of the best one.
        fp8_filter: As in `Lite3RConfig`.
    """

    name: str
    calibrated: bool = True
    training: dict[str, Any] | None = None
    precision: str = "full"
    rounds: bool = True
    views_a_step: int = 96
    labels: bool = False
    chosen: bool = False
    recipe: str = ""
    fp8_filter: Fp8Filter = "inner"

    @property
    def trains_in(self) -> str:
        """The precision of the model while it trains."""
        return "fp8_qat" if self.precision == "fp8" and self.rounds else "full"

    @property
    def start(self) -> str:
        """What it starts from, of models that are calibrated alike."""
        return self.trains_in + " chosen" * self.chosen


OURS: dict[str, Any] = {"trainable": "proj+lora", "learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 20}
COMPILED: dict[str, Any] = {"compile_blocks": True}
NO_LENGTH: dict[str, Any] = {"steps": None, "epochs": None}


def table(minutes: float) -> dict[str, Row]:
    """The rows that are compared with each other, by name, each trained for `minutes`."""
    ours = OURS | {"minutes": minutes}
    published = DistillConfig.published().to_dict() | NO_LENGTH | {"minutes": minutes}
    every = [
        Row("applied", calibrated=False),
        Row("calibrated"),
        Row("chosen", chosen=True),
        Row("published", calibrated=False, training=published, labels=True),
        Row("proj", training=ours | {"trainable": "proj"}),
        Row("norms", training=ours | {"trainable": "proj+norms"}),
        Row("lora", training=ours),
        Row("blocks", training=ours | {"trainable": "blocks", "learning_rate": 3e-4}),
        Row("lora-chosen", training=ours | COMPILED, chosen=True),
        Row("lora-qat", training=ours, precision="fp8"),
        Row("lora-no-qat", training=ours, precision="fp8", rounds=False),
        Row("lora-qat-chosen", training=ours | COMPILED, precision="fp8", chosen=True),
        Row("lora-global", training=ours | {"lora_scopes": ("global",)}),
        Row("local", training=ours | {"mode": "local", "attention": 1.0}),
    ]
    return {row.name: row for row in every}


def candidates(minutes: float, precision: str) -> dict[str, Row]:
    """The recipes of which the best one is trained for longer, by name. Each changes the first one in one way that may help."""
    changes: dict[str, dict[str, Any]] = {
        "rank 32": {},
        "rate 2e-3": {"learning_rate": 2e-3},
        "rate 5e-4": {"learning_rate": 5e-4},
        "rank 96": {"lora_rank": 96},
        "blocks": {"trainable": "blocks", "learning_rate": 3e-4},
        "outputs last": {"blocks": (3.0, 0.3), "cameras": (3.0, 0.3), "attention": (1.0, 0.0)},
        "192 views": {"learning_rate": 2e-3, "lora_rank": 64},
        "labels": {"task": 0.5},
    }
    return {
        name: Row(
            name, training=OURS | COMPILED | {"lora_rank": 32, "minutes": minutes} | change, precision=precision,
            views_a_step=192 if name == "192 views" else 96, labels="task" in change, chosen=True,
        )
        for name, change in changes.items()
    }  # fmt: skip


def longer(row: Row, name: str, minutes: float, precision: str) -> Row:
    """The same recipe for longer, under another name."""
    assert row.training is not None
    return dataclasses.replace(row, name=name, training=row.training | {"minutes": minutes}, precision=precision, recipe=row.name)
