"""One HTML file to look around in: points, cameras, photographs and the numbers of the run; no server, no network, no library.

``viewer.html`` is the page, with WebGL code of its own; what it shows stands in it as JSON. Points are quantised to 16 bits of the box
around them and sorted by confidence, so that the slider is nothing but a number of points to draw. The world is turned so that the
photographs' mean upward direction is up.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ....errors import InputError
from ....files import write_atomically
from ...images import spread, to_image
from ..glb import extent, pyramids
from ..point_cloud import point_cloud
from ..reconstruction import Facts, Reconstruction

PLACE = "/*DATA*/"
MAX_POINTS = 400_000  # a run; 9 bytes each, 12 in base64
MAX_CAMERAS = 200
THUMBNAIL = 192  # pixels of the longer side


def save_page(path: Path, runs: Mapping[str, Reconstruction], facts: Facts) -> None:
    """Write a page that switches between `runs`, reconstructions of the same views in one frame by what they are called.

    Raises:
        InputError: a run has no valid point or camera, or the file cannot be written.
    """
    first = list(runs.values())[-1]
    turn = upright(first)
    data = {
        "facts": {"title": facts.title, "columns": facts.columns, "rows": facts.rows, "notes": facts.notes},
        "runs": [_run(name, scene, turn) for name, scene in runs.items()],
        "thumbnails": [_thumbnail(first.prediction.images[i]) for i in _shown(first)],
        "names": [first.names[i] for i in _shown(first)],
    }
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")  # nothing in it ends the script
    page = resources.files(__name__).joinpath("viewer.html").read_text(encoding="utf-8")
    write_atomically(path, page.replace(PLACE, text))


def upright(scene: Reconstruction) -> Tensor:
    """The rotation ``[3, 3]``, FP32, from the world to axes with y up, as the photographs were held, and z towards the first camera."""
    pose, _ = scene.cameras()
    down, forward = pose[:, 1, :3].mean(0), pose[0, 2, :3]
    up = F.normalize(-down, dim=0) if down.norm() > 0.1 else -pose[0, 1, :3]  # photographs held in all directions have no mean
    back = -(forward - (forward @ up) * up)
    if back.norm() < 0.1:  # the first camera looks straight up or down
        back = pose[0, 1, :3] - (pose[0, 1, :3] @ up) * up
    back = F.normalize(back, dim=0)
    return torch.stack((torch.linalg.cross(up, back), up, back)).float()


def _run(name: str, scene: Reconstruction, turn: Tensor) -> dict[str, Any]:
    found = scene.prediction
    cloud = point_cloud(found, 0, min(scene.max_points, MAX_POINTS))
    assert cloud.pixels is not None
    points, confidence = cloud.points @ turn.T, found.confidence.flatten()[cloud.pixels]
    size = extent(points)
    middle = points.median(0).values
    near = (points - middle).norm(dim=-1) < 4 * size  # what lies far outside would take the bits of everything else
    order = confidence[near].argsort(descending=True, stable=True)
    points, colors = points[near][order], cloud.colors[near][order]
    if not len(points):
        raise InputError(f"the points of {name} lie nowhere together; check that the weights are the right ones")
    low = points.amin(0)
    box = (points.amax(0) - low).clamp_min(1e-9)
    quantised = ((points - low) / box * 65535).round().to(torch.int32).numpy().astype("<u2")
    pose, intrinsics = scene.cameras()
    shown = _shown(scene)
    lines = pyramids(scene, _pyramid(pose, size))[shown] @ turn.T
    some = points[:: max(1, len(points) // 100_000)]
    framed = torch.cat((some.quantile(torch.tensor([0.02, 0.98], device="cpu"), 0), lines[:, 0, 0]))  # what the first look is to show
    corners = torch.stack((framed.amin(0), framed.amax(0)))
    rotation = pose[shown, :, :3].float() @ turn.T
    pixel = (found.depth / intrinsics[:, 0, 0, None, None].float()).flatten()[cloud.pixels].median()
    return {
        "name": name,
        "count": len(points),
        "start": round(100 - scene.drop_percent, 1),
        "positions": _base64(quantised),
        "colors": _base64(colors.numpy()),
        "low": low.tolist(),
        "box": box.tolist(),
        "middle": corners.mean(0).tolist(),
        "extent": max(float((corners[1] - corners[0]).norm()), 1e-12),
        "pixel": float(pixel) * (found.depth.numel() / len(points)) ** 0.5,
        "cameras": [
            {
                "eye": _round(edges[0, 0]),
                "corners": [_round(edges[i, 1]) for i in range(4)],
                "forward": _round(r[2]), "up": _round(-r[1]),
                "angle": float(2 * torch.atan(found.depth.shape[1] / 2 / intrinsics[i, 1, 1])),
            }
            for i, edges, r in zip(shown, lines, rotation, strict=True)
        ],
    }  # fmt: skip


def _pyramid(pose: Tensor, size: float) -> float:
    """How deep the cameras are drawn: small beside the scene, and so that neighbours stand apart."""
    if len(pose) < 2:
        return 0.05 * size
    centres = -(pose[:, :, :3].mT @ pose[:, :, 3:])[:, :, 0]
    nearest = (torch.cdist(centres, centres) + torch.eye(len(pose), dtype=torch.float64, device="cpu") * 1e300).amin(1)
    return min(max(0.8 * float(nearest.median()), 0.012 * size), 0.05 * size)


def _shown(scene: Reconstruction) -> list[int]:
    return spread(range(len(scene.names)), MAX_CAMERAS)


def _thumbnail(pixels: Tensor) -> str:
    image = to_image(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    image.save(data, format="JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def _round(values: Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]
