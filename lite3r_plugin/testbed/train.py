"""Train the testbed on procedural scenes in a fixed time: ``accelerate launch -m lite3r_plugin.testbed.train --minutes 8 --out DIR``.

The learning rate falls to zero at the end of the given time, whatever the speed of the machine, so each run ends annealed. A
run that is given ``--resume DIR`` starts from the weights of an earlier one, and from its optimizer where ``training.pt`` is there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..errors import ConfigError, InputError
from ..files import replacing, write_atomically
from ..scene.procedural import ProcScenes, TextureBank
from .evaluate import evaluate
from .losses import Batch, TrainingModel
from .model import WEIGHTS_NAME, Testbed
from .optimizers import make_optimizers
from .settings import CURRICULUM, SMOKE, SMOKE_MODEL, VIEWS_PER_SCENE, Stage, TrainingConfig

STATE_NAME = "training.pt"
METRICS_NAME = "metrics.json"


class Trainer:
    """One run."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.started = time.monotonic()
        self.step = 0
        self.warm_at = 0.0  # when the first step, which compiles, was over
        self.accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
        self.device = self.accelerator.device
        rank = self.accelerator.process_index
        torch.manual_seed(config.seed)
        torch._dynamo.config.recompile_limit = 64  # the default is fewer than the shapes of the curriculum
        self.stages = [(SMOKE if config.smoke else CURRICULUM)[i - 1] for i in sorted(set(config.stages))]
        state = _read_state(config.resume) if config.resume else None
        if config.resume and state is None:
            self.model = TrainingModel(Testbed.from_pretrained(config.resume).train())
        else:
            self.model = TrainingModel(Testbed(SMOKE_MODEL if config.smoke else None))
        if state is not None:
            _load(self.model, state["model"], config.resume)
        if config.compile:
            bed = self.model.model
            for module in (*bed.aggregator.frame_blocks, *bed.aggregator.global_blocks, bed.aggregator.patch_embed):
                module.compile(dynamic=False)
            bed.depth_head.compile(dynamic=False)
            bed.point_head.compile(dynamic=False)
            self.model.losses = torch.compile(self.model.losses, dynamic=False)
        self.wrapped, *self.optimizers = self.accelerator.prepare(self.model, *make_optimizers(self.model, config, self.device))
        if state is not None:
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        size = 32 if config.smoke else 128
        bank = TextureBank.procedural(12 if config.smoke else config.textures, size, self.device, seed=config.seed)
        # Every process has its own scenes; a resumed run goes on with new ones where it knows how far the earlier one was.
        seed = config.seed + 1000 * rank + (state["step"] if state else 0) + 1
        self.scenes = ProcScenes(bank, self.device, seed, compile=config.compile)
        self.eager_scenes = ProcScenes(bank, self.device, seed)
        self.held_out = self._held_out()
        self.history: list[dict[str, Any]] = []
        self._rendered: tuple[Stage, Batch] | None = None
        self._uses = 0

    def run(self) -> dict[str, Any]:
        """Train until the time is up. Returns the final metrics, which are also written."""
        logged = evaluated = self._elapsed()
        sums: dict[str, Tensor] = {}
        steps = views = 0
        stage = None
        self._say(f"{sum(p.numel() for p in self.model.model.parameters()) / 1e6:.1f} M parameters on {self.device}")
        while (progress := self._progress()) < 1 and self.step != self.config.max_steps:
            current = self._stage(progress)
            if current is not stage:
                stage = current
                self._say(f"stage: {stage.size} px, {stage.views} views, arcs {stage.arcs}")
            batch = self._batch(current)
            losses = self._train_step(batch, progress)
            sums = {name: sums[name] + value if sums else value for name, value in losses.items()}
            if self.step == 1:
                losses["total"].item()  # waits for the device
                self.warm_at = logged = self._elapsed()
                self._say(f"first step done, total loss {losses['total'].item():.3f}")
            steps, views = steps + 1, views + batch["ok"].numel() * self.accelerator.num_processes
            if self.step % 10 == 0 and self.device.type == "cuda":
                torch.cuda.synchronize()  # otherwise the clock runs behind the device
            now = self._elapsed()
            if now - logged >= self.config.log_every or self.step == self.config.max_steps:
                means = {name: (value / steps).item() for name, value in sums.items()}
                if not math.isfinite(means["total"]):
                    raise InputError(f"the loss is not finite at step {self.step}: lower --learning-rate, or resume from --out")
                text = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
                self._say(f"step {self.step:6d}  {views / (now - logged):6.0f} views/s  lr {self._rate(progress):.1e}  {text}")
                logged, sums, steps, views = now, {}, 0, 0
            if now - evaluated >= self.config.evaluate_every:
                evaluated = now
                self._evaluate(current.size)
                self.save()
                logged = self._elapsed()
                sums, steps, views = {}, 0, 0
        for size in sorted({s.size for s in self.stages}):
            self._evaluate(size)
        self.save()
        return self.history[-1]

    def save(self) -> None:
        """Write weights, state and metrics, each file at once or not at all."""
        if not self.accelerator.is_main_process:
            return
        out = self.config.out
        out.mkdir(parents=True, exist_ok=True)
        self.model.model.save_pretrained(out)
        state = {"model": self.model.state_dict(), "step": self.step}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        with replacing(out / STATE_NAME) as part:
            torch.save(state, part)
        metrics = {"steps": self.step, "seconds": round(self._elapsed(), 1), "history": self.history}
        write_atomically(out / METRICS_NAME, json.dumps(metrics, indent=2) + "\n")

    def _train_step(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._rate(progress)
        match_weight = self.config.match_weight / (1 if progress < 2 / 3 else 3)
        loss, losses = self.wrapped(batch, match_weight, self.config.camera_weight)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.wrapped.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return losses

    def _batch(self, stage: Stage) -> Batch:
        """Views of scenes in samples: new scenes, or the last ones in another order, so with another view as the world."""
        if self._rendered is None or self._rendered[0] is not stage or self._uses == self.config.replay:
            self._rendered, self._uses = (stage, self._new_scenes(stage)), 0
        self._uses += 1
        scenes = self._rendered[1]
        order = torch.rand(scenes["ok"].shape, device=self.device).argsort(1)
        row = torch.arange(len(order), device=self.device)[:, None]
        views = stage.views[self.step % len(stage.views)]
        batch = {k: x[row, order].reshape(-1, views, *x.shape[2:]) for k, x in scenes.items()}
        gain = 1 + 0.1 * (torch.rand(*batch["rgb"].shape[:3], 1, 1, device=self.device) - 0.5)
        return batch | {"rgb": (batch["rgb"] * gain).clamp(0, 1)}

    def _new_scenes(self, stage: Stage) -> Batch:
        """New scenes, all of `VIEWS_PER_SCENE` views for one shape of the renderer."""
        if self.config.smoke:
            count, chunk = 1, VIEWS_PER_SCENE
        else:
            count = max(1, round(self.config.views_per_step * (112 / stage.size) ** 2 / VIEWS_PER_SCENE))
            chunk = count * VIEWS_PER_SCENE // 3
        try:
            sample = self._render(self.scenes, count, chunk, stage)
        except Exception as error:  # the compilers of some releases fail on the renderer
            if self.scenes is self.eager_scenes:
                raise
            self._say(f"the renderer does not compile here and goes on uncompiled: {str(error).strip().splitlines()[-1][:200]}")
            self.scenes = self.eager_scenes
            sample = self._render(self.scenes, count, chunk, stage)
        return {k: sample[k] for k in ("rgb", "depth", "valid", "ok", "K", "w2c")}

    def _render(self, scenes: ProcScenes, count: int, chunk: int, stage: Stage) -> dict[str, Tensor]:
        scenes.sampler.arcs, scenes.max_views_per_chunk = stage.arcs, chunk
        return scenes(count, VIEWS_PER_SCENE, stage.size, stage.size)

    def _held_out(self) -> dict[int, Batch]:
        """Scenes with seeds and textures that training does not see, for each image size."""
        config = self.config
        count = 2 if config.smoke else config.evaluation_scenes
        size = 32 if config.smoke else 128
        bank = TextureBank.procedural(12 if config.smoke else 128, size, self.device, seed=config.seed + 77_777)
        samples = {}
        for size in {s.size for s in self.stages}:
            scenes = ProcScenes(bank, self.device, seed=88_888, max_views_per_chunk=32)
            samples[size] = scenes(count, VIEWS_PER_SCENE, size, size)
        return samples

    def _evaluate(self, size: int) -> None:
        # The compiled forward would be compiled again for these shapes without gradients.
        with torch.compiler.set_stance("force_eager"):
            measures = evaluate(self.model.model, self.held_out[size], autocast=self.device.type == "cuda")
        self.history.append({"step": self.step, "seconds": round(self._elapsed(), 1), "size": size, **measures})
        self._say(f"held out, {size} px: " + "  ".join(f"{name} {value:.3f}" for name, value in measures.items()))

    def _rate(self, progress: float) -> float:
        warm = min(1.0, (self.step + 1) / self.config.warmup)
        return self.config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    def _stage(self, progress: float) -> Stage:
        left = progress * sum(stage.share for stage in self.stages)
        for stage in self.stages[:-1]:
            if (left := left - stage.share) < 0:
                return stage
        return self.stages[-1]

    def _elapsed(self) -> float:
        return time.monotonic() - self.started

    def _progress(self) -> float:
        """Share of the time after the first step that is over, the same in all processes."""
        share = (self._elapsed() - self.warm_at) / max(60 * self.config.minutes - self.warm_at, 1e-6) if self.step else 0.0
        if self.accelerator.num_processes == 1:
            return share
        reduced = self.accelerator.reduce(torch.tensor(share, device=self.device), "mean")
        return float(cast("Tensor", reduced))

    def _say(self, text: str) -> None:
        self.accelerator.print(f"[{self._elapsed():6.1f} s] {text}", flush=True)


def _read_state(directory: Path) -> dict[str, Any] | None:
    """The state of an earlier run; None where the folder holds only its weights."""
    if not (directory / STATE_NAME).exists() and (directory / WEIGHTS_NAME).exists():
        return None
    try:
        return torch.load(directory / STATE_NAME, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"cannot resume from {directory / STATE_NAME}: {error}") from error


def _load(model: nn.Module, weights: dict[str, Tensor], directory: Path | None) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"the run in {directory} trained another model: {error}") from error


def parse(arguments: Sequence[str] | None = None) -> TrainingConfig:
    """The settings from the command line."""
    defaults = TrainingConfig(Path())
    parser = argparse.ArgumentParser(prog="lite3r_plugin.testbed.train", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, state and metrics")
    parser.add_argument("--resume", type=Path, help="folder of an earlier run to start from")
    parser.add_argument("--minutes", type=float, default=defaults.minutes, help="length of the run, compilation included")
    parser.add_argument("--views-per-step", type=int, default=defaults.views_per_step, help="views of 112 px a step; fewer of larger ones")
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--warmup", type=int, default=defaults.warmup, help="steps")
    parser.add_argument("--match-weight", type=float, default=defaults.match_weight, help="weight of the correspondence loss")
    parser.add_argument("--camera-weight", type=float, default=defaults.camera_weight, help="weight of the camera losses")
    parser.add_argument("--replay", type=int, default=defaults.replay, help="steps that one batch of rendered scenes serves")
    parser.add_argument("--stages", type=int, nargs="+", default=defaults.stages, help="stages of the curriculum to run, from 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, help="end after so many steps")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on tiny images, to see that everything works")
    return TrainingConfig(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    try:
        Trainer(parse(arguments)).run()
    except (ConfigError, InputError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
