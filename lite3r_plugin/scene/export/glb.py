"""Binary glTF: the points and the cameras' pyramids, y up as every viewer of glTF has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...files import write_atomically
from .reconstruction import Reconstruction

# OpenCV's axes (x right, y down, z forward) to glTF's (x right, y up, z backward); its own inverse.
Y_UP = torch.tensor([1.0, -1, -1], device="cpu")
PYRAMID = 0.04  # the cameras' depth, of the cloud's extent


def save_glb(scene: Reconstruction, path: Path) -> None:
    """Write points with colours, and the cameras as lines, one geometry each. Raises `InputError`.

    Coordinates are the world's with y and z negated: x right, y up, z towards the viewer, for the first camera.
    """
    import trimesh

    cloud = scene.cloud
    found = trimesh.Scene()
    found.add_geometry(trimesh.PointCloud((cloud.points * Y_UP).numpy(), colors=cloud.colors.numpy()), geom_name="points")
    lines: Any = trimesh.load_path((pyramids(scene, PYRAMID * extent(cloud.points)) * Y_UP).flatten(0, 1).numpy())
    lines.colors = np.tile(np.array([255, 106, 0, 255], dtype=np.uint8), (len(lines.entities), 1))
    found.add_geometry(lines, geom_name="cameras")
    data: Any = found.export(file_type="glb")
    write_atomically(path, data)


def pyramids(scene: Reconstruction, depth: float) -> Tensor:
    """The cameras as pyramids with their points at the centres of projection: lines ``[S, 8, 2, 3]`` in world coordinates, FP32."""
    pose, intrinsics = scene.cameras()
    height, width = scene.prediction.depth.shape[1:]
    corners = torch.tensor([[0.0, 0, 1], [width, 0, 1], [width, height, 1], [0, height, 1]], dtype=torch.float64, device="cpu")
    inside = torch.linalg.solve(intrinsics, corners.mT.expand(len(pose), 3, 4)).mT * depth
    rotation, translation = pose[:, :, :3], pose[:, None, :, 3]
    base = (inside - translation) @ rotation
    tip = (-translation @ rotation).expand_as(base)
    return torch.stack((torch.cat((tip, base), 1), torch.cat((base, base.roll(-1, 1)), 1)), 2).float()


def extent(points: Tensor) -> float:
    """The size of a cloud, without its outermost points: the diagonal of the box that holds 96 % of each coordinate."""
    some = points[:: max(1, len(points) // 1_000_000)]  # torch.quantile takes 16 million numbers at most
    return float((some.quantile(0.98, 0) - some.quantile(0.02, 0)).norm().clamp_min(1e-12))
