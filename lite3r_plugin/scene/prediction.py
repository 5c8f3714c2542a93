"""What a reconstruction model predicts of a scene.

Cameras are OpenCV's: x right, y down, z forward; a pixel (u, v) has its centre at (u + 0.5, v + 0.5); depth is the z
coordinate in the camera's frame. Units are the model's own, metres only where the model says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import AdapterError
from .geometry import Geometry


@dataclass(frozen=True)
class Prediction:
    """A reconstructed scene of S views, float32 on the CPU.

    Attributes:
        depth: ``[S, H, W]``, along the camera's z axis.
        confidence: ``[S, H, W]``, larger is surer; the scale is the model's own.
        points: ``[S, H, W, 3]`` in world coordinates.
        world_to_camera: ``[S, 3, 4]``, rotation and translation.
        intrinsics: ``[S, 3, 3]`` in pixels of the images below.
        images: ``[S, H, W, 3]`` in [0, 1], what the model saw.

    Raises:
        AdapterError: the shapes do not fit together.
    """

    depth: Tensor
    confidence: Tensor
    points: Tensor
    world_to_camera: Tensor
    intrinsics: Tensor
    images: Tensor

    def __post_init__(self) -> None:
        size = tuple(self.depth.shape)
        views = size[:1]
        shapes = {
            "depth": size, "confidence": size, "points": (*size, 3), "images": (*size, 3),
            "world_to_camera": (*views, 3, 4), "intrinsics": (*views, 3, 3),
        }  # fmt: skip
        if len(size) != 3:
            raise AdapterError(f"Prediction.depth is [S, H, W], got {list(size)}")
        for name, shape in shapes.items():
            value = getattr(self, name)
            if tuple(value.shape) != shape:
                raise AdapterError(f"Prediction.{name} must be {list(shape)} to fit depth {list(size)}, got {list(value.shape)}")
            object.__setattr__(self, name, value.detach().to("cpu", torch.float32))

    @property
    def num_views(self) -> int:
        """S."""
        return self.depth.shape[0]

    def moved(self, scale: float, rotation: Tensor, translation: Tensor) -> Prediction:
        """The same scene after ``x -> scale * rotation @ x + translation``, as `lite3r_plugin.scene.metrics.fit_similarity` finds it.

        Depth is in the new unit, and every camera sees what it saw.
        """
        rotation, translation = rotation.double(), translation.double()
        turned = self.world_to_camera[:, :, :3].double() @ rotation.mT
        shift = scale * self.world_to_camera[:, :, 3].double() - turned @ translation
        points = scale * self.points.double() @ rotation.mT + translation
        pose = torch.cat((turned, shift[:, :, None]), -1)
        return Prediction(self.depth * scale, self.confidence, points, pose, self.intrinsics, self.images)

    def geometry(self) -> Geometry:
        """Depth and cameras, as `lite3r_plugin.scene.metrics` measures them; points are unprojected from these."""
        return Geometry(self.depth, self.world_to_camera, self.intrinsics)
