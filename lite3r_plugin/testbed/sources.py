"""Where the training clips of a process come from: procedural scenes that it renders itself, and packed worlds from other processes."""

from __future__ import annotations

import torch
from torch import Tensor

from .clips import ClipPool, Feed, packed
from .held_out import world_files
from .losses import Batch
from .richer import RicherScenes, texture_bank
from .settings import Shape, TrainingConfig

VIEWS = 16  # of a clip
AHEAD = 512  # clips of worlds that wait in memory
PICTURES = "photos.npz"


class Sources:
    """Draws the batches of one process.

    Args:
        config: Of the run.
        device: Where the pools are.
        rank: Of the process; each has clips of its own.
    """

    def __init__(self, config: TrainingConfig, device: torch.device, rank: int) -> None:
        self.config, self.device = config, device
        seed = 1000 * config.seed + rank + 1
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.size = 48 if config.smoke else 224
        self.clips_at_once = 1 if config.smoke else 12
        views = 8 if config.smoke else VIEWS
        pictures = config.worlds / PICTURES if config.worlds and (config.worlds / PICTURES).exists() else None
        bank = texture_bank(12 if config.smoke else config.textures, 32 if config.smoke else 128, device, config.seed, pictures)
        self.scenes = RicherScenes(bank, device, seed)
        self.scene_pool = ClipPool(config.pool, views, self.size, device)
        self.world_pool: ClipPool | None = None
        if config.worlds:
            from .worlds import world_stream

            files = world_files(config.worlds, held_out=False)
            gpu = device.index if device.type == "cuda" else None
            shape = (VIEWS, self.size, self.size)
            self.feed = Feed(world_stream(files, pictures, *shape, seed=seed, workers=config.workers, device=gpu), AHEAD)
            self.world_pool = ClipPool(config.pool, VIEWS, self.size, device)

    def fill(self, clips: int) -> None:
        """Render scenes up to `clips` of them, and take all worlds that wait."""
        while len(self.scene_pool) < min(clips, self.scene_pool.capacity):
            self._render()
        self._take(AHEAD)

    def refresh(self) -> None:
        """Replace some of the clips."""
        self._render()
        self._take(self.config.refresh // 2)

    def batch(self, shape: Shape) -> Batch:
        """Samples of one shape, from worlds and scenes in the configured proportion."""
        pixels = self.config.views_per_step * self.size**2
        count = max(1, pixels // (shape.height * shape.width * shape.views))
        draw = (shape.views, shape.height, shape.width, self.generator)
        worlds = 0
        if self.world_pool is not None and len(self.world_pool) and shape.views <= self.world_pool.views:
            worlds = min(count, round(self.config.world_share * count))
        parts = [self.world_pool.draw(worlds, *draw)] if self.world_pool is not None and worlds else []
        if count > worlds:
            parts.append(self.scene_pool.draw(count - worlds, *draw))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _render(self) -> None:
        sample = self.scenes(self.clips_at_once, self.scene_pool.views, self.size, self.size)
        self.scene_pool.add(packed(sample))

    def _take(self, most: int) -> None:
        while self.world_pool is not None and most > 0:
            clips: dict[str, Tensor] | None = self.feed.take(min(most, 32))
            if clips is None:
                return
            self.world_pool.add(clips)
            most -= 32
