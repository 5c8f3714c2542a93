"""What Pi3 and Pi3X return, by what it means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lite3r_plugin.adapter import ModelOutputs, OutputsFunction

from .sites import is_pi3


def outputs_of(model: nn.Module) -> OutputsFunction | None:
    """For a Pi3 with its heads; by structure, so that forks under any module path are known too."""
    heads = ("point_head", "conf_head", "camera_head")
    return to_outputs if is_pi3(model) and all(isinstance(getattr(model, name, None), nn.Module) for name in heads) else None


def to_outputs(output: Mapping[str, Any]) -> ModelOutputs:
    """From what its forward returns; it has no intrinsics, and its world is no camera's frame."""
    camera_to_world = output["camera_poses"]
    rotation = camera_to_world[..., :3, :3].mT
    return ModelOutputs(
        depth=output["local_points"][..., 2],
        points=output["points"],
        world_to_camera=torch.cat((rotation, -rotation @ camera_to_world[..., :3, 3:]), -1),
        other=(output["conf"],),
    )
