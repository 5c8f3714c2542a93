"""A pool of rendered clips on the GPU, from which training samples are drawn: other views, orders, crops and films each time."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..scene.procedural import covisibility
from .film import develop
from .losses import Batch


class ClipPool:
    """The last `capacity` clips that were added, in bytes and half floats.

    Args:
        capacity: Number of clips.
        views, size: Views of a clip, and their height and width in pixels.
        device: Where they lie.
    """

    def __init__(self, capacity: int, views: int, size: int, device: torch.device) -> None:
        self.capacity, self.views, self.size, self.device = capacity, views, size, device
        self.added = 0
        self.rgb = torch.empty(capacity, views, 3, size, size, dtype=torch.uint8, device=device)
        self.depth = torch.empty(capacity, views, size, size, dtype=torch.float16, device=device)  # 0: not valid
        self.K = torch.empty(capacity, views, 3, 3, device=device)
        self.w2c = torch.empty(capacity, views, 3, 4, device=device)
        self.shared = torch.empty(capacity, views, views, device=device)  # share of pixels that two views both see

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    @torch.no_grad()
    def add(self, clips: Mapping[str, Tensor]) -> None:
        """Add clips in place of the oldest: rgb ``[n, V, 3, S, S]`` u8, depth ``[n, V, S, S]`` with 0 where not valid, K, w2c."""
        clips = {name: clips[name].to(self.device, non_blocking=True) for name in ("rgb", "depth", "K", "w2c")}
        count = len(clips["rgb"])
        slots = torch.arange(self.added, self.added + count, device=self.device) % self.capacity
        for name, value in clips.items():
            getattr(self, name)[slots] = value.to(getattr(self, name).dtype)
        depth = clips["depth"].float()
        share = covisibility({"depth": depth, "valid": depth > 0, "K": clips["K"], "w2c": clips["w2c"]}, step=max(1, self.size // 14))
        self.shared[slots] = torch.minimum(share, share.mT)
        self.added += count

    @torch.no_grad()
    def draw(self, count: int, views: int, height: int, width: int, generator: torch.Generator) -> Batch:
        """`count` samples of `views` views, cropped or halved to `height` x `width`.

        Each view shares pixels with one of those before it, how many differs from sample to sample: narrow and wide baselines. The
        keys are those of `lite3r_plugin.scene.procedural.ProcScenes`.
        """
        device = self.device
        clip = torch.randint(len(self), (count, 1), generator=generator, device=device)
        shared = self.shared[clip[:, 0]]
        least = torch.rand(count, 1, generator=generator, device=device) * 0.5
        reach = shared.diagonal(dim1=1, dim2=2)  # 0 for views that show nothing
        chosen: list[Tensor] = []
        taken = torch.zeros(count, self.views, device=device)
        for _ in range(views):
            score = torch.rand(count, self.views, generator=generator, device=device) + (reach >= least) - 4 * taken
            view = score.argmax(1, keepdim=True)
            taken.scatter_(1, view, 1.0)
            row = shared.gather(1, view[..., None].expand(-1, -1, self.views))[:, 0]
            reach = torch.maximum(reach, row) if chosen else row
            chosen.append(view)
        view = torch.cat(chosen, 1)
        rgb, depth, K = self.rgb[clip, view].float() / 255, self.depth[clip, view].float(), self.K[clip, view].clone()
        while self.size >= 2 * max(height, width) and rgb.shape[-1] > max(height, width):
            rgb = F.avg_pool2d(rgb.flatten(0, 1), 2).unflatten(0, (count, views))
            depth = depth[..., ::2, ::2]
            K[..., :2, :] /= 2
        top, left = (rgb.shape[-2] - height) // 2, (rgb.shape[-1] - width) // 2
        K[..., 1, 2] -= top
        K[..., 0, 2] -= left
        rgb, depth = (x[..., top : top + height, left : left + width] for x in (rgb, depth))
        valid = depth > 0
        ok = valid.float().mean((-1, -2)) > 0.02
        rgb = develop(rgb, generator)
        return {"rgb": rgb, "depth": depth.clamp(min=1e-3), "valid": valid, "ok": ok, "K": K, "w2c": self.w2c[clip, view]}


def packed(sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A sample of `lite3r_plugin.scene.procedural.ProcScenes` in the form that `ClipPool.add` takes."""
    rgb = (sample["rgb"] * 255).round().to(torch.uint8)
    return {"rgb": rgb, "depth": sample["depth"] * sample["valid"], "K": sample["K"], "w2c": sample["w2c"]}


class Feed:
    """Clips of a stream, fetched by a thread, at most `ahead` of them."""

    def __init__(self, stream: Iterator[Mapping[str, Any]], ahead: int) -> None:
        self._waiting: deque[Mapping[str, Any]] = deque()
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._fetch, args=(stream, ahead), daemon=True)
        self.thread.start()

    def take(self, most: int) -> dict[str, Tensor] | None:
        """Up to `most` clips, stacked; None if there is none. What went wrong in the stream is raised here."""
        if self._error is not None:
            raise self._error
        clips = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
        return {name: torch.from_numpy(np.stack([clip[name] for clip in clips])) for name in clips[0]} if clips else None

    def _fetch(self, stream: Iterator[Mapping[str, Any]], ahead: int) -> None:
        try:
            for clip in stream:
                self._waiting.append(clip)
                while len(self._waiting) >= ahead:
                    time.sleep(0.01)
        except BaseException as error:  # shown by `take`, in the thread that can do something about it
            self._error = error
