"""`distill`: win the quality back that sparse attention and FP8 cost, by learning from the model itself as it was before.

The teacher is the same model with Lite3R and LoRA switched off: of nothing but what learns of its own is there a second copy. What is
minimised is in `lite3r_plugin.training.objective`, the steps are in `lite3r_plugin.training.loop`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..adapter.outputs import OutputsFunction
from ..apply import ranks
from ..apply.lookup import Inventory, look_up, sums
from ..errors import ConfigError, ConvertedError, InputError, NoSitesError, WeightsError, plural, shown
from ..wrapper import Changes, host_of, is_lora, is_tuner_layer, keeps_copies
from .checkpoint import check_folder
from .config import DistillConfig
from .data import Feed, gives_items
from .loop import Run, Validation
from .objective import Objective
from .progress import Progress, peak_bytes
from .trainable import Trainable, added_parameters, check_branches, choose
from .units import duration, size

if TYPE_CHECKING:
    from accelerate import Accelerator
    from typing_extensions import Unpack

    from .config import DistillFields

TINY_SECONDS = 1e-9
PLAIN_MACHINES = ("NO", "MULTI_CPU", "MULTI_GPU")


@dataclass(frozen=True)
class Distillation:
    """Result of `distill`; printable.

    Attributes:
        trainable: What learned, as in `DistillConfig`.
        learned: How many parameters that were.
        parameters: How many the model has.
        steps: Steps that were taken, in all processes that the run had one after another.
        samples: Samples that all processes together took.
        seconds: How long that took.
        samples_per_second: Of all processes, without the first steps of this one, in which kernels are compiled; with them where there was
            no other, and of all that the run had before where this one took none.
        peak_bytes: The most memory in use on the GPU, on a CPU by the process; None where that is not known.
        first_loss, last_loss: Of the first and of the last step.
        losses: The parts of the last one that was logged, by name, with their weights.
        best, best_step: The best validation, whose weights the model has, and after which step it was; None without validation.
        stopped: Why it ended.
        output_dir: What was written is there, or None.
    """

    trainable: str
    learned: int
    parameters: int
    steps: int
    samples: int
    seconds: float
    samples_per_second: float
    peak_bytes: int | None
    first_loss: float | None
    last_loss: float | None
    losses: Mapping[str, float]
    best: float | None
    best_step: int | None
    stopped: str
    output_dir: Path | None

    def __str__(self) -> str:
        lines = [
            f"distilled {self.trainable}, {self.learned:,} of {self.parameters:,} parameters: {plural(self.steps, 'step')}, "
            f"{plural(self.samples, 'sample')} in {duration(self.seconds)} ({self.samples_per_second:.3g} a second), "
            f"peak memory {size(self.peak_bytes)}; {self.stopped}"
        ]
        if self.first_loss is not None and self.last_loss is not None:
            parts = ", ".join(f"{name} {value:.4g}" for name, value in self.losses.items())
            lines.append(f"  loss {self.first_loss:.4g} -> {self.last_loss:.4g} ({parts})")
        if self.best is not None:
            lines.append(f"  best validation {self.best:.4g} after step {self.best_step}: the model has those weights")
        if self.output_dir is not None:
            lines.append(f"  training state in {self.output_dir}")
        return "\n".join(lines)


@torch.inference_mode(False)
@torch.enable_grad()
def distill(
    model: nn.Module,
    data: Any,
    config: DistillConfig | None = None,
    *,
    validation: Validation | None = None,
    outputs: OutputsFunction | None = None,
    **fields: Unpack[DistillFields],
) -> Distillation:
    """Train what Lite3R added to `model`, and what `trainable` names besides, in place, to give what the model gave before.

    All sparse sites run sparse meanwhile, whether that pays or not. The model is evaluated, not trained, as far as dropout and norms are
    concerned. On several processes (``accelerate launch``, ``torchrun``) all call this with the same model and data, and the step of
    N processes is that of one with N times the batches.

    The teacher is the model as it is when this is called, without Lite3R and LoRA. Everything is checked before anything is changed. After
    an error or an interruption, the model has the weights of the last good step, and but for LoRA everything else is as it was; with
    `output_dir`, ``resume=True`` goes on from what was saved last. On a CPU the losses are then, bit for bit, those of a run that was never
    stopped, if the data draws nothing from a random state of its own.

    Args:
        model: After `apply_lite3r`, in full precision or ``"fp8_qat"``. Where it is on one process; on several, each moves it to its own
            device. One that `fully_shard` (FSDP2) has sharded is trained as it is.
        data: A `DataLoader`, a data set with numbered items, a list, or any other iterable of inputs of the model, or of `Sample`, an input
            with labels. An input is a mapping, passed by keyword, a tuple or list, passed by position, or anything else, passed alone.
        config: The configuration, `DistillConfig()` by default.
        validation: What tells how good the weights are: a function of the model, less is better; or data as `data`, whose loss it is. The
            best weights are kept.
        outputs: What the outputs of the model mean, where its adapter does not say it, or not well.
        **fields: Fields of `DistillConfig` to set on top of `config`.

    Raises:
        ModelTypeError: `model` is no `torch.nn.Module`.
        NotAppliedError: the model carries no Lite3R, or is a part of the one that it was applied to.
        ConvertedError: weights are in FP8, so there is no teacher.
        ConfigError: a wrong field, or one that does not go with this model, data or machine.
        WeightsError: what is to learn cannot: it is in half precision, inside an adapter, offloaded or sharded by another than FSDP2.
        InputError: there is no data, or of one view only for a model that attends across views; or `output_dir` cannot be used.
        TrainingError: the loss is not finite, or a parameter gets no gradient.
        CheckpointError: what is in `output_dir` is of another run, or nothing more can be written there.
        AdapterError: the outputs are not what the adapter, or `outputs`, says.

    Examples:
        >>> model = apply_lite3r(model, keep_ratio=0.25)
        >>> result = distill(model, inputs, trainable="proj", steps=2)
        >>> result.steps
        2
    """
    if config is not None and not isinstance(config, DistillConfig):
        raise ConfigError(f"config is a DistillConfig, got {shown(config)}; single fields are keywords: distill(model, data, steps=1000)")
    config = (config or DistillConfig()).replace(**fields)
    given = set(fields) | {name for name, value in vars(DistillConfig()).items() if getattr(config, name) != value}
    found = look_up(model)
    _check_model(found, config)
    _check_validation(validation)
    accelerator = _accelerator(config)
    precision = _precision(config, accelerator)
    feed = Feed(data, config, accelerator.num_processes, accelerator.process_index)
    progress = Progress(accelerator.is_main_process)
    _check_folder(config, accelerator)
    about = {} if config.output_dir is None else _about(found)  # reads all weights
    devices = [device] if (device := _device(found, accelerator)).type == "cuda" else []
    failure: BaseException | None = None
    with torch.random.fork_rng(devices=devices), ExitStack() as stack, Changes() as lasting:
        passing = Changes()
        for _ in range(2):  # a second time for the rest, where an interruption came
            stack.callback(passing.undo)
        _move(model, device, passing)
        torch.manual_seed(config.seed)
        lora = _lora(found, config, given, lasting, progress)
        found = look_up(model)
        trainable = choose(found, config, lora)
        trainable.freeze(model, passing)
        _set_up(found, config, passing)
        torch.manual_seed(config.seed + accelerator.process_index)
        shared = trainable.shared(found)
        if shared and ranks.is_sharded(model):
            raise ConfigError(
                f"trainable={config.trainable!r} trains weights of the dense model, of which the teacher needs the old, but fully_shard "
                'shows it the new: train "proj" or "proj+lora", or on several processes with whole models'
            )
        originals = {p: nn.Parameter(p.detach().clone(), requires_grad=False) for parameters in shared.values() for p in parameters}
        objective = stack.enter_context(Objective(model, config, outputs, originals))
        student = _student(model, config, accelerator)
        run = Run(found, student, objective, trainable, feed, config, accelerator, progress, validation, about, precision)
        run.resume()
        progress.say(_first_line(found, trainable, run, objective, device, precision))
        # First: a checkpoint without these must not be taken for whole, whatever interrupts.
        (state,) = found.states
        lasting.put(vars(state), "changed", (*state.changed, *shared))
        adapted: list[Any] = [module.base_layer for module in found.modules.values() if is_lora(module) and module not in state.lora]
        lasting.put(vars(state), "adapted", (*state.adapted, *((linear, sums(linear)) for linear in adapted)))
        try:
            run.train()
        except BaseException as error:
            if not run.counts.step:
                raise
            failure = error  # what was put in for good has learned something
    if failure is not None:
        raise failure
    counts = run.counts
    speed = run.samples_a_step / run.pace.seconds if run.pace.steps else counts.samples / max(counts.seconds, TINY_SECONDS)
    result = Distillation(
        config.trainable, trainable.count, trainable.of, counts.step, counts.samples, counts.seconds,
        speed, peak_bytes(device), counts.first_loss, counts.last_loss, dict(counts.parts), counts.best,
        counts.best_step, run.stopped, run.folder,
    )  # fmt: skip
    progress.say(str(result).splitlines()[0])
    # A thread of gloo may still hold the last that was gathered, and one that wants to free it aborts a process which is ending.
    accelerator.wait_for_everyone()
    return result


def _check_model(found: Inventory, config: DistillConfig) -> None:
    state = found.require_one_state("distill")
    found.require_ratios("distill")
    found.require_enabled("distill")
    if found.converted or state.phase == "fp8":
        raise ConvertedError(
            "weights are in FP8, so there is no teacher, and nothing that could learn: distill before convert(model), with "
            'apply_lite3r(model, precision="fp8_qat") to train for FP8'
        )
    found.require_whole(state, "distill")
    if state.config.whole_model.weights != "host":
        raise ConfigError(
            "weights in BF16 are too coarse to learn with, and the teacher needs those that the model came with: distill without "
            'preset="fast" (or with weights="host"), save_lite3r, and load_lite3r(model, directory, preset="fast")'
        )
    check_branches(found, config)
    adapter = next((n for n, m in found.modules.items() if m not in state.lora and (is_tuner_layer(m) or keeps_copies(m))), None)
    if adapter is not None and config.trainable == "proj+lora" and not any(map(is_lora, found.modules.values())):
        raise ConfigError(
            f"there is an adapter of PEFT in the model ({adapter}) that has no LoRA, and would not hold one that is put in now: take "
            'trainable="proj", or Lite3RPeftConfig(lora_scopes=("global", "frame")) of lite3r_plugin.peft'
        )
    if adapter is not None and config.trainable not in ("proj", "proj+lora"):
        raise ConfigError(
            f"trainable={config.trainable!r} trains weights of the model itself, and there is an adapter of PEFT in it ({adapter}), which "
            'would not hold them: take "proj+lora" or "proj", or merge it before by model.merge_and_unload()'
        )
    if any(parameter.is_inference() for parameter in found.model.parameters()):
        raise WeightsError("the model was made in torch.inference_mode, where nothing learns: build it outside of that")
    flat = [fqn for fqn, module in found.modules.items() if "_flat_param" in module._parameters]
    if flat:
        raise WeightsError(
            f"{flat[0] or 'the model'} is sharded by FullyShardedDataParallel, which trains only as a whole: use fully_shard"
        )
    if config.mode == "local" and ranks.is_sharded(found.model):
        raise ConfigError('mode="local" stops inside of the forward of a sharded model, which gathers its weights: use mode="end_to_end"')
    wrapped = next((m for m in found.modules.values() if isinstance(m, nn.parallel.DistributedDataParallel)), None)
    if wrapped is not None:
        raise ConfigError("the model is inside of DistributedDataParallel: give distill the model itself, which it wraps on its own")


def _check_validation(validation: Any) -> None:
    if validation is None or callable(validation):
        return
    if not gives_items(validation) or isinstance(validation, Iterator):
        raise InputError(
            "validation is a function of the model, or a list, data set or DataLoader of its inputs, which is run through again and again; "
            f"got {type(validation).__name__}"
        )


def _accelerator(config: DistillConfig) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.utils import get_int_from_env

    options: dict[str, Any] = {}
    if "tensorboard" in config.trackers:
        from accelerate.utils import is_tensorboard_available

        if not is_tensorboard_available():
            raise ConfigError("the tracker 'tensorboard' needs the library: pip install tensorboard, or use 'jsonl'")
        options = {"log_with": "tensorboard", "project_dir": config.output_dir}
    accelerator = Accelerator(**options)
    if accelerator.num_processes == 1 and (started := get_int_from_env(["WORLD_SIZE"], 1)) > 1:
        raise ConfigError(
            f"the launcher started {started} processes (WORLD_SIZE), but accelerate lets this one train alone, as without a GPU: "
            "set ACCELERATE_USE_CPU=true or make accelerate.PartialState(cpu=True) first; or unset WORLD_SIZE"
        )
    if accelerator.distributed_type.value not in PLAIN_MACHINES:
        raise ConfigError(
            f"accelerate was told to train by {accelerator.distributed_type.value}; distill trains on one or several processes, each with "
            "a whole model or with one that fully_shard (FSDP2) has sharded: choose multi-GPU, and call fully_shard before distill"
        )
    return accelerator


def _precision(config: DistillConfig, accelerator: Accelerator) -> torch.dtype | None:
    wanted = config.mixed_precision or accelerator.mixed_precision
    if wanted not in ("no", "bf16"):
        raise ConfigError(f"accelerate was told to use mixed precision {wanted!r}; distill takes 'bf16' or none")
    return torch.bfloat16 if wanted == "bf16" else None


def _check_folder(config: DistillConfig, accelerator: Accelerator) -> None:
    """In the main process; all raise alike."""
    if config.output_dir is None:
        return
    error: str | None = None
    if accelerator.is_main_process:
        try:
            check_folder(Path(config.output_dir), config.resume)
        except InputError as failed:
            error = str(failed)
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        error = broadcast_object_list([error])[0]
    if error is not None:
        raise InputError(error)


def _about(found: Inventory) -> dict[str, Any]:
    state = found.states[0]
    return {
        "adapter": state.adapter,
        "configuration": state.config.settled.replace(fp8_backend="auto").to_dict(),
        "weights": _fingerprint(found),
    }


def _fingerprint(found: Inventory) -> int | None:
    """A sum over the bits of the dense model's own parameters, whatever is around them; None where they are sharded."""
    added = added_parameters(found)
    own = [parameter for parameter in found.model.parameters() if id(parameter) not in added]
    if any(ranks.is_shard(parameter) or parameter.is_meta for parameter in own):
        return None
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = (p.detach().reshape(-1).view(integers[p.element_size()]) for p in own if p.element_size() in integers)
    return sum(int(x.sum(dtype=torch.int64)) for x in bits)


