"""What StreamVGGT returns, by what it means."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lite3r_plugin.adapter import ModelOutputs
from lite3r_plugin.testbed.cameras import decode_pose


def to_outputs(output: Any) -> ModelOutputs:
    """From what its forward, or its `inference`, returns: a mapping for each frame. Confidences are above 1, and count by logarithms."""
    depth, points, camera = _stacked(output, "depth"), _stacked(output, "pts3d_in_other_view"), _stacked(output, "camera_pose")
    pose = intrinsics = None
    if camera is not None:
        sizes = next((tuple(x.shape[2:4]) for x in (depth, points) if x is not None), None)
        pose, intrinsics = decode_pose(camera, *(sizes or (1, 1)))
        intrinsics = intrinsics if sizes else None  # in pixels, of which nothing tells how many there are
    confidences = (_stacked(output, name) for name in ("depth_conf", "conf"))
    return ModelOutputs(
        depth=None if depth is None else depth[..., 0],
        points=points,
        world_to_camera=pose,
        intrinsics=intrinsics,
        camera=camera,
        other=tuple(confidence.log() for confidence in confidences if confidence is not None),
    )


def _stacked(output: Any, name: str) -> Tensor | None:
    """What the frames have under a name, ``[B, S, ...]``."""
    frames = [frame[name] for frame in output.ress if name in frame]
    return torch.stack(frames, 1) if frames else None
