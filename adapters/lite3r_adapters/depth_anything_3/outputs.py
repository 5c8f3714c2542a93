"""What Depth Anything 3 returns, by what it means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lite3r_plugin.adapter import ModelOutputs, OutputsFunction

from .sites import is_backbone


def outputs_of(model: nn.Module) -> OutputsFunction | None:
    """For its network, also the nested one with two; by structure, so that forks under any module path are known too."""
    network = getattr(model, "da3", model)
    backbone = getattr(getattr(network, "backbone", None), "pretrained", None)
    return to_outputs if is_backbone(backbone) and isinstance(getattr(network, "head", None), nn.Module) else None


def to_outputs(output: Mapping[str, Any]) -> ModelOutputs:
    """From what its forward returns: depth, and cameras where it has a decoder for them."""
    pose, confidence = output.get("extrinsics"), output.get("depth_conf")
    return ModelOutputs(
        depth=output["depth"],
        world_to_camera=None if pose is None else pose[..., :3, :],
        intrinsics=output.get("intrinsics"),
        other=() if confidence is None else (confidence.log(),),
    )
