"""What distillation minimises: how far a model with Lite3R is from itself without, and where there are labels, from these."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..adapter.outputs import ModelOutputs, OutputsFunction
from ..adapter.plugins import find_outputs
from ..adapter.sites import AttentionSite
from ..apply.lookup import look_up
from ..attention.state import ModelState
from ..errors import AdapterError, ConfigError, InputError, short
from ..wrapper import host_of
from .features import FeatureHooks
from .losses import FeatureLoss, Weight, feature_loss, label_losses, output_losses, prediction_losses, weight_at
from .record import run_on
from .teacher import as_teacher


class ObjectiveConfig(Protocol):
    """The fields of `DistillConfig` that say what is minimised."""

    @property
    def mode(self) -> str: ...
    @property
    def attention(self) -> Weight: ...
    @property
    def attention_loss(self) -> FeatureLoss: ...
    @property
    def blocks(self) -> Weight: ...
    @property
    def cameras(self) -> Weight: ...
    @property
    def predictions(self) -> Weight: ...
    @property
    def task(self) -> Weight: ...


class LabelledInputs(Protocol):
    """Inputs of a model as `run_on` takes them, with labels or without: a `Sample`."""

    @property
    def inputs(self) -> Any: ...
    @property
    def labels(self) -> ModelOutputs | None: ...


@dataclass(frozen=True)
class Losses:
    """The losses of one sample.

    Attributes:
        total: The weighted sum, a scalar in FP32, with its graph. In the mode ``"local"`` there is none: gradients are there already.
        parts: Its summands by name, such as ``blocks`` or ``predictions/depth``, detached.
    """

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class _Block:
    """A transformer block and how its tokens are laid out."""

    module: nn.Module
    site: AttentionSite
    state: ModelState

    def special_tokens(self, tokens: int) -> tuple[int, int]:
        """Special tokens of a view, and all of it, in a sequence of `tokens`; 0 special ones where that is not known."""
        source = self.site.tokens
        if source is None or not source.special_tokens:
            return 0, tokens
        tracker = self.state.trackers.get(source.image_module)
        if tracker is not None and tracker.grid is not None:
            view = source.special_tokens + tracker.grid[0] * tracker.grid[1]
        elif self.site.scope != "global":
            view = tokens
        else:
            return 0, tokens
        return (source.special_tokens, view) if tokens % view == 0 else (0, tokens)


class Objective:
    """Runs student and teacher on a sample, and compares them. A context manager: hooks are in the model inside of it only.

    The teacher is the same model, dense and without LoRA, and runs after the student: only what can learn is asked of it, and its
    features are freed with the student's graph. Blocks and sites before anything that learns are left out.

    Args:
        model: The bare model with Lite3R. What learns must require gradients by the first call.
        config: A `DistillConfig`.
        outputs: From what the model returns to `ModelOutputs`; by default what its adapter says (the hook ``lite3r_outputs``), and
            where no adapter says anything, all floating-point tensors of the output are compared alike.

    Raises:
        ModelTypeError, NotAppliedError: `model` is no module, or carries no Lite3R.
        ConfigError: every weight is zero.
    """

    def __init__(self, model: nn.Module, config: ObjectiveConfig, outputs: OutputsFunction | None = None) -> None:
        found = look_up(model)
        self._attention = {name: site for name, site in found.require_applied().items() if site.sparse and site.keep_ratio < 1}
        self._blocks: dict[str, _Block] = {}
        states = {id(module): (state, name) for state in found.states for name, module in state.blocks.items()}
        for name, module in found.modules.items():
            if (host := host_of(module)) is not None and id(host) in states:
                state, own = states[id(host)]
                site = next(site for site in state.sites if site.fqn == own or site.fqn.startswith(f"{own}."))
                if all(block.module is not module for block in self._blocks.values()):
                    self._blocks[name] = _Block(module, site, state)
        self.model = model
        self.config = config
        self.outputs = outputs if outputs is not None else find_outputs(model)
        if not any(self._used(name) for name in ("attention", "blocks", "cameras", "predictions", "task")):
            raise ConfigError("every loss has the weight 0: give attention, blocks, cameras, predictions or task one")
        watched: dict[str, nn.Module] = {}
        if self._used("attention"):
            watched |= {f"attention of {name}": site for name, site in self._attention.items()}
        if self._used("blocks") or self._used("cameras"):
            watched |= {f"block {name}": block.module for name, block in self._blocks.items()}
        self._hooks = FeatureHooks(watched)
        self._learns: frozenset[str] | None = None

    def __enter__(self) -> Objective:
        try:
            self._hooks.attach()
        except BaseException:
            self._hooks.detach()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._hooks.detach()
        finally:
            self._hooks.detach()  # the rest, where an interruption came

    def describe(self) -> str:
        """What is minimised, in one line."""
        parts = []
        if self._used("attention"):
            parts.append(f"{self.config.attention_loss} error of attention at {len(self._attention)} sites")
        if self._used("blocks") or self._used("cameras"):
            parts.append(f"normalised error of {len(self._blocks)} blocks" + (", special tokens apart" if self._used("cameras") else ""))
        if self._used("predictions"):
            parts.append(
                "outputs against the dense model's" + (" (all tensors alike: no adapter maps them)" if self.outputs is None else "")
            )
        if self._used("task"):
            parts.append("outputs against labels")
        return "loss: " + "; ".join(parts)

    def __call__(self, student: nn.Module, sample: LabelledInputs, progress: float) -> Losses:
        """The losses of `student` on `sample`.

        Args:
            student: The model, or what wraps it (DDP, `torch.compile`). It is called once. Without gradients (validation) it works too.
            sample: Inputs of the model, with or without labels.
            progress: The share of the run that is done, in [0, 1], for weights that change.

        Raises:
            InputError: there are no labels, and nothing else is minimised; or labels do not fit.
            AdapterError: outputs or features cannot be compared.
            ConfigError: nothing that is compared depends on anything that learns.
        """
        weights = {
            name: weight_at(getattr(self.config, name), progress) for name in ("attention", "blocks", "cameras", "predictions", "task")
        }
        with contextlib.ExitStack() as stack:
            if self._learns is None:
                stack.enter_context(torch.enable_grad())  # finds out what learns, be it in validation
            recording = stack.enter_context(self._hooks.recording(self._learns))
            output = run_on(student, sample.inputs)
        mine = recording.features()
        if self._learns is None:
            self._learns = frozenset(mine)
        true: dict[str, list[Tensor]] = {}
        dense: Any = None
        if mine or weights["predictions"]:
            with as_teacher(self.model), self._hooks.recording(self._learns) as recording:
                dense = run_on(self.model, sample.inputs)
            true = recording.features()
        if self._hooks.modules and not mine and not weights["predictions"] and not weights["task"]:
            raise ConfigError("no attention and no block that is compared comes after anything that learns")
        parts = self._feature_parts(mine, true, weights)
        if weights["predictions"]:
            parts |= {f"predictions/{name}": weights["predictions"] * x for name, x in self._predictions(output, dense).items()}
        if weights["task"] and sample.labels is not None:
            parts |= {f"task/{name}": weights["task"] * x for name, x in self._task(output, sample.labels).items()}
        if not parts:
            raise InputError(
                "this sample has no labels, and nothing but the task loss is to be minimised: give labels, or other losses weights"
            )
        total = torch.stack([part.float() for part in parts.values()]).sum()
        return Losses(total, {name: part.detach() for name, part in parts.items()})

    def _used(self, name: str) -> bool:
        weight = getattr(self.config, name)
        return any(weight) if isinstance(weight, (tuple, list)) else bool(weight)

    def _feature_parts(
        self, mine: Mapping[str, list[Tensor]], true: Mapping[str, list[Tensor]], weights: Mapping[str, float]
    ) -> dict[str, Tensor]:
        gathered: dict[str, list[Tensor]] = {"attention": [], "blocks": [], "cameras": []}
        for name, features in mine.items():
            if len(true.get(name, ())) != len(features):
                raise AdapterError(
                    f"the {name} ran {len(features)} times in the student and {len(true.get(name, ()))} times in the teacher; if parts of "
                    "the model were compiled before training, compile them anew"
                )
            losses: dict[str, list[Tensor]] = {}
            for student, teacher in zip(features, true[name], strict=True):
                for kind, loss in self._compare(name, student, teacher, weights).items():
                    losses.setdefault(kind, []).append(loss)
            for kind, values in losses.items():
                gathered[kind].append(torch.stack(values).mean())
        return {kind: weights[kind] * torch.stack(values).mean() for kind, values in gathered.items() if values}

    def _compare(self, name: str, student: Tensor, teacher: Tensor, weights: Mapping[str, float]) -> dict[str, Tensor]:
        kind, _, fqn = name.partition(" ")
        if kind == "attention":
            return {"attention": feature_loss(student, teacher, self.config.attention_loss)} if weights["attention"] else {}
        losses = {}
        special, view = self._blocks[fqn].special_tokens(student.shape[1]) if student.dim() == 3 else (0, 0)
        if special:
            student, teacher = (x.unflatten(1, (-1, view)) for x in (student, teacher))
            if weights["cameras"]:
                losses["cameras"] = feature_loss(student[:, :, :special], teacher[:, :, :special])
            student, teacher = student[:, :, special:], teacher[:, :, special:]
        if weights["blocks"]:
            losses["blocks"] = feature_loss(student, teacher)
        return losses

    def _mapped(self, output: Any) -> ModelOutputs:
        assert self.outputs is not None
        return _mapped(self.outputs, output)

    def _predictions(self, output: Any, dense: Any) -> dict[str, Tensor]:
        if self.outputs is None:
            return output_losses(output, dense)
        with torch.no_grad():
            teacher = self._mapped(dense)
        return prediction_losses(self._mapped(output), teacher)

    def _task(self, output: Any, labels: ModelOutputs) -> dict[str, Tensor]:
        if self.outputs is None:
            raise ConfigError(
                "a loss against labels needs to know what the model's outputs mean, and no adapter maps them: pass outputs=, a function "
                "from what the model returns to ModelOutputs, or task=0"
            )
        return label_losses(self._mapped(output), labels)


def _mapped(outputs: Callable[[Any], Any], output: Any) -> ModelOutputs:
    """What `outputs` makes of `output`. Raises `AdapterError` where it fails, or makes something else."""
    try:
        mapped = outputs(output)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise AdapterError(
            f"what the model returned ({type(output).__name__}) could not be mapped to depth, points and poses ({short(error)}); "
            "pass outputs=, a function from it to ModelOutputs"
        ) from error
    if not isinstance(mapped, ModelOutputs):
        raise AdapterError(f"outputs= returned {type(mapped).__name__}, not ModelOutputs")
    return mapped
