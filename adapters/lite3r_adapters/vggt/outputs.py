"""What VGGT returns, by what it means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lite3r_plugin.adapter import ModelOutputs, OutputsFunction
from lite3r_plugin.testbed.cameras import decode_pose

from .sites import is_aggregator, streams


def outputs_of(model: nn.Module) -> OutputsFunction | None:
    """For a VGGT, whichever heads it has; by structure, so that forks under any module path are known too."""
    heads = {name: getattr(model, name, None) for name in ("camera_head", "depth_head", "point_head")}
    marks = {"camera_head": "trunk", "depth_head": "intermediate_layer_idx", "point_head": "intermediate_layer_idx"}
    present = {name: head for name, head in heads.items() if head is not None}
    known = present and all(hasattr(head, marks[name]) for name, head in present.items())
    aggregator = getattr(model, "aggregator", None)
    return to_outputs if known and is_aggregator(aggregator) and not streams(aggregator) else None


def to_outputs(output: Mapping[str, Any]) -> ModelOutputs:
    """From what its forward returns. Confidences are above 1, and count by their logarithms."""
    depth, points, camera = output.get("depth"), output.get("world_points"), output.get("pose_enc")
    pose = intrinsics = None
    if camera is not None:
        sizes = next((tuple(x.shape[2:4]) for x in (depth, points) if x is not None), None)
        pose, intrinsics = decode_pose(camera, *(sizes or (1, 1)))
        intrinsics = intrinsics if sizes else None  # in pixels, of which nothing tells how many there are
    confidences = (output.get(name) for name in ("depth_conf", "world_points_conf"))
    return ModelOutputs(
        depth=None if depth is None else depth[..., 0],
        points=points,
        world_to_camera=pose,
        intrinsics=intrinsics,
        camera=camera,
        other=tuple(confidence.log() for confidence in confidences if confidence is not None),
    )
