"""What the testbed returns, by what it means."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from lite3r_plugin.adapter import ModelOutputs, OutputsFunction


def outputs_of(model: nn.Module) -> OutputsFunction | None:
    """For a `Testbed`."""
    library = sys.modules.get("lite3r_plugin.testbed.model")
    return to_outputs if library is not None and isinstance(model, library.Testbed) else None


def to_outputs(output: dict[str, Any]) -> ModelOutputs:
    """From what `Testbed.forward` returns."""
    return ModelOutputs(
        depth=output["depth"],
        points=output["points"],
        world_to_camera=output["world_to_camera"],
        intrinsics=output["intrinsics"],
        camera=output["pose_enc"],
        other=(output["depth_conf"].log(), output["points_conf"].log()),
    )
