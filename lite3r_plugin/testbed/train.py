"""Train the testbed in a fixed time, on any number of GPUs: ``accelerate launch -m lite3r_plugin.testbed.train --minutes 10 --out DIR``.

The schedule follows the clock, so each run ends where it should, whatever the speed of the machine. A run can start from nothing but
the weights of an earlier one (``--resume DIR``); runs that follow each other share one schedule by their parts of it, for example
``--window 0 0.2`` and then ``--window 0.2 1``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import ConfigError, InputError
from ..files import replacing, write_atomically
from .evaluate import evaluate
from .grow import deeper
from .held_out import KINDS, held_out
from .losses import Batch, TrainingModel
from .model import Testbed
from .optimizers import make_optimizers
from .settings import CURRICULUM, SMOKE, SMOKE_MODEL, Shape, TrainingConfig
from .sources import Sources

MATCHERS_NAME = "matchers.safetensors"  # what only training needs, beside the weights
METRICS_NAME = "metrics.json"
CLOCK_EVERY = 16  # steps; asking the clock waits for the device, and all processes have to see the same time


class Trainer:
    """One run."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.started = time.monotonic()
        self.step = 0
        self.share = 0.0  # of this run's time that is over, the compilation not counted
        self.warm_at = 0.0  # when everything was compiled
        gpu = torch.cuda.is_available()
        self.accelerator = Accelerator(cpu=not gpu, mixed_precision="bf16" if gpu else "no")
        self.device = self.accelerator.device
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        torch.manual_seed(config.seed)
        torch._dynamo.config.recompile_limit = 64  # the default is fewer than the shapes of the curriculum
        self.stages = SMOKE if config.smoke else CURRICULUM
        self.sources = Sources(config, self.device, rank)
        self.model = TrainingModel(self._start())
        if config.resume and (config.resume / MATCHERS_NAME).exists() and not config.grow:
            self.model.load_state_dict({k: v.float() for k, v in load_file(config.resume / MATCHERS_NAME).items()}, strict=False)
        if config.compile:
            aggregator = self.model.model.aggregator
            for block in (*aggregator.frame_blocks, *aggregator.global_blocks):
                block.compile(dynamic=False)
        self.wrapped, *self.optimizers = self.accelerator.prepare(self.model, *make_optimizers(self.model, config, self.device))
        kinds = KINDS if config.worlds else ("rendered", "gate")
        mine = kinds[rank::processes]  # each process evaluates some kinds of scenes
        size, scenes = (24, 1) if config.smoke else (224, config.evaluation_scenes)
        self.held_out = {kind: held_out(kind, scenes, self.device, False, config.worlds, size) for kind in mine}
        self.history: list[dict[str, Any]] = []
        self._say(f"{sum(p.numel() for p in self.model.model.parameters()) / 1e6:.1f} M parameters on {processes} x {self.device.type}")

    def run(self) -> dict[str, Any]:
        """Train until the time is up. Returns the final measures of each kind of scene, which are also written."""
        self.sources.fill(2 if self.config.smoke else 144)
        self._warm_up()
        logged = evaluated = self.warm_at = self._elapsed()
        sums: dict[str, Tensor] = {}
        steps = views = 0
        while self.share < 1 and self.step != self.config.max_steps:
            shape = self._shape()
            batch = self.sources.batch(shape)
            losses = self._train_step(batch, shape)
            sums = {name: sums[name] + value if sums else value for name, value in losses.items()}
            steps, views = steps + 1, views + batch["ok"].numel() * self.accelerator.num_processes
            if self.step % self.config.refresh == 0:
                self.sources.refresh()
            if self.step % CLOCK_EVERY and self.step != self.config.max_steps:
                continue
            now = self._look_at_the_clock()
            if now - logged >= self.config.log_every or self.share >= 1 or self.step == self.config.max_steps:
                self._log({name: (value / steps).item() for name, value in sums.items()}, views / (now - logged))
                logged, sums, steps, views = now, {}, 0, 0
            if now - evaluated >= self.config.evaluate_every and self.share < 0.9:
                self._evaluate()
                self.save()
                evaluated = logged = self._look_at_the_clock()
                sums, steps, views = {}, 0, 0
        self.save()  # whatever happens to the evaluation
        self._evaluate()
        self.save()
        return self.history[-1]

    def save(self) -> None:
        """Write weights and metrics, each file at once or not at all."""
        if not self.accelerator.is_main_process:
            return
        out = self.config.out
        self.model.model.save_pretrained(out)
        rest = {k: v.detach().half().contiguous().cpu() for k, v in self.model.state_dict().items() if not k.startswith("model.")}
        with replacing(out / MATCHERS_NAME) as part:
            save_file(rest, part)
        metrics = {"steps": self.step, "seconds": round(self._elapsed(), 1), "processes": self.accelerator.num_processes}
        metrics |= {"settings": {k: str(v) for k, v in vars(self.config).items()}, "history": self.history}
        write_atomically(out / METRICS_NAME, json.dumps(metrics, indent=1) + "\n")

    def _start(self) -> Testbed:
        if self.config.resume is None:
            return Testbed(SMOKE_MODEL if self.config.smoke else None)
        model = Testbed.from_pretrained(self.config.resume).train()
        return deeper(model) if self.config.grow else model

    def _warm_up(self) -> None:
        """Compile for all shapes of the curriculum. Many worlds are rendered meanwhile."""
        for shape in dict.fromkeys(shape for stage in self.stages for shape in stage.shapes):
            loss, _ = self._forward(self.sources.batch(shape), shape)
            self.accelerator.backward(loss)
            self._say(f"{shape.views} views of {shape.height} x {shape.width}: total loss {loss.item():.3f}")
            self.sources.fill(0)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _forward(self, batch: Batch, shape: Shape) -> tuple[Tensor, dict[str, Tensor]]:
        match_weight = self.config.match_weight / (1 if self._progress() < 2 / 3 else 3)
        with torch.compiler.set_stance("default" if shape.compiled else "force_eager"):
            return self.wrapped(batch, match_weight, self.config.camera_weight)

    def _train_step(self, batch: Batch, shape: Shape) -> dict[str, Tensor]:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._rate()
        loss, losses = self._forward(batch, shape)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.wrapped.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return losses

    def _shape(self) -> Shape:
        over = self._progress() * sum(stage.share for stage in self.stages)
        ends = itertools.accumulate(stage.share for stage in self.stages)
        shapes = self.stages[min(sum(end <= over for end in ends), len(self.stages) - 1)].shapes
        return shapes[self.step % len(shapes)]

    def _rate(self) -> float:
        warm = min(1.0, (self.step + 1) / self.config.warmup)
        return self.config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * self._progress()))

    def _progress(self) -> float:
        start, end = self.config.window
        return start + (end - start) * min(self.share, 1.0)

    def _evaluate(self) -> None:
        # The compiled forward would be compiled again for these shapes without gradients.
        with torch.compiler.set_stance("force_eager"):
            autocast = self.device.type == "cuda"
            rows = [(kind, evaluate(self.model.model, sample, autocast=autocast)) for kind, sample in self.held_out.items()]
        measures = dict(gather_object(rows))
        self.history.append({"step": self.step, "seconds": round(self._elapsed(), 1), "progress": round(self._progress(), 4), **measures})
        for kind, row in sorted(measures.items()):
            self._say(f"held out, {kind}: " + "  ".join(f"{name} {value:.3f}" for name, value in row.items()))

    def _log(self, means: dict[str, float], views_a_second: float) -> None:
        if not math.isfinite(means["total"]):
            raise InputError(f"the loss is not finite at step {self.step}: lower --learning-rate, or resume from --out")
        text = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
        pools = "/".join(str(pool.added) for pool in (self.sources.scene_pool, self.sources.world_pool) if pool is not None)
        self._say(f"step {self.step:6d}  {views_a_second:6.0f} views/s  lr {self._rate():.1e}  clips {pools}  {text}")

    def _look_at_the_clock(self) -> float:
        """Seconds since the start, the main process's in all processes; `share` follows."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # otherwise the clock runs behind the device
        now = float(cast("Tensor", broadcast(torch.tensor(self._elapsed(), device=self.device))))
        self.share = max(0.0, (now - self.warm_at) / max(60 * self.config.minutes - self.warm_at, 1e-6))
        return now

    def _elapsed(self) -> float:
        return time.monotonic() - self.started

    def _say(self, text: str) -> None:
        self.accelerator.print(f"[{self._elapsed():6.1f} s] {text}", flush=True)


def parse(arguments: Sequence[str] | None = None) -> TrainingConfig:
    """The settings from the command line."""
    defaults = TrainingConfig(Path())
    parser = argparse.ArgumentParser(prog="lite3r_plugin.testbed.train", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and metrics")
    parser.add_argument("--resume", type=Path, help="folder of weights to start from")
    parser.add_argument("--grow", action="store_true", help="start from a deeper model that computes the same")
    parser.add_argument("--window", type=float, nargs=2, default=defaults.window, help="part of the schedule, within 0 and 1")
    parser.add_argument("--minutes", type=float, default=defaults.minutes, help="length of the run, compilation included")
    parser.add_argument("--worlds", type=Path, help="folder of packed worlds")
    parser.add_argument("--world-share", type=float, default=defaults.world_share, help="share of the samples that come from worlds")
    parser.add_argument("--workers", type=int, default=defaults.workers, help="processes that render worlds, for each GPU")
    parser.add_argument("--views-per-step", type=int, default=defaults.views_per_step, help="views of 224 px, for each GPU")
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--warmup", type=int, default=defaults.warmup, help="steps")
    parser.add_argument("--match-weight", type=float, default=defaults.match_weight, help="weight of the correspondence loss")
    parser.add_argument("--camera-weight", type=float, default=defaults.camera_weight, help="weight of the camera losses")
    parser.add_argument("--pool", type=int, default=defaults.pool, help="clips that are kept")
    parser.add_argument("--refresh", type=int, default=defaults.refresh, help="steps after which some clips are replaced")
    parser.add_argument("--evaluation-scenes", type=int, default=defaults.evaluation_scenes, help="held-out scenes of each kind")
    parser.add_argument("--evaluate-every", type=float, default=defaults.evaluate_every, help="seconds")
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
