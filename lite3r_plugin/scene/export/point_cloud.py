"""Coloured point clouds: chosen from a prediction, written as PLY, and drawn for a first look."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...files import write_atomically
from ..prediction import Prediction


@dataclass(frozen=True)
class PointCloud:
    """M points.

    Attributes:
        points: ``[M, 3]`` float32 in world coordinates.
        colors: ``[M, 3]`` uint8.
        pixels: ``[M]`` int64, where each comes from: its place in the flattened ``[S, H, W]`` of the prediction; None: from nowhere.
    """

    points: Tensor
    colors: Tensor
    pixels: Tensor | None = None


def point_cloud(prediction: Prediction, drop_percent: float = 20.0, max_points: int = 1_000_000, seed: int = 0) -> PointCloud:
    """The surest pixels of a prediction as a point cloud.

    Args:
        prediction: The scene. Pixels that are not finite or have no positive depth are left out.
        drop_percent: Percentage of the least confident pixels to leave out, in [0, 100).
        max_points: At most so many points, a random subset that `seed` determines.

    Raises:
        InputError: a wrong argument, or no valid pixel at all.
    """
    if not 0 <= drop_percent < 100:
        raise InputError(f"the percentage of points to drop is in [0, 100), got {drop_percent}")
    if max_points < 1:
        raise InputError(f"the number of points must be at least 1, got {max_points}")
    confidence = prediction.confidence.flatten()
    points = prediction.points.flatten(0, 2)
    valid = points.isfinite().all(-1) & confidence.isfinite() & (prediction.depth.flatten() > 0)
    kept = valid.nonzero()[:, 0]
    if not len(kept):
        raise InputError("the model predicted no valid point for these images; check that its weights are the right ones")
    if drop := int(len(kept) * drop_percent / 100):
        threshold = confidence[kept].kthvalue(drop).values
        surer = kept[confidence[kept] > threshold]
        kept = surer if len(surer) else kept  # all equally sure
    if len(kept) > max_points:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(kept), generator=generator, device="cpu")[:max_points].sort().values
        kept = kept[chosen.to(kept.device)]
    colors = (prediction.images.flatten(0, 2)[kept] * 255).round().clamp(0, 255).to(torch.uint8)
    return PointCloud(points[kept], colors, kept)


def save_ply(cloud: PointCloud, path: Path) -> None:
    """Write a binary PLY with colours, all at once. Raises `InputError` when that fails."""
    import trimesh

    data: Any = trimesh.PointCloud(cloud.points.numpy(), colors=cloud.colors.numpy()).export(file_type="ply")
    write_atomically(path, data)


def with_lines(cloud: PointCloud, lines: Tensor, color: tuple[int, int, int], steps: int = 150) -> PointCloud:
    """The cloud and points along `lines` ``[..., 2, 3]``, `steps` each, so that `render` draws cameras too."""
    share = torch.linspace(0, 1, steps, device="cpu")[:, None, None]
    start, end = lines.flatten(0, -3).unbind(1)
    points = (start + share * (end - start)).flatten(0, 1)
    colors = torch.tensor(color, dtype=torch.uint8, device="cpu").expand(len(points), 3)
    return PointCloud(torch.cat((cloud.points, points)), torch.cat((cloud.colors, colors)))


def render(
    cloud: PointCloud,
    size: tuple[int, int] = (480, 720),
    turn: float = 18.0,
    lift: float = 10.0,
    zoom: float = 1.0,
    dot: int = 2,
    like: PointCloud | None = None,
) -> Tensor:
    """A picture ``[H, W, 3]`` uint8 of the cloud from outside, turned and lifted by degrees around the middle of `like`, or its own.

    World coordinates are those of the first camera (x right, y down, z forward) in all models here, so the picture
    shows what the first view shows, from the side. White where there is no point.
    """
    height, width = size
    points, framed = cloud.points.double(), (cloud if like is None else like).points.double()
    some = framed[:: max(1, len(framed) // 1_000_000)]  # torch.quantile takes 16 million numbers at most
    low, middle, high = (some.quantile(q, 0) for q in (0.02, 0.5, 0.98))
    extent = (high - low).norm().clamp_min(1e-12)
    a, b = math.radians(turn), math.radians(lift)
    yaw = points.new_tensor([[math.cos(a), 0, -math.sin(a)], [0, 1, 0], [math.sin(a), 0, math.cos(a)]])
    pitch = points.new_tensor([[1, 0, 0], [0, math.cos(b), -math.sin(b)], [0, math.sin(b), math.cos(b)]])
    camera = (points - middle) @ (pitch @ yaw).T + points.new_tensor([0, 0, 1.1]) * extent
    in_front = camera[:, 2] > 0.05 * extent
    camera, colors = camera[in_front], cloud.colors[in_front]
    focal = 1.25 * zoom * min(size)
    uv = camera[:, :2] / camera[:, 2:] * focal + points.new_tensor([width / 2, height / 2])
    canvas = colors.new_full((height * width, 3), 255)
    nearest = points.new_full((height * width,), torch.inf)
    for dy in range(dot):  # every point is `dot` pixels wide and high
        for dx in range(dot):
            column, row = (uv + uv.new_tensor([dx, dy])).floor().long().unbind(-1)
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            pixel, depth = (row * width + column)[inside], camera[inside, 2]
            before = nearest.clone()
            nearest.scatter_reduce_(0, pixel, depth, "amin")
            wins = (depth == nearest[pixel]) & (depth < before[pixel])
            canvas[pixel[wins]] = colors[inside][wins]
    return canvas.view(height, width, 3)
