"""Camera conversions. OpenCV convention: x right, y down, z forward; world to camera ``x_cam = R @ x + t``.

A pose encoding ``[..., 9]`` holds the translation t, the unit quaternion (x, y, z, w) of R, and the vertical and horizontal
field of view in radians.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """Unit quaternions ``[..., 4]`` (x, y, z, w) to rotation matrices ``[..., 3, 3]``."""
    x, y, z, w = quaternion.unbind(-1)
    rows = (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def decode_pose(pose_enc: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Pose encodings ``[..., 9]`` to world-to-camera ``[..., 3, 4]`` and intrinsics ``[..., 3, 3]`` in pixels."""
    translation, quaternion, fov = pose_enc.split((3, 4, 2), -1)
    extrinsics = torch.cat((quaternion_to_matrix(F.normalize(quaternion, dim=-1)), translation[..., None]), -1)
    focal_y, focal_x = (0.5 * height / (fov[..., 0] / 2).tan(), 0.5 * width / (fov[..., 1] / 2).tan())
    zero, one = torch.zeros_like(focal_x), torch.ones_like(focal_x)
    rows = (focal_x, zero, one * width / 2, zero, focal_y, one * height / 2, zero, zero, one)
    return extrinsics, torch.stack(rows, -1).unflatten(-1, (3, 3))


def fov_of(intrinsics: Tensor, height: int, width: int) -> Tensor:
    """Vertical and horizontal field of view ``[..., 2]`` in radians of intrinsics ``[..., 3, 3]`` in pixels."""
    half = torch.stack((0.5 * height / intrinsics[..., 1, 1], 0.5 * width / intrinsics[..., 0, 0]), -1)
    return 2 * half.atan()


def relative_to_first(world_to_camera: Tensor) -> Tensor:
    """World-to-camera ``[B, S, 3, 4]`` with the frame of each first view as the world, ``[B, S, 3, 4]``."""
    rotation, translation = world_to_camera.split((3, 1), -1)
    turned = rotation @ rotation[:, :1].mT
    return torch.cat((turned, translation - turned @ translation[:, :1]), -1)
