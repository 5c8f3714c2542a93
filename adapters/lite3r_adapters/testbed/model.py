"""The testbed, the small trained model that comes with the package, for the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence

from PIL import Image
from torch import Tensor, nn

from lite3r_plugin.adapter import ModelEntry
from lite3r_plugin.scene.geometry import unproject
from lite3r_plugin.scene.images import to_tensor
from lite3r_plugin.scene.prediction import Prediction
from lite3r_plugin.testbed import Testbed, TestbedConfig
from lite3r_plugin.testbed.model import CONFIG_NAME, SHIPPED, WEIGHTS_NAME

LONGEST_SIDE = 224
PATCH = 8


def _create() -> nn.Module:
    """The testbed in the sizes of the weights that come with the package."""
    sizes = SHIPPED / CONFIG_NAME
    return Testbed(TestbedConfig(**json.loads(sizes.read_text())) if sizes.is_file() else None)


def preprocess(images: Sequence[Image.Image]) -> Tensor:
    """All at one size: the first one's shape, longest side 224 pixels, multiples of 8."""
    scale = LONGEST_SIDE / max(images[0].size) / PATCH
    width, height = (max(1, round(side * scale)) * PATCH for side in images[0].size)
    return to_tensor([image.resize((width, height), Image.Resampling.LANCZOS) for image in images])


def predict(model: nn.Module, images: Tensor) -> Prediction:
    """Depth and cameras from the model, points by unprojection: sharper than its point head. `images` ``[S, 3, H, W]`` in [0, 1]."""
    output = {name: value[0] for name, value in model(images[None]).items()}
    return Prediction(
        depth=output["depth"],
        confidence=output["depth_conf"],
        points=unproject(output["depth"], output["world_to_camera"], output["intrinsics"]),
        world_to_camera=output["world_to_camera"],
        intrinsics=output["intrinsics"],
        images=images.permute(0, 2, 3, 1),
    )


ENTRIES = {
    "testbed": ModelEntry(
        name="testbed",
        summary="small VGGT-like test model that comes with the package, trained on rendered scenes",
        create=_create,
        preprocess=preprocess,
        predict=predict,
        default_weights=str(SHIPPED / WEIGHTS_NAME),
        mixed_sizes="stretched to the first one's shape",
    )
}