def _device(found: Inventory, accelerator: Accelerator) -> torch.device:
    """Where to train: where the model is, or with several processes where each of them is told to."""
    devices = {parameter.device for parameter in found.model.parameters()}
    if accelerator.num_processes == 1 or ranks.is_sharded(found.model):
        return next(iter(devices))
    if len(devices) > 1:
        raise ConfigError(f"the model is spread over {sorted(map(str, devices))}; on several processes each needs one on one device")
    return accelerator.device


def _move(model: nn.Module, device: torch.device, changes: Changes) -> None:
    before = next(model.parameters()).device
    if before != device and not ranks.is_sharded(model):
        changes.make(functools.partial(model.to, device), functools.partial(model.to, before))


def _lora(found: Inventory, config: DistillConfig, given: set[str], changes: Changes, progress: Progress) -> dict[str, nn.Parameter]:
    """The matrices of LoRA by name: of that which is in the model, active where PEFT put it in, else of what is put in now."""
    if config.trainable != "proj+lora":
        return {}
    layers: dict[str, Any] = {name: module for name, module in found.modules.items() if is_lora(module)}
    if layers:
        _check_lora(found, layers, config, given, progress)
    else:
        from ..peft import add_lora

        add_lora(found.model, rank=config.lora_rank, alpha=config.lora_alpha, scopes=config.lora_scopes, changes=changes)
        layers = {name: module for name, module in look_up(found.model).modules.items() if is_lora(module)}
    return {
        f"{name}.{matrix}.{adapter}.{inside}": parameter
        for name, layer in layers.items()
        for matrix in ("lora_A", "lora_B")
        for adapter, module in getattr(layer, matrix).items()
        if adapter in layer.active_adapters
        for inside, parameter in module.named_parameters()
    }


