"""A reconstruction that is known by its looks."""

from __future__ import annotations

import numpy as np
import torch

from lite3r_plugin.scene.export import Reconstruction
from lite3r_plugin.scene.geometry import unproject
from lite3r_plugin.scene.prediction import Prediction

EVIL = "</script><script>document.title='broken into'</script><img src=x onerror=alert(1)>"


def wall(colour: tuple[float, float, float], pitch: float = 0.0) -> Reconstruction:
    """A wall of one colour, seen from three cameras, of which the points below are less sure; cameras look down by `pitch`."""
    views, height, width = 3, 48, 64
    c, s = np.cos(pitch), np.sin(pitch)
    pose = torch.eye(3, 4).repeat(views, 1, 1)
    pose[:, 1:3, 1:3] = torch.tensor([[c, -s], [s, c]])
    pose[:, 0, 3] = torch.tensor([-0.5, 0, 0.5])
    intrinsics = torch.tensor([[60.0, 0, 32], [0, 60, 24], [0, 0, 1]]).repeat(views, 1, 1)
    depth = torch.full((views, height, width), 2.0)
    confidence = torch.linspace(2, 1, height)[None, :, None].expand(views, height, width)
    images = torch.tensor(colour).expand(views, height, width, 3)
    return Reconstruction(
        Prediction(depth, confidence, unproject(depth, pose, intrinsics), pose, intrinsics, images), ("a.jpg", "b.jpg", EVIL)
    )
