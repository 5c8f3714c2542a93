"""What distillation minimises: how far a model with Lite3R is from itself without, and where there are labels, from these."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

from ..adapter.outputs import ModelOutputs, OutputsFunction
from ..apply.lookup import look_up
from ..errors import ConfigError, ConvertedError, InputError
from ..runtime.compile import NONE_THERE, CompiledBlocks, is_of_compiler, why_not_compiled
from .config import LOCAL_LOSSES, LOSSES, DistillConfig
from .data import Sample
from .draws import drawing, new_seed
from .features import Recorder, is_compiled
from .local import LocalPass
from .losses import label_losses, weight_at
from .outputs import OutputReader, compare
from .record import run_on
from .teacher import Originals, as_teacher
from .watched import Watched

NOTHING_TO_COMPARE = "this sample has no labels, and nothing but the task is to be learnt: give labels, or other losses a weight"


@dataclass(frozen=True)
class Losses:
    """The losses of one sample.

    Attributes:
        total: The weighted sum, a scalar in FP32, with its graph. In the mode ``"local"`` it has none: gradients are there already.
        parts: Its summands by name, such as ``blocks`` or ``predictions/depth``, detached.
    """

    total: Tensor
    parts: dict[str, Tensor]


class Objective:
    """Runs student and teacher on a sample, and compares them. A context manager: the model has hooks inside of it only.

    The teacher is the same model, dense and without LoRA, and runs after the student: only what can learn is asked of it, and its
    features go with the student's graph. Both draw the same random numbers (`drawing`), where the model draws any. Blocks and sites
    that come before anything that learns are left out. Weights of a kind of feature are for its mean over all sites or blocks.

    In the mode ``"local"`` each block is compared with the dense block on the student's own input, its backward pass runs inside the
    forward, and only attention, blocks and cameras count. The student's wrapper is passed by then: gradients are those of this process
    alone, added to what is there, and whoever trains on several processes averages them before the step of the optimizer.

    Args:
        model: The bare model with Lite3R. What learns must require gradients by the first call.
        config: What it is to minimise, and how.
        outputs: From what the model returns to `ModelOutputs`; by default what its adapter says (the hook ``lite3r_outputs``), and
            where no adapter says anything, all floating-point tensors of the output are compared alike.
        originals: What those weights of the dense model were that learn.

    Attributes:
        not_compiled: Why blocks run eagerly although they were to be compiled, or None.

    Raises:
        ModelTypeError, NotAppliedError: `model` is no module, or carries no Lite3R.
        ConvertedError: its weights are in FP8, so there is no teacher.
        ConfigError: there is nothing to compare for a loss that has a weight.
    """

    def __init__(
        self, model: nn.Module, config: DistillConfig, outputs: OutputsFunction | None = None, originals: Originals | None = None
    ) -> None:
        found = look_up(model)
        found.require_applied()
        if found.converted:
            raise ConvertedError("distillation needs the weights that convert(model) replaced by FP8: train with precision='fp8_qat' first")
        self.model, self.config, self.originals = model, config, originals
        self._reader = OutputReader.of(model, outputs)
        self._used = {name for name in (LOCAL_LOSSES if config.mode == "local" else LOSSES) if any(config.weight(name))}
        if "task" in self._used and self._reader.function is None:
            raise ConfigError(
                "a loss against labels needs to know what the model's outputs mean, and no adapter says so: pass outputs=, a function from "
                "what the model returns to ModelOutputs, or task=0"
            )
        self._watched = Watched.of(
            found, sites="attention" in self._used, blocks=bool(self._used & {"blocks", "cameras"}) or config.mode == "local",
            kind=config.attention_loss,
        )  # fmt: skip
        if "attention" in self._used and not self._watched.sites:
            raise ConfigError("no site is sparse (keep_ratio is 1), so there is no error of attention: give it the weight 0")
        self._recorder = Recorder(self._watched.modules)
        self._learning: frozenset[str] | None = None
        self._blocks = CompiledBlocks(model) if config.compile_blocks else None
        self.not_compiled: str | None = None
        self._hooks = contextlib.ExitStack()

    def __enter__(self) -> Objective:
        self._hooks.enter_context(self._recorder.attached())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hooks.close()

    def describe(self) -> str:
        """What is minimised, in one line."""
        parts = []
        if "attention" in self._used:
            parts.append(f"{self.config.attention_loss} error of {len(self._watched.sites)} sparse attentions")
        if self._used & {"blocks", "cameras"}:
            what = "blocks' special tokens" if "blocks" not in self._used else "blocks"
            apart = ", special tokens apart" if {"blocks", "cameras"} <= self._used else ""
            parts.append(f"normalised error of {len(self._watched.blocks)} {what}{apart}")
        if "predictions" in self._used:
            alike = ", all tensors alike, since no adapter says what they mean" if self._reader.function is None else ""
            parts.append(f"outputs against the dense model's{alike}")
        if "task" in self._used:
            parts.append("outputs against labels, where there are any")
        if self.config.mode == "local":
            unused = [name for name in ("predictions", "task") if any(self.config.weight(name))]
            parts.append("block by block" + (f" ({' and '.join(unused)} not used in this mode)" if unused else ""))
        return f"loss: {'; '.join(parts)}"

    def __call__(self, student: nn.Module, sample: Sample, progress: float) -> Losses:
        """The losses of `student` on `sample`.

        Args:
            student: The model, or what wraps it (DDP, `torch.compile`). It is called once. Without gradients (validation) it works too.
            sample: Inputs of the model, with labels or without.
            progress: The share of the run that is done, in [0, 1], for weights that change.

        Raises:
            InputError: there are no labels, and nothing else is to be learnt; or labels do not fit.
            AdapterError: outputs or features cannot be compared.
            ConfigError: nothing that is compared comes after anything that learns.
        """
        weights = {name: weight_at(*self.config.weight(name), progress) for name in LOSSES if name in self._used}
        seed = new_seed()
        try:
            losses = self._losses(student, sample, weights, seed)
        except Exception as error:
            if self._blocks is None or not is_of_compiler(error):
                raise
            self._blocks, self.not_compiled = None, why_not_compiled(error)
            losses = None
        if self._blocks is not None and self._blocks.has_none:
            self._blocks, self.not_compiled = None, NONE_THERE
        return self._losses(student, sample, weights, seed) if losses is None else losses

    def _losses(self, student: nn.Module, sample: Sample, weights: dict[str, float], seed: int) -> Losses:
        device = next(self.model.parameters()).device
        if self.config.mode == "local":
            local = LocalPass(self._watched, self._recorder, weights, self.originals)
            with drawing(seed, device):
                local.run(self.model, sample.inputs)
            return _sum_up(local.parts)
        with contextlib.ExitStack() as stack:
            if self._learning is None:
                stack.enter_context(torch.enable_grad())  # to see what learns, in validation too
            recording = stack.enter_context(self._recorder.recording(self._learning))
            stack.enter_context(drawing(seed, device))
            stack.enter_context(self._compiled())
            output = run_on(student, sample.inputs)
        mine = recording.features()
        if self._learning is None:
            self._check_seen(student, recording.found.keys(), mine.keys())
            self._learning = frozenset(mine)
        true, dense = {}, None
        if mine or "predictions" in weights:
            context = as_teacher(self.model, self.originals)
            with context, drawing(seed, device), self._recorder.recording(frozenset(mine)) as recording, self._compiled():
                dense = run_on(self.model, sample.inputs)
            true = recording.features()
        parts = {
            name: weights[name] * torch.stack(errors).mean() for name, errors in self._watched.compare(mine, true, weights.keys()).items()
        }
        if "predictions" in weights:
            losses = compare(self._reader.read(output), self._reader.read(dense))
            parts |= {f"predictions/{name}": weights["predictions"] * loss for name, loss in losses.items()}
        if "task" in weights and sample.labels is not None:
            mapped = self._reader.read(output)
            assert isinstance(mapped, ModelOutputs)
            losses = label_losses(mapped, sample.labels)
            parts |= {f"task/{name}": weights["task"] * loss for name, loss in losses.items()}
        if not parts:
            raise InputError(NOTHING_TO_COMPARE)
        return _sum_up(parts)

    def _compiled(self) -> contextlib.AbstractContextManager[None]:
        """Blocks run compiled inside the context, where they are to. Sites are looked at anew: the teacher's are dense."""
        return contextlib.nullcontext() if self._blocks is None else self._blocks.running()

    def _check_seen(self, student: nn.Module, seen: Collection[str], learning: Collection[str]) -> None:
        """Raise `ConfigError` where hooks did not see what there is to compare, or none of it comes after anything that learns."""
        unseen = {module for name, module in self._recorder.modules.items() if name not in seen}
        for part in student.modules() if unseen else ():
            if is_compiled(part) and not unseen.isdisjoint(part.modules()):
                raise ConfigError(
                    f"parts of this {type(self.model).__name__} ran compiled before, and what is compiled then does not see the hooks that "
                    "compare features: call torch.compiler.reset() first, so that it is compiled anew"
                )
        if self._recorder.modules and not learning:
            raise ConfigError("no block or attention that is compared comes after anything that learns")


def _sum_up(parts: dict[str, Tensor]) -> Losses:
    return Losses(torch.stack([part.float() for part in parts.values()]).sum(), {name: part.detach() for name, part in parts.items()})
