"""The steps of a run: batches in, weights changed, everything written down that another process needs to go on."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..adapter.outputs import tensors_of
from ..apply import ranks
from ..apply.lookup import Inventory
from ..attention.inputs import AttentionInputs
from ..attention.module import SparseLinearAttention
from ..errors import CheckpointError, ConfigError, InputError, TrainingError, shown
from .checkpoint import fill_optimizer, like, optimizer_tensors, read_state, write_state
from .config import DEFAULT_STEPS, DistillConfig
from .copies import Average, Copy
from .data import Feed, Sample, share_of
from .draws import drawing
from .objective import Losses, Objective
from .progress import METRICS_NAME, JsonLines, Pace, Progress, peak_bytes, start_peak
from .trainable import Trainable, sparse_sites
from .units import duration, size

if TYPE_CHECKING:
    from accelerate import Accelerator

SAVE_SECONDS = 120.0
VALIDATIONS = 10
LONGEST_WARMUP = 30
MIDDLE = 0.5  # of the run: there every loss that counts at any time has a weight

Validation = Callable[[nn.Module], float] | Iterable[Any] | Dataset[Any]
"""A measure of the model, less is better; or data, as for training, whose loss is that measure."""


@dataclass
class Counts:
    """Where a run is, as numbers that a file can hold.

    Attributes:
        step: Steps that are done.
        seconds: How long they took, in all processes that the run had one after another.
        samples: Samples that all processes together took.
        first_loss, last_loss: Of the first and the last step, the mean over all processes.
        parts: Of the last step that was logged, by name.
        best, best_step: The best validation, and after which step it was; None before the first.
        waited: Validations since that one.
        validated: After which step the last one was; -1 before the first.
    """

    step: int = 0
    seconds: float = 0.0
    samples: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    best: float | None = None
    best_step: int | None = None
    waited: int = 0
    validated: int = -1


class Run:
    """One run of `distill`.

    Args:
        found: The bare model, set up for training.
        student: It, or what is around it where several processes train.
        objective: What is minimised.
        trainable: What learns.
        feed: The data.
        config: The configuration.
        accelerator: The machines.
        progress: What people see.
        validation: What the weights are judged by, or None.
        about: What the model is, for checkpoints: those of another one are refused. JSON.
        precision: Of autocast, or None.

    Attributes:
        counts: Where it is.
        pace: How long steps take.
        stopped: Why it ended.
    """

    def __init__(
        self,
        found: Inventory,
        student: nn.Module,
        objective: Objective,
        trainable: Trainable,
        feed: Feed,
        config: DistillConfig,
        accelerator: Accelerator,
        progress: Progress,
        validation: Validation | None,
        about: Mapping[str, Any],
        precision: torch.dtype | None,
    ) -> None:
        self.found, self.student, self.objective, self.feed, self.config = found, student, objective, feed, config
        self.accelerator, self.progress, self.validation, self.about, self.precision = accelerator, progress, validation, about, precision
        self.model = found.model
        self.parameters = dict(trainable.parameters)
        self.device = next(self.model.parameters()).device
        self.folder = None if config.output_dir is None else Path(config.output_dir)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
        self.steps = total_steps(config, feed)
        self.counts, self.pace, self.stopped = Counts(), Pace(), ""
        self.average = None if config.ema is None else Average(self.parameters, config.ema)
        self.best: Copy | None = None
        self._good = Copy(self.parameters)  # gave a finite loss
        self._good_step = 0
        self._held: int | None = 0  # the step that the weights in the model are of; None while they change
        self._started, self._before, self._saved_at = time.monotonic(), 0.0, 0.0
        self._random: dict[str, Tensor] | None = None  # the state to go on from
        self._not_compiled: str | None = None  # what was said of it
        self._lines: JsonLines | None = None

    def resume(self) -> None:
        """Go on from what is in the folder, if there is something.

        Raises:
            CheckpointError: it is damaged, or of a run with another model, other parameters or other data.
        """
        if self.folder is None or not self.config.resume:
            return
        kept = read_state(self.folder)
        steps = self._gathered(None if kept is None else kept[0]["step"])
        if len(set(steps)) > 1:
            raise CheckpointError(f"the processes find different states in {self.folder}: put output_dir on a disk that all of them see")
        if kept is None:
            self.progress.say(f"nothing to go on from in {self.folder}: starting anew")
            return
        self._restore(*kept)
        self.progress.say(f"going on from step {self.counts.step} of {self.folder}")

    def train(self) -> None:
        """Take all steps that are left. In the end the model has the best weights, their average, or the last ones.

        Raises:
            TrainingError: a loss or a gradient is not finite, or a parameter gets no gradient.
            InputError: there is no data, or all of it has one view and the model attends across views.
            CheckpointError: nothing more can be written.
        """
        start_peak(self.device)
        try:
            with self._logs(), self.progress.bar():
                self._train()
            if self.best is not None:
                self.best.give()
            elif self.average is not None:
                self.average.give()
        except BaseException as error:
            if self._held is None:
                self._good.give()
                self._held = self._good_step
            self.progress.warn(f"{type(error).__name__}; the model has the weights of step {self._held}")
            raise
        finally:
            for parameter in self.parameters.values():
                parameter.grad = None

    @property
    def share(self) -> float:
        """How much of the run is over, from 0 to 1."""
        if self.config.minutes is not None:
            return min(self.counts.seconds / (60 * self.config.minutes), 1.0)
        return min(self.counts.step / (self.steps or 1), 1.0)

    @property
    def samples_a_step(self) -> int:
        """Of all processes."""
        return self.feed.items * self.config.accumulate * self.accelerator.num_processes

    def learning_rate(self) -> float:
        """That of the next step."""
        config = self.config
        warmup = config.warmup_steps
        if warmup is None:
            warmup = LONGEST_WARMUP if self.steps is None else min(LONGEST_WARMUP, self.steps // 10)
        rise = min(1.0, (self.counts.step + 1) / max(warmup, 1))
        fall = {"constant": 0.0, "linear": self.share, "cosine": (1 - math.cos(math.pi * self.share)) / 2}[config.schedule]
        return config.learning_rate * rise * (1 - (1 - config.final_learning_rate) * fall)

    def _train(self) -> None:
        batches = iter(self.feed)
        self._started, self._before = time.monotonic(), self.counts.seconds
        self._saved_at = self.counts.seconds
        if self.counts.step == 0:
            self._validate()
        tenths = int(VALIDATIONS * self.share)
        while not self.stopped:
            if self.share >= 1:
                self.stopped = "all steps are done" if self.steps is not None else "the time is over"
                break
            began = time.monotonic()
            if (given := self._take(batches)) is None:
                if not self.counts.step:
                    raise InputError(f"there is no data: it ended before the first step, which takes {self.config.accumulate} batches")
                self.stopped = "the data ended"
                break
            self._step(given)
            self.pace.add(time.monotonic() - began)
            self._report()
            before, tenths = tenths, int(VALIDATIONS * self.share)
            if self.counts.step % validate_every == 0 if (validate_every := self.config.validate_every) else tenths > before:
                self._validate()
            since = self.counts.seconds - self._saved_at
            if self.counts.step % save_every == 0 if (save_every := self.config.save_every) else since > SAVE_SECONDS:
                self._save()
        if self.counts.validated != self.counts.step:
            self._validate()
        self._save()

    def _take(self, batches: Iterator[Sample]) -> list[Sample] | None:
        """The batches of a step, on the device; None where there are not enough left."""
        given = []
        for _ in range(self.config.accumulate):
            if (sample := next(batches, None)) is None:
                return None
            given.append(sample.to(self.device, non_blocking=True))
        if self._random is not None:  # after the first batch, whose loader may draw numbers of its own
            _set_random_state(self._random, self.device)
            self._random = None
        return given

    def _step(self, given: list[Sample]) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        first = self.pace.steps == 0
        with _Views(self.found if first else None) as views:
            losses = [self._backward(sample, i == len(given) - 1, len(given)) for i, sample in enumerate(given)]
        if first:
            self._check_gradients()
            self._check_views(views)
        if self.objective.not_compiled != self._not_compiled:
            self._not_compiled = self.objective.not_compiled
            self.progress.warn(f"transformer blocks run as without compile_blocks: {self._not_compiled}")
        if self.config.mode == "local":
            self._average_gradients(len(given))
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), math.inf if self.config.clip is None else self.config.clip)
        norm = norm.full_tensor() if ranks.is_shard(norm) else norm  # pyright: ignore[reportAttributeAccessIssue]
        total = torch.stack([loss.total.detach().float() for loss in losses]).mean()
        loss, size_of_gradients, self.counts.seconds = self._agreed(total, norm)
        if not math.isfinite(loss) or not math.isfinite(size_of_gradients):
            self._refuse_to_go_on(loss, given)
        if first and size_of_gradients == 0:
            raise TrainingError(
                "all gradients of the first step are 0, so nothing would ever change: with so few tokens sparse attention leaves nothing "
                "out (give larger images or more views, or smaller block_q and block_k), or the data is constant"
            )
        self._good.take()
        self._good_step = self.counts.step
        self._held = None
        self.optimizer.step()
        self._held = self.counts.step + 1
        self.counts.step = self._held
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(self.counts.step)
        self.counts.samples += self.samples_a_step
        self.counts.last_loss = loss
        self.counts.first_loss = loss if self.counts.first_loss is None else self.counts.first_loss
        self._last = (losses, size_of_gradients)

    def _backward(self, sample: Sample, last: bool, of: int) -> Losses:
        """The losses of one batch, whose gradients are added up; over all processes with the `last` one of a step."""
        with contextlib.nullcontext() if last or self.student is self.model else self.accelerator.no_sync(self.student):
            with self._autocast():
                losses = self.objective(self.student, sample, self.share)
            if self.config.mode == "end_to_end":
                (losses.total / of).backward()
        return dataclasses.replace(losses, total=losses.total.detach())

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        """One region for each batch: casts of weights that are kept longer would be those of old weights."""
        if self.precision is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.precision)

    def _average_gradients(self, batches: int) -> None:
        """Over batches and processes, where no backward pass through `student` does it."""
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad /= batches
                parameter.grad.copy_(self._reduced(parameter.grad))

    def _check_gradients(self) -> None:
        missing = [name for name, parameter in self.parameters.items() if parameter.grad is None]
        if missing:
            raise TrainingError(
                f"{len(missing)} of {len(self.parameters)} parameters that are to learn got no gradient, such as {missing[0]}: no loss "
                "depends on them. Either the data does not reach that part of the model, or it runs without gradients, or comes after all "
                "that is compared: choose another trainable, other lora_scopes, or other losses"
            )

    def _check_views(self, views: _Views) -> None:
        most = max(self._gathered(views.most))
        if most == 1:
            raise InputError(
                "the first batch has one view in each sample, and this model attends across views, which cannot be learnt from one: give "
                "samples of several views (put one of them first, where there are both)"
            )

    def _refuse_to_go_on(self, loss: float, given: list[Sample]) -> None:
        what = "the loss" if not math.isfinite(loss) else "the gradient"
        tensors = (x for sample in given for x in tensors_of(sample.inputs).values() if x.is_floating_point())
        faulty_data = any(self._gathered(not all(bool(x.isfinite().all()) for x in tensors)))
        if not math.isfinite(loss) and not faulty_data:  # the weights of now are not good
            self._good.give()
            self._held = self._good_step
        saved = f"; what was saved is in {self.folder}" if self.folder is not None else ""
        look = "The data of this step has NaN or infinities: leave it out" if faulty_data else "Look for NaN in labels, lower learning_rate"
        raise TrainingError(
            f"{what} is not finite at step {self.counts.step + 1}: the model has the weights of step {self._held}, the last good "
            f"ones{saved}. {look}, or take mixed_precision='bf16' for weights in half precision"
        )

    def _report(self) -> None:
        config, counts = self.config, self.counts
        losses, norm = self._last
        speed = self.samples_a_step / self.pace.seconds
        self.progress.update(self.share, f"loss {counts.last_loss:.4g}, {speed:.3g} samples/s, {size(peak_bytes(self.device))}")
        if self.pace.steps == Pace.WARM_STEPS + 1:
            left = (self.steps - counts.step) * self.pace.seconds if self.steps is not None else 60 * (config.minutes or 0) - counts.seconds
            self.progress.say(
                f"a step takes {duration(self.pace.seconds)}: about {duration(max(left, 0.0))} to go; {speed:.3g} samples/s, peak memory "
                f"{size(peak_bytes(self.device))}"
            )
        if counts.step % config.log_every and counts.step != self.steps:
            return
        mine: dict[str, float] = {}
        for each in losses:
            for name, value in each.parts.items():
                mine[name] = mine.get(name, 0.0) + float(value) / len(losses)
        of_all = self._gathered(mine)
        counts.parts = {name: sum(one.get(name, 0.0) for one in of_all) / len(of_all) for name in sorted(set().union(*of_all))}
        self._log(
            {
                "loss": counts.last_loss, **{f"loss/{name}": value for name, value in counts.parts.items()},
                "learning_rate": self.optimizer.param_groups[0]["lr"], "gradient_norm": norm, "samples": counts.samples,
                "samples_per_second": speed, "seconds": counts.seconds, "peak_bytes": peak_bytes(self.device),
            }
        )  # fmt: skip

    def _log(self, values: dict[str, Any]) -> None:
        if self._lines is not None:
            self._lines.log({"step": self.counts.step, **values})
        if "tensorboard" in self.config.trackers:
            self.accelerator.log({name: value for name, value in values.items() if value is not None}, step=self.counts.step)

    @contextlib.contextmanager
    def _logs(self) -> Iterator[None]:
        if self.accelerator.is_main_process and self.folder is not None and "jsonl" in self.config.trackers:
            self._lines = JsonLines(self.folder / METRICS_NAME, self.counts.step)
        if "tensorboard" in self.config.trackers:
            self.accelerator.init_trackers("tensorboard")
        try:
            yield
        finally:
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def _validate(self) -> None:
        if self.validation is None:
            return
        counts = self.counts
        counts.validated = counts.step
        with self.average.in_place() if self.average is not None else contextlib.nullcontext():
            with torch.no_grad():
                value = self._measure(self.validation)
            if not math.isfinite(value):
                raise TrainingError(f"the validation after step {counts.step} is {value}: look for NaN in its data, or in its measure")
            if counts.best is None or value < counts.best:
                counts.best, counts.best_step, counts.waited = value, counts.step, 0
                if self.best is None:
                    self.best = Copy(self.parameters)
                self.best.take()
            else:
                counts.waited += 1
        self._log({"validation": value})
        if self.config.patience is not None and counts.waited >= self.config.patience and not self.stopped:
            self.stopped = f"{counts.waited} validations brought nothing better than {counts.best:.4g} after step {counts.best_step}"

    def _measure(self, validation: Validation) -> float:
        if callable(validation):
            with self._as_it_is():
                value = validation(self.model)
            number = _number(value)
            if None in self._gathered(number):  # in all processes, lest some wait for the others
                raise InputError(
                    "validation is a function of the model that returns a number, less is better, in every process; "
                    + (f"it returned {shown(value)}" if number is None else "in another process it returned none")
                )
            return float(self._reduced(torch.tensor(number, device=self.device)))
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        if ranks.is_sharded(self.model):
            rank, processes = 0, 1  # shards are gathered by all, for all
        total, count = 0.0, 0
        for sample in share_of(validation, rank, processes):
            with drawing(count, self.device), self._autocast():  # alike in every validation
                total += float(self.objective(self.model, sample.to(self.device), MIDDLE).total)
            count += 1
        totals = self._reduced(torch.tensor([total, count], device=self.device, dtype=torch.float32)).tolist()
        if not totals[1]:
            raise InputError("there is no validation data: it is empty, or was used up; give a list")
        return totals[0] / totals[1]

    @contextlib.contextmanager
    def _as_it_is(self) -> Iterator[None]:
        """Whatever a function of the user's does inside to modes, to what learns and to gradients is taken back."""
        modes = [(module, module.training) for module in self.model.modules()]
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for parameter, learns in flags:
                parameter.requires_grad_(learns)
                parameter.grad = None

    def _agreed(self, loss: Tensor, norm: Tensor) -> tuple[float, float, float]:
        """The mean loss and gradient of all processes, and the seconds on the clock of the main one."""
        now = self._before + time.monotonic() - self._started
        clock = now * self.accelerator.num_processes if self.accelerator.is_main_process else 0.0
        values = torch.stack([loss, norm.detach().float(), torch.tensor(clock, device=loss.device)])
        mean, size_of_gradients, seconds = self._reduced(values).tolist()
        return mean, size_of_gradients, seconds

    def _reduced(self, tensor: Tensor) -> Tensor:
        """The mean over all processes."""
        if self.accelerator.num_processes == 1:
            return tensor
        reduced: Any = self.accelerator.reduce(tensor.clone(), "mean")
        return reduced

    def _gathered(self, value: Any) -> list[Any]:
        """The `value` of each process."""
        from accelerate.utils import gather_object

        return [value] if self.accelerator.num_processes == 1 else gather_object([value])

    def _save(self) -> None:
        """Write the state of now. Raises `CheckpointError` in all processes where it cannot be written."""
        if self.folder is None:
            return
        names = {parameter: name for name, parameter in self.parameters.items()}
        groups: dict[str, Mapping[str, Tensor]] = {"weights": self.parameters, "optimizer": optimizer_tensors(self.optimizer, names)}
        groups |= {kind: copy.values for kind, copy in (("average", self.average), ("best", self.best)) if copy is not None}
        tensors = {f"{kind}/{name}": tensor for kind, group in groups.items() for name, tensor in group.items()}
        main = self.accelerator.is_main_process
        if ranks.is_sharded(self.model):
            ranks.check_mesh(tensors)
        whole = ranks.gather(tensors, main)
        for rank, state in enumerate(self._gathered(_random_state(self.device))):
            whole |= {f"random/{rank}/{name}": value for name, value in state.items()}
        record = {
            **dataclasses.asdict(self.counts), "epoch": self.feed.epoch, "batch": self.feed.batch, "about": self.about,
            "config": self.config.to_dict(), "processes": self.accelerator.num_processes,
            "shapes": {name: list(parameter.shape) for name, parameter in self.parameters.items()},
        }  # fmt: skip
        error: str | None = None
        if main:
            try:
                write_state(self.folder, record, whole)
            except CheckpointError as failed:
                error = str(failed)
        if (said := self._gathered(error)[0]) is not None:
            raise CheckpointError(said)
        self._saved_at = self.counts.seconds

    def _restore(self, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._check_resumable(record)
        groups: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            groups.setdefault(kind, {})[name] = value
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(like(parameter, groups["weights"][name]))
        fill_optimizer(self.optimizer, self.parameters, groups["optimizer"])
        if "best" in groups:
            self.best = Copy(self.parameters)
        for kind, copy in (("average", self.average), ("best", self.best)):
            if copy is not None:
                copy.values = {name: like(parameter, groups[kind][name]) for name, parameter in self.parameters.items()}
        if self.validation is None:  # what was the best by another measure
            self.best = None
        rank = f"{self.accelerator.process_index}/"
        self._random = {name.removeprefix(rank): value for name, value in groups["random"].items() if name.startswith(rank)}
        self.counts = Counts(**{each.name: record[each.name] for each in dataclasses.fields(Counts)})
        self.feed.epoch, self.feed.batch = record["epoch"], record["batch"]
        self._good.take()
        self._held = self._good_step = self.counts.step

    def _check_resumable(self, record: Mapping[str, Any]) -> None:
        config, before, where = self.config.to_dict(), record["config"], self.folder
        shapes = {name: list(parameter.shape) for name, parameter in self.parameters.items()}
        if record["about"] != self.about:
            other = next(name for name in self.about if record["about"].get(name) != self.about[name])
            if other == "weights":
                raise CheckpointError(
                    f"the weights of the model are not those that the run in {where} started from: they are of another model, or have been "
                    "trained or had LoRA merged since; build the model anew, as it was before that run, and resume with it"
                )
            raise CheckpointError(
                f"{where} belongs to another model: its {other} is {record['about'].get(other)}, here {self.about[other]}"
            )
        if record["shapes"] != shapes:
            other = sorted(set(shapes) ^ set(record["shapes"])) or [name for name in shapes if shapes[name] != record["shapes"][name]]
            raise CheckpointError(f"{where} holds other parameters than learn here, the first is {other[0]}: set trainable as it was")
        if record["processes"] != self.accelerator.num_processes:
            raise CheckpointError(
                f"{where} is of a run on {record['processes']} processes, these are {self.accelerator.num_processes}: start as many"
            )
        fixed = [name for name in ("batch_size", "accumulate", "seed", "mode", "lora_rank", "lora_alpha") if config[name] != before[name]]
        fixed += ["ema"] if (config["ema"] is None) != (before["ema"] is None) else []
        if fixed:
            said = ", ".join(f"{name} was {before[name]}, is {config[name]}" for name in fixed)
            raise CheckpointError(f"{where} is of a run with other settings ({said}): set them as they were, or start anew elsewhere")
        if changed := [name for name in config if name not in ("resume", "output_dir") and config[name] != before.get(name)]:
            said = ", ".join(f"{name} was {before.get(name)}, is {config[name]}" for name in changed)
            self.progress.warn(f"the run goes on with other settings: {said}")


class _Views:
    """Watches how many views the samples have at sites that attend across views, inside of its context.

    Attributes:
        most: Of any sample; 0 where no such site was reached, or none can tell.
    """

    def __init__(self, found: Inventory | None) -> None:
        self.most = 0
        self._stack = contextlib.ExitStack()
        self._sites = [] if found is None else [site for site in sparse_sites(found).values() if site.site.scope == "global"]

    def __enter__(self) -> _Views:
        for site in self._sites:
            self._stack.enter_context(site.observe(self._see))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _see(self, site: SparseLinearAttention, inputs: AttentionInputs, out: Tensor) -> None:
        if inputs.layout is not None and not inputs.crossed:
            self.most = max(self.most, inputs.layout.views)
        elif inputs.layout is not None and inputs.key_layout is not None:  # views that attend to others
            self.most = max(self.most, inputs.layout.views + inputs.key_layout.views)


def total_steps(config: DistillConfig, feed: Feed) -> int | None:
    """How many steps a run has; None where the clock ends it.

    Raises:
        ConfigError: epochs of data that does not tell its length.
    """
    if config.minutes is not None:
        return None
    if config.epochs is None:
        return config.steps or DEFAULT_STEPS
    if (batches := feed.batches(config.epochs)) is None:
        raise ConfigError("epochs need data that tells its length (len), which an iterable does not: give steps or minutes")
    return max(1, batches // config.accumulate)


def _number(value: Any) -> float | None:
    """A number, or a tensor or array that holds one, as such; None where it is neither."""
    try:
        return None if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def _random_state(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
