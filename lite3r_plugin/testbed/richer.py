"""Procedural scenes with more in them and more ways to walk through them than `lite3r_plugin.scene.procedural` has by default."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..scene.procedural import ARCS, ProcScenes, TextureBank
from ..scene.procedural.layout import SceneSampler
from ..scene.procedural.tracing import SceneTensors

CLUTTER = (4, 10, 6, 7, 7)  # groups of furniture, single boxes, pictures, ellipsoids, cylinders


class RicherScenes(ProcScenes):
    """`ProcScenes` with clutter, fields of view from 35 to 100 degrees, and cameras that also stand close together, walk forward or
    walk sideways."""

    def __init__(self, bank: TextureBank, device: torch.device, seed: int) -> None:
        super().__init__(bank, device, seed)
        self.sampler = RicherSampler(bank.T, self.device, seed, *CLUTTER, arcs=ARCS)
        self.sampler.fov = (35.0, 100.0)


class RicherSampler(SceneSampler):
    """Draws half of the scenes with cameras on arcs and the others with cameras on three other kinds of path."""

    def candidates(self, s: SceneTensors, C: int) -> tuple[Tensor, Tensor]:
        """As for arcs, with the first place of the arc as the start of the other paths."""
        place, target = super().candidates(s, C)
        B, g, device = len(place), self.g, self.device
        start, focus = place[:, :1], target[:, :1]
        ahead = focus - start
        side = torch.stack((-ahead[..., 1], ahead[..., 0], torch.zeros_like(ahead[..., 0])), -1)
        along = self.r(B, C, 1)
        shake = torch.randn(B, C, 3, generator=g, device=device)
        reach = self.r(B, 1, 1, lo=0.05, hi=0.3) * ahead.norm(dim=-1, keepdim=True)
        near = start + shake * reach
        forward = start + ahead * along * self.r(B, 1, 1, lo=0.3, hi=0.65) + shake * 0.1 * reach
        sweep = start + side * (along - 0.5) * self.r(B, 1, 1, lo=0.3, hi=1.0) + shake * 0.1 * reach
        kind = self.r(B, 1, 1)
        place = torch.where(kind < 0.5, place, torch.where(kind < 0.7, near, torch.where(kind < 0.85, forward, sweep)))
        beyond = focus + ahead * 0.5 + (target - focus)
        target = torch.where((kind >= 0.7) & (kind < 0.85), beyond, target)
        limit = s["half"][:, None] - 0.15
        flat = place[..., :2].clamp(-limit[..., :2], limit[..., :2])
        height = place[..., 2:].clamp(min=0.15).minimum(2 * s["half"][:, None, 2:] - 0.15)
        return torch.cat((flat, height), -1), target


def texture_bank(count: int, size: int, device: torch.device, seed: int, pictures: Path | None = None) -> TextureBank:
    """Procedural textures, and crops of pictures beside them where there is a file of them."""
    textures = TextureBank.procedural_images(count, size, device, seed)
    if pictures is not None:
        from .worlds import load_pictures

        pixels = np.stack([np.asarray(picture.convert("RGB").resize((size, size))) for picture in load_pictures(pictures)])
        crops = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 255
        textures = torch.cat((textures, crops))
    return TextureBank(textures)
