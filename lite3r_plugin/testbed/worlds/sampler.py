"""Random clips of packed worlds, and processes that render them ahead."""

from __future__ import annotations

import multiprocessing
import queue
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .files import Array, World, load_pictures, load_world
from .light import Light
from .render import LoadedWorld, Renderer

Clip = dict[str, Array]
FARTHEST = 300.0  # metres; what is farther counts as sky


class WorldSampler:
    """Endless random clips.

    Args:
        files: Packed worlds.
        pictures: File of pictures; the worlds keep their textures without.
        seed: Seed of everything.
        retexture: Share of the clips whose world gets pictures on a random share of its textures.
        device: Index of the EGL device.
    """

    def __init__(
        self, files: Sequence[Path], pictures: Path | None = None, seed: int = 0, retexture: float = 0.25, device: int | None = None
    ) -> None:
        self.files, self.retexture = list(files), retexture
        self.rng = np.random.default_rng(seed)
        self.renderer = Renderer(device=device)
        self.pictures = load_pictures(pictures) if pictures else []
        self.loaded: dict[int, LoadedWorld] = {}

    def clip(self, views: int, height: int, width: int, attempts: int = 6) -> Clip:
        """A clip of at most 16 views, most of which show something.

        Returns:
            rgb ``[V, 3, H, W]`` u8; depth ``[V, H, W]`` f16 along the optical axis in metres, 0 in the sky; K ``[V, 3, 3]`` f32; w2c
            ``[V, 3, 4]`` f32.
        """
        for _ in range(attempts - 1):
            clip, shows = self._any_clip(views, height, width)
            if shows:
                return clip
        return self._any_clip(views, height, width)[0]

    def _any_clip(self, views: int, height: int, width: int) -> tuple[Clip, bool]:
        """A clip, and whether most of its views show something."""
        rng, loaded = self.rng, self._random_world()
        number = int(rng.integers(len(loaded.world.clip_fov)))
        chosen = rng.permutation(loaded.world.clip_pos.shape[1])[:views]
        w2c, K = clip_cameras(loaded.world, number, chosen, height, width, rng)
        light = Light.random(rng, loaded.has_light)
        rgb, depth = self.renderer.render(loaded, w2c, K, height, width, light, int(rng.integers(1 << 30)))
        depth[depth > FARTHEST] = 0
        shows = (rgb.reshape(views, -1).std(1) > 9) & ((depth > 0).reshape(views, -1).mean(1) > 0.35)
        images = np.ascontiguousarray(rgb.transpose(0, 3, 1, 2))
        clip = {"rgb": images, "depth": depth.astype(np.float16), "K": K.astype(np.float32), "w2c": w2c.astype(np.float32)}
        return clip, bool(shows.mean() > 0.8)

    def _random_world(self) -> LoadedWorld:
        index = int(self.rng.integers(len(self.files)))
        if index not in self.loaded:
            self.loaded[index] = self.renderer.upload(load_world(self.files[index]))
        loaded = self.loaded[index]
        if self.pictures and self.rng.random() < self.retexture:
            loaded.retexture(self.rng, self.pictures, float(self.rng.uniform(0.2, 0.9)))
        elif loaded.swapped:
            loaded.retexture(self.rng, self.pictures, 0.0)
        return loaded


def clip_cameras(world: World, clip: int, views: Array, height: int, width: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Cameras `views` of a stored clip, moved a little within their free space: w2c ``[V, 3, 4]`` and K ``[V, 3, 3]``."""
    centre = world.clip_pos[clip, views].astype(np.float64)
    count = len(centre)
    room = np.minimum(0.4 * world.clip_clear[clip, views].astype(np.float64), 0.04 * float(world.clip_scale[clip]))
    away = rng.normal(size=(count, 3))
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    centre += away * rng.random((count, 1)) * room[:, None]
    nudge = np.concatenate((np.ones((count, 1)), rng.normal(size=(count, 3)) * 0.02), 1)
    rotation = _from_quaternion(nudge) @ _from_quaternion(world.clip_rot[clip, views].astype(np.float64))
    fov = np.clip(float(world.clip_fov[clip]) * rng.uniform(0.93, 1.07), 35, 100)
    focal = max(height, width) / 2 / np.tan(np.radians(fov) / 2)
    K = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    return np.concatenate((rotation, -rotation @ centre[..., None]), -1), np.broadcast_to(K, (count, 3, 3)).copy()


def world_stream(
    files: Sequence[Path], pictures: Path | None, views: int, height: int, width: int, seed: int, workers: int, device: int | None = None
) -> Iterator[Clip]:
    """Endless clips from `workers` processes, each with its own renderer. Call it from a main module that is guarded."""
    context = multiprocessing.get_context("spawn")
    clips: Any = context.Queue(4 * workers)
    shape = (views, height, width)
    processes = [
        context.Process(target=_render_forever, args=(clips, files, pictures, seed * 1000 + i, device, shape), daemon=True)
        for i in range(workers)
    ]
    for process in processes:
        process.start()
    try:
        while True:
            try:
                yield clips.get(timeout=5)
            except queue.Empty:
                if not any(process.is_alive() for process in processes):
                    raise RuntimeError("every process that renders worlds has ended") from None
    finally:
        for process in processes:
            process.terminate()


def _render_forever(
    clips: Any, files: Sequence[Path], pictures: Path | None, seed: int, device: int | None, shape: tuple[int, int, int]
) -> None:
    sampler = WorldSampler(files, pictures, seed, device=device)
    while True:
        clips.put(sampler.clip(*shape))


def _from_quaternion(q: Array) -> Array:
    """Rotations ``[..., 3, 3]`` of quaternions (w, x, y, z) ``[..., 4]``."""
    w, x, y, z = np.moveaxis(q / np.linalg.norm(q, axis=-1, keepdims=True), -1, 0)
    rows = (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip
    return np.stack(rows, -1).reshape(*q.shape[:-1], 3, 3)