def _check_lora(found: Inventory, layers: dict[str, Any], config: DistillConfig, given: set[str], progress: Progress) -> None:
    """Raise `ConfigError` where LoRA that is in the model is not what was asked for by name; say where it is not the default."""
    from ..peft.lora import projections

    active = {(layer, name) for layer in layers.values() for name in layer.active_adapters if name in layer.lora_A}
    ranks_of, alphas = ({numbers(layer)[name] for layer, name in active} for numbers in (lambda x: x.r, lambda x: x.lora_alpha))
    differing = ["lora_rank"] if ranks_of != {config.lora_rank} else []
    differing += ["lora_alpha"] if alphas != (ranks_of if config.lora_alpha is None else {config.lora_alpha}) else []
    try:
        around = {linear.tuner for linear in projections(found, config.lora_scopes)}
    except NoSitesError:
        around = set()
    differing += ["lora_scopes"] if around != set(layers.values()) else []
    if not differing:
        return
    there = f"rank {_numbers(ranks_of)} and alpha {_numbers(alphas)} around {plural(len(set(layers.values())), 'Linear')}"
    said = ", ".join(f"{name}={getattr(config, name)!r}" for name in differing)
    if asked := given.intersection(differing):
        raise ConfigError(
            f"the model has LoRA already, of {there}, which {said} does not describe: leave {' and '.join(sorted(asked))} out to train "
            "that one, or fold it in by merge_lora(model), of PEFT by model.merge_and_unload(), before distill puts in another"
        )
    progress.say(f"the LoRA that is in the model goes on, of {there}; {said} would be for one that is put in")


