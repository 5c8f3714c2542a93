"""Rendered scenes in files, as training data and to measure on: rendered once, read by all processes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lite3r_plugin.adapter.outputs import ModelOutputs
from lite3r_plugin.files import replacing
from lite3r_plugin.scene.metrics import auc, depth_metrics, pair_errors
from lite3r_plugin.scene.procedural import ProcScenes, TextureBank
from lite3r_plugin.training.data import Sample

MEASURES = ("abs_rel", "auc30", "auc15", "auc5")
SEEDS = {"training": 4_001, "selection": 51_001, "held_out": 91_001}
PART, AT_ONCE = 64, 8  # scenes of a file, and that are drawn together


class Renderer:
    """Renders scenes of one size into files. What it compiles serves for all of them.

    Args:
        folder: For the files.
        views, size: Of a scene, and height and width in pixels.
        device: Where to render.
    """

    def __init__(self, folder: Path, views: int, size: int, device: torch.device) -> None:
        self.folder, self.views, self.size, self.device = folder, views, size, device
        self._banks: dict[str, TextureBank] = {}
        self._scenes: ProcScenes | None = None

    def render(self, kind: str, part: int, count: int) -> None:
        """Write the first `count` scenes of one part of a kind: images in bytes, depth in half floats, 0 where there is none."""
        if kind not in self._banks:
            textures = (128, 128) if self.size > 64 else (12, 32)
            self._banks[kind] = TextureBank.procedural(*textures, self.device, seed=SEEDS[kind])
        if self._scenes is None:
            compiled = self.device.type == "cuda"
            self._scenes = ProcScenes(self._banks[kind], self.device, max_views_per_chunk=2 * self.views, compile=compiled)
        self._scenes.bank = self._banks[kind]
        self._scenes.sampler.g.manual_seed(SEEDS[kind] + 1 + part)
        made = []
        for start in range(0, count, AT_ONCE):
            sample = self._scenes(min(AT_ONCE, count - start), self.views, self.size, self.size)
            packed = {"rgb": (sample["rgb"] * 255).round().to(torch.uint8), "depth": (sample["depth"] * sample["valid"]).half()}
            made.append({name: value.cpu() for name, value in (packed | {name: sample[name] for name in ("K", "w2c", "ok")}).items()})
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(part_file(self.folder, kind, part)) as path:
            save_file({name: torch.cat([one[name] for one in made])[:count].contiguous() for name in made[0]}, path)


def part_file(folder: Path, kind: str, part: int) -> Path:
    """Where a part of a kind of scenes lies."""
    return folder / f"{kind}-{part:03d}.safetensors"


class Scenes:
    """Scenes in memory: ``rgb`` ``[N, S, 3, H, W]`` in bytes, ``depth`` in half floats, ``K``, ``w2c``, ``ok``.

    Args:
        folder: Where they were rendered to.
        kind: Which.
        count: N.
        device: Where they are to lie.
    """

    def __init__(self, folder: Path, kind: str, count: int, device: torch.device | str = "cpu") -> None:
        parts = [load_file(part_file(folder, kind, part)) for part in range(-(-count // PART))]
        self.parts = {name: torch.cat([part[name] for part in parts])[:count].to(device) for name in parts[0]}

    def __len__(self) -> int:
        return len(self.parts["rgb"])

    def samples(self, seed: int, views_a_step: int, counts: Sequence[int], labels: bool, device: torch.device) -> Iterator[Sample]:
        """Samples without end, of `counts` views in turn and so many scenes that `views_a_step` come together.

        Views are in random order, so that each is the reference at times.
        """
        generator = torch.Generator().manual_seed(seed)
        total = self.parts["rgb"].shape[1]
        for views in itertools.cycle([min(count, total) for count in counts]):
            scenes = torch.randperm(len(self), generator=generator)[: max(1, views_a_step // views)]
            order = torch.stack([torch.randperm(total, generator=generator)[:views] for _ in scenes])
            part = {name: value[scenes[:, None], order].to(device) for name, value in self.parts.items()}
            truth = None
            if labels:
                depth = part["depth"].float()
                truth = ModelOutputs(torch.where(depth > 0, depth, torch.nan), world_to_camera=part["w2c"], intrinsics=part["K"])
            yield Sample({"images": part["rgb"].float() / 255}, truth)


@torch.no_grad()
def measure(
    model: nn.Module, scenes: Scenes, views: int, subsets: int, views_at_once: int, device: torch.device, threads: int
) -> dict[str, list[float]]:
    """The `MEASURES` of each scene, NaN where it has none: means over `subsets` choices of `views` views that lie spread.

    The model runs on the device; predictions are judged in FP64 on the CPU meanwhile, a scene a thread.
    """
    every = max(1, scenes.parts["rgb"].shape[1] // views)
    offsets = [i * every // subsets for i in range(min(subsets, every))]
    at_once = max(1, views_at_once // views)
    jobs: list[list[Future[list[float]]]] = [[] for _ in range(len(scenes))]
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for offset, start in itertools.product(offsets, range(0, len(scenes), at_once)):
            part = {name: value[start : start + at_once, offset::every][:, :views] for name, value in scenes.parts.items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                out = model(part["rgb"].to(device).float() / 255)
            depth, pose = (out[name].float().cpu() for name in ("depth", "world_to_camera"))
            for i in range(len(depth)):
                jobs[start + i].append(pool.submit(judge, depth[i], pose[i], *(part[name][i].cpu() for name in ("depth", "w2c", "ok"))))
        values = torch.tensor([[job.result() for job in scene] for scene in jobs], dtype=torch.float64, device="cpu").nanmean(1)
    return dict(zip(MEASURES, values.T.tolist(), strict=True))


def judge(depth: Tensor, pose: Tensor, true_depth: Tensor, true_pose: Tensor, ok: Tensor) -> list[float]:
    """The `MEASURES` of one scene."""
    found = [math.nan] * len(MEASURES)
    if (true_depth > 0).any():
        found[0] = depth_metrics(depth, true_depth.float()).abs_rel
    if ok.sum() > 1:
        errors = pair_errors(pose[ok], true_pose[ok]).larger
        found[1:] = [auc(errors, degrees) for degrees in (30, 15, 5)]
    return found
