"""What StreamVGGT returns, by what it means."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lite3r_plugin.adapter import ModelOutputs

from ..vggt import outputs as vggt

# What a frame calls what VGGT has under another name.
NAMES = {
    "depth": "depth", "world_points": "pts3d_in_other_view", "pose_enc": "camera_pose", "depth_conf": "depth_conf",
    "world_points_conf": "conf",
}  # fmt: skip


def to_outputs(output: Any) -> ModelOutputs:
    """From what its forward, or its `inference`, returns: a mapping for each frame, of what VGGT returns for all."""
    stacked = {name: _stacked(output, theirs) for name, theirs in NAMES.items()}
    return vggt.to_outputs({name: found for name, found in stacked.items() if found is not None})


def _stacked(output: Any, name: str) -> Tensor | None:
    """What the frames have under a name, ``[B, S, ...]``."""
    frames = [frame[name] for frame in output.ress if name in frame]
    return torch.stack(frames, 1) if frames else None
