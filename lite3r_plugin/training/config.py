"""What `distill` does, as one configuration object: frozen, validated, read from TOML."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

from ..config import Scope
from ..errors import ConfigError, shown
from ..ops.options import check_choice, is_int, is_number

if TYPE_CHECKING:
    from typing_extensions import Unpack  # of the type checker

Trainable = Literal["proj", "proj+lora", "proj+norms", "blocks"]
Mode = Literal["end_to_end", "local"]
AttentionLoss = Literal["normalized", "mse", "cosine"]
Schedule = Literal["linear", "cosine", "constant"]
Precision = Literal["bf16"]
Tracker = Literal["jsonl", "tensorboard"]
Weight = float | tuple[float, float]
"""Of a loss: the same all the time, or at the start and at the end of the run, with half a cosine in between."""

DEFAULT_STEPS = 500
LARGEST_SEED = 2**63 - 1  # torch takes no more than 64 bits, and each process adds its number
LOCAL_LOSSES = ("attention", "blocks", "cameras")
LOSSES = (*LOCAL_LOSSES, "predictions", "task")


class DistillFields(TypedDict, total=False):
    """All fields of `DistillConfig`, as keywords."""

    trainable: Trainable
    lora_rank: int
    lora_alpha: float | None
    lora_scopes: tuple[Scope, ...]
    mode: Mode
    attention: Weight
    blocks: Weight
    cameras: Weight
    predictions: Weight
    task: Weight
    attention_loss: AttentionLoss
    steps: int | None
    epochs: int | None
    minutes: float | None
    learning_rate: float
    weight_decay: float
    warmup_steps: int | None
    schedule: Schedule
    final_learning_rate: float
    clip: float | None
    accumulate: int
    ema: float | None
    checkpointing: bool
    compile_blocks: bool
    mixed_precision: Precision | None
    seed: int
    batch_size: int
    workers: int
    validate_every: int | None
    patience: int | None
    output_dir: str | None
    save_every: int | None
    resume: bool
    trackers: tuple[Tracker, ...]
    log_every: int


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """How `distill` trains.

    A *step* is one change of the weights: `accumulate` batches on every process. The last thing that says how long is one of `steps`,
    `epochs` and `minutes`; with none of them it is 500 steps.

    Attributes:
        trainable: What learns. ``"proj"``: `proj_lin` of the sparse sites (Lite3R, arXiv 2605.11354). ``"proj+lora"``: besides, LoRA
            (arXiv 2106.09685) on the projections of attention, q, k, v and output. ``"proj+norms"``: besides, the norms of the blocks
            with a sparse site. ``"blocks"``: all of these blocks.
        lora_rank: Rank of the LoRA matrices.
        lora_alpha: They are scaled by this over the rank; None: by 1.
        lora_scopes: The scopes of the sites that get LoRA.
        mode: ``"end_to_end"``: gradients flow back through the whole model. ``"local"``: each block learns from its own output, which
            needs no backward pass through the model and no memory for one. Only the losses attention, blocks and cameras count then.
        attention: Weight of the loss of the outputs of attention at each sparse site.
        blocks: Of the outputs of the blocks with a sparse site.
        cameras: Of the same at special tokens alone: camera, registers, class.
        predictions: Of what the model returns: log depth, points, cameras.
        task: Of the error against labels, for samples that have some.
        attention_loss: How outputs of attention are compared: squared error relative to the size of the teacher's, squared error, or
            1 - cosine.
        steps, epochs, minutes: How long, in one of these units. With `minutes` the schedules follow the clock of the main process, so
            a run is not repeatable to the bit.
        learning_rate: Of AdamW, at its highest.
        weight_decay: Of AdamW.
        warmup_steps: Steps over which the learning rate rises from zero; None: 30, or a tenth of the steps where that is less.
        schedule: How it falls afterwards.
        final_learning_rate: The share of it that is left at the end.
        clip: Largest norm of the gradients; None: any.
        accumulate: Batches of a process in a step.
        ema: Decay of a moving average of the weights, which the model has in the end; None: none.
        checkpointing: Compute the insides of blocks again in the backward pass instead of keeping them: less memory, more time.
        compile_blocks: Run transformer blocks through `torch.compile`, of student and teacher: less time a step, minutes before the first,
            which count in `minutes`. Where a forward cannot be compiled, it is said, and blocks run as without. Not in the mode
            ``"local"``; with `checkpointing`, blocks of the student around sparse attention run as without.
        mixed_precision: ``"bf16"``: autocast, for student and teacher; None: as `accelerate launch` was told, else none.
        seed: Of the order of the data and of LoRA.
        batch_size: Items of `data` that are joined to a batch along the first dimension of their tensors.
        workers: Processes that read the data, for each process that trains.
        validate_every: Steps between two validations; None: ten in a run, if there is something to validate on.
        patience: Stop after so many validations without a better one; None: never. The best weights are kept in any case.
        output_dir: Folder for what a killed run goes on from, and for logs; None: nothing is written.
        save_every: Steps between two savings; None: two minutes. The end is saved in any case.
        resume: Go on from what is in `output_dir`, if there is something.
        trackers: What is logged into `output_dir`: ``"jsonl"`` (``metrics.jsonl``, a line each time) and ``"tensorboard"``.
        log_every: Steps between two entries of logs.

    Raises:
        ConfigError: a field has a value that it does not take, or two contradict each other.

    Examples:
        >>> config = DistillConfig(trainable="proj", minutes=3)
        >>> config.replace(learning_rate=1e-3).minutes
        3
    """

    trainable: Trainable = "proj+lora"
    lora_rank: int = 16
    lora_alpha: float | None = None
    lora_scopes: tuple[Scope, ...] = ("global", "frame")
    mode: Mode = "end_to_end"
    attention: Weight = 0.0
    blocks: Weight = 1.0
    cameras: Weight = 1.0
    predictions: Weight = 1.0
    task: Weight = 0.0
    attention_loss: AttentionLoss = "normalized"
    steps: int | None = None
    epochs: int | None = None
    minutes: float | None = None
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    warmup_steps: int | None = None
    schedule: Schedule = "linear"
    final_learning_rate: float = 0.02
    clip: float | None = 1.0
    accumulate: int = 1
    ema: float | None = None
    checkpointing: bool = False
    compile_blocks: bool = False
    mixed_precision: Precision | None = None
    seed: int = 0
    batch_size: int = 1
    workers: int = 0
    validate_every: int | None = None
    patience: int | None = None
    output_dir: str | None = None
    save_every: int | None = None
    resume: bool = False
    trackers: tuple[Tracker, ...] = ()
    log_every: int = 10

    def __post_init__(self) -> None:
        for name, kind in (
            ("trainable", Trainable), ("mode", Mode), ("attention_loss", AttentionLoss), ("schedule", Schedule),
        ):  # fmt: skip
            check_choice(name, getattr(self, name), get_args(kind))
        if self.mixed_precision is not None:
            check_choice("mixed_precision", self.mixed_precision, get_args(Precision))
        for name, kind in (("lora_scopes", Scope), ("trackers", Tracker)):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)):
                raise ConfigError(f"{name} is a tuple of some of {get_args(kind)}, got {shown(value)}")
            for item in value:
                check_choice(name, item, get_args(kind))
            object.__setattr__(self, name, tuple(value))
        for name in LOSSES:
            self._check_weight(name)
        if not any(any(self.weight(name)) for name in LOSSES):
            raise ConfigError(f"every loss has the weight 0, so there is nothing to learn from: give one of {', '.join(LOSSES)} another")
        for name, least in (("lora_rank", 1), ("accumulate", 1), ("batch_size", 1), ("log_every", 1), ("seed", 0), ("workers", 0)):
            self._check_int(name, least)
        if self.seed > LARGEST_SEED:
            raise ConfigError(f"seed is at most 2**63 - 1, got {shown(self.seed)}")
        for name, least in (
            ("steps", 1), ("epochs", 1), ("warmup_steps", 0), ("validate_every", 1), ("patience", 1), ("save_every", 1),
        ):  # fmt: skip
            if getattr(self, name) is not None:
                self._check_int(name, least)
        for name, most in (
            ("learning_rate", math.inf), ("lora_alpha", math.inf), ("minutes", math.inf), ("clip", math.inf), ("ema", 1),
        ):  # fmt: skip
            value: Any = getattr(self, name)
            optional = name != "learning_rate"
            if not optional if value is None else not (is_number(value) and 0 < value < most):
                raise ConfigError(
                    f"{name} is a number > 0{' and < 1' if most == 1 else ''}{' or None' if optional else ''}, got {shown(value)}"
                )
        for name, most in (("weight_decay", math.inf), ("final_learning_rate", 1.0)):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= most or math.isinf(value):
                raise ConfigError(f"{name} is a number >= 0{' and <= 1' if most == 1 else ''}, got {shown(value)}")
        for name in ("checkpointing", "compile_blocks", "resume"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is True or False, got {shown(getattr(self, name))}")
        given = [f"{name}={getattr(self, name)}" for name in ("steps", "epochs", "minutes") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"a run is as long as one of steps, epochs and minutes says, got {' and '.join(given)}")
        if self.output_dir is not None:
            if not isinstance(self.output_dir, (str, os.PathLike)):
                raise ConfigError(f"output_dir is the name of a folder or None, got {shown(self.output_dir)}")
            object.__setattr__(self, "output_dir", os.fspath(self.output_dir))
        elif needing := [name for name in ("resume", "trackers", "save_every") if getattr(self, name)]:
            raise ConfigError(f"{' and '.join(needing)} need output_dir, a folder to read from and write to")
        if self.mode == "local" and not any(any(self.weight(name)) for name in LOCAL_LOSSES):
            raise ConfigError('mode="local" learns from what blocks give out: give attention, blocks or cameras a weight')
        if self.mode == "local" and self.compile_blocks:
            raise ConfigError('mode="local" stops between blocks to learn, which a compiled one cannot: leave compile_blocks out')

    def weight(self, name: str) -> tuple[float, float]:
        """The weight of a loss at the start and at the end."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value, value)

    def replace(self, **fields: Unpack[DistillFields]) -> DistillConfig:
        """A copy with other values. Unknown names raise `ConfigError`, which lists the known ones."""
        known = [field.name for field in dataclasses.fields(self)]
        if unknown := sorted(set(fields) - set(known)):
            raise ConfigError(f"unknown field(s) of DistillConfig {shown(unknown)}; known are {known}")
        return dataclasses.replace(self, **fields)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable dict, the inverse of ``DistillConfig().replace(**fields)``."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def published(cls, **fields: Unpack[DistillFields]) -> DistillConfig:
        """The recipe of the Lite3R repository (arXiv 2605.11354): `proj_lin` alone, one epoch, the squared error of attention beside the
        task loss, with a weight that falls from 0.1 to 0.01; `fields` are set on top."""
        recipe: DistillFields = {
            "trainable": "proj", "attention": (0.1, 0.01), "attention_loss": "mse", "blocks": 0.0, "cameras": 0.0, "predictions": 0.0,
            "task": 1.0, "learning_rate": 1e-3, "warmup_steps": 30, "schedule": "linear", "final_learning_rate": 0.5,
        }  # fmt: skip
        length: DistillFields = {} if {"steps", "epochs", "minutes"} & set(fields) else {"epochs": 1}
        return cls().replace(**{**recipe, **length, **fields})

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str], **fields: Unpack[DistillFields]) -> DistillConfig:
        """The table ``[distill]`` of a TOML file, or the whole file where it has no tables; `fields` are set on top.

        Raises:
            ConfigError: the file cannot be read, is no TOML, or has a field that is unknown or wrong.
        """
        content = read_toml(path)
        table = content.get("distill", {}) if any(isinstance(value, Mapping) for value in content.values()) else content
        if not isinstance(table, Mapping):
            raise ConfigError(f"{path}: distill is a table of fields of DistillConfig, [distill], got {shown(table)}")
        units = {"steps", "epochs", "minutes"}
        if units & set(fields):  # which say how long instead
            table = {name: value for name, value in table.items() if name not in units}
        try:
            given: dict[str, Any] = {**table, **fields}
            return cls().replace(**given)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def _check_weight(self, name: str) -> None:
        value = getattr(self, name)
        pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
        if len(pair) != 2 or not all(is_number(x) and 0 <= x < math.inf for x in pair):
            raise ConfigError(f"{name} is the weight of a loss, a number >= 0, or a pair of them, (start, end); got {shown(value)}")
        if isinstance(value, (tuple, list)):
            object.__setattr__(self, name, pair)

    def _check_int(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not is_int(value) or value < least:
            raise ConfigError(f"{name} is an integer >= {least}, got {shown(value)}")


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a TOML file says. Raises `ConfigError` where it cannot be read or is none."""
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib  # pyright: ignore[reportMissingImports]

    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is no TOML: {error}") from error
