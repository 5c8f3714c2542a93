"""Views of scenes as training data for a model that an adapter can build."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import Dataset

from ..adapter.models import ModelEntry
from ..adapter.outputs import ModelOutputs
from ..errors import InputError
from ..scene.data import Scene, Views, pick_views
from ..scene.data.files import read_image
from ..scene.data.sampling import Rule
from .data import Sample

DRAW = 1_000_003  # what the seeds of two draws of views differ by


class SceneSamples(Dataset[Sample]):
    """Draws of views from scenes, each a batch of one; item i is the same in every process and order.

    Args:
        entry: The model that they are for.
        scenes: Where from.
        views: How many a draw.
        size: Height and width; None: what the model makes of the first view.
        rule, seed: As in `lite3r_plugin.scene.data.pick_views`.
        draws: How many a scene.
        labels: Give depth and cameras too, for the task loss. Scenes without cameras are refused then.

    Raises:
        InputError: there are no scenes, or the model needs more views.
    """

    def __init__(
        self,
        entry: ModelEntry,
        scenes: Sequence[Scene],
        views: int,
        size: tuple[int, int] | None = None,
        rule: Rule = "spread",
        seed: int = 0,
        draws: int = 1,
        labels: bool = False,
    ) -> None:
        if not len(scenes):
            raise InputError("there are no scenes to train on")
        if views < entry.min_views:
            raise InputError(f"the model {entry.name!r} needs at least {entry.min_views} views, got {views}")
        self.entry, self.scenes, self.views, self.size, self.seed, self.draws = entry, scenes, views, size, seed, draws
        self.rule: Rule = rule
        self.labels = labels

    def __len__(self) -> int:
        return len(self.scenes) * self.draws

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        draw, number = divmod(index, len(self.scenes))
        scene = self.scenes[number]
        chosen = pick_views(scene, self.views, self.rule, self.seed + DRAW * draw)
        views = scene.sample(chosen, self.size or self._natural_size(scene, chosen[0]))
        inputs = self.entry.arguments(self.entry.normalize(views.images)[None])
        return Sample(inputs, self._labels(scene, views) if self.labels else None)

    def _natural_size(self, scene: Scene, first: int) -> tuple[int, int]:
        from PIL import Image

        image = scene.frames[first].image
        height, width = (read_image(image) if isinstance(image, Path) else image).shape[-2:]
        rows, columns = self.entry.preprocess([Image.new("RGB", (width, height))]).shape[-2:]
        return rows, columns

    def _labels(self, scene: Scene, views: Views) -> ModelOutputs:
        if views.world_to_camera is None or views.intrinsics is None:
            raise InputError(f"{scene.origin} has no cameras, so there are no labels: set the weight of the task loss to 0")
        depth = views.depth * views.valid
        return ModelOutputs(depth[None], world_to_camera=views.world_to_camera[None], intrinsics=views.intrinsics[None])
