"""What all files are made of: a prediction, what its photographs are called, and which of its points are taken."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ..prediction import Prediction
from .point_cloud import PointCloud, point_cloud


@dataclass(frozen=True)
class Facts:
    """What is told beside a reconstruction: the numbers of the run, as text.

    Attributes:
        title: One line.
        columns: Heads of the table; the first is that of the rows' names.
        rows: One a run, as long as `columns`.
        notes: Sentences below it.
    """

    title: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reconstruction:
    """A reconstructed scene to be written.

    Attributes:
        prediction: What the model made of S views.
        names: What the views are called, S of them; nothing else of the photographs is written but the pixels that the model saw.
        drop_percent, max_points: As in `point_cloud`.

    Raises:
        InputError: not one name a view.
    """

    prediction: Prediction
    names: tuple[str, ...]
    drop_percent: float = 20.0
    max_points: int = 1_000_000

    def __post_init__(self) -> None:
        if len(self.names) != self.prediction.num_views:
            raise InputError(f"{self.prediction.num_views} views have {len(self.names)} names; give each one")

    @functools.cached_property
    def cloud(self) -> PointCloud:
        """Its points: the surest pixels. Raises as `point_cloud`."""
        return point_cloud(self.prediction, self.drop_percent, self.max_points)

    @property
    def image_names(self) -> tuple[str, ...]:
        """Names of image files, one a view, all different and safe in any folder: ``IMG_1.png`` for ``photos/IMG_1.HEIC``."""
        names: list[str] = []
        for i, name in enumerate(self.names):
            stem = re.sub(r"[^\w.-]+", "_", name.replace("\\", "/").rsplit("/", 1)[-1].rsplit(".", 1)[0]).strip("._")[:60] or "view"
            taken = {other.lower() for other in names}
            while f"{stem}.png".lower() in taken:
                stem = f"{stem}_{i + 1}"
            names.append(f"{stem}.png")
        return tuple(names)

    def cameras(self) -> tuple[Tensor, Tensor]:
        """World to camera ``[S, 3, 4]`` with the rotations nearest to the predicted ones, and intrinsics ``[S, 3, 3]``, both FP64.

        Raises:
            InputError: a camera is not finite, is no rotation, or has no focal length: no file can hold it.
        """
        pose, intrinsics = self.prediction.world_to_camera.double(), self.prediction.intrinsics.double()
        usable = pose.isfinite().all(-1).all(-1) & intrinsics.isfinite().all(-1).all(-1)
        usable &= (intrinsics[:, 0, 0] > 0) & (intrinsics[:, 1, 1] > 0)
        if not usable.all():
            raise InputError(self._no_camera(usable, "not finite, or without a focal length"))
        left, singular, right = torch.linalg.svd(pose[:, :, :3])
        rotation = left @ right
        rigid = (torch.linalg.det(rotation) > 0) & ((singular - 1).abs() < 0.05).all(-1)
        if not rigid.all():
            raise InputError(self._no_camera(rigid, "no rotation"))
        return torch.cat((rotation, pose[:, :, 3:]), -1), intrinsics

    def _no_camera(self, usable: Tensor, what: str) -> str:
        view = int((~usable).nonzero()[0, 0])
        return f"the camera that the model predicted for {self.names[view]} is {what}; check that its weights are the right ones"
