"""A model of an adapter as a module from images to its prediction, for whatever calls modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..adapter.models import ModelEntry
from ..adapter.outputs import ModelOutputs
from ..scene.prediction import Prediction


class Predicting(nn.Module):
    """Calls `predict` of `entry` with `module`.

    Args:
        entry: Says how the model is run.
        module: The model.
    """

    def __init__(self, entry: ModelEntry, module: nn.Module) -> None:
        super().__init__()
        self.entry, self.module = entry, module

    def forward(self, images: Tensor) -> Prediction:
        """images: ``[S, 3, H, W]``, as `ModelEntry.inputs` makes them."""
        return self.entry.predict(self.module, images)


def as_outputs(prediction: Any) -> ModelOutputs:
    """Depth and cameras of a `Prediction`, a batch of one; its points follow from these."""
    depth, pose, intrinsics = (x[None] for x in (prediction.depth, prediction.world_to_camera, prediction.intrinsics))
    return ModelOutputs(depth=depth, world_to_camera=pose, intrinsics=intrinsics)