def _numbers(values: set[Any]) -> str:
    return " or ".join(f"{value:g}" for value in sorted(values)) or "none that is active"


def _set_up(found: Inventory, config: DistillConfig, changes: Changes) -> None:
    """Let all sparse sites run sparse, evaluate, and keep less of blocks where that is wanted."""
    state = found.states[0]
    changes.put(vars(state), "config", state.config.replace(dense_below=0))
    for module in dict.fromkeys(found.modules.values()):
        if module.training:
            changes.put(vars(module), "training", False)
    if config.checkpointing:
        hosts = set(state.blocks.values())
        for module in dict.fromkeys(found.modules.values()):
            if host_of(module) in hosts:
                changes.put(vars(module), "forward", functools.partial(_recomputed, module.forward))


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    """What `forward` returns, without keeping what its backward pass needs."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


class _Around(nn.Module):
    """The model, for whatever writes attributes into what it wraps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def _student(model: nn.Module, config: DistillConfig, accelerator: Accelerator) -> nn.Module:
    """The model, or what adds up its gradients over processes around it."""
    if accelerator.num_processes == 1 or ranks.is_sharded(model) or config.mode == "local":
        return model
    return accelerator.prepare_model(_Around(model))


def _first_line(
    found: Inventory, trainable: Trainable, run: Run, objective: Objective, device: torch.device, precision: torch.dtype | None
) -> str:
    config, processes = run.config, run.accelerator.num_processes
    length = plural(run.steps, "step") if run.steps is not None else f"{config.minutes:g} min"
    where = f"{processes} processes on {device.type}" if processes > 1 else str(device)
    number = "bfloat16 autocast" if precision is not None else str(next(found.model.parameters()).dtype).removeprefix("torch.")
    return (
        f"distilling {found.name}: {config.trainable}, {trainable.count:,} of {trainable.of:,} parameters learn "
        f"({trainable.count / trainable.of:.2%}); {length} of {plural(run.samples_a_step, 'sample')}, {where}, {number}; "
        f"{objective.describe()}"
    )
