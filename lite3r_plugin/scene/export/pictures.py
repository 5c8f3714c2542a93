"""A picture of a reconstruction: views, depth maps, their difference, and the point cloud from the side."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files import write_atomically

MAX_COLUMNS = 8


@dataclass(frozen=True)
class Panel:
    """A row of the picture, one map for each view.

    Attributes:
        title: What the row shows.
        maps: ``[S, H, W, 3]`` in [0, 1] for colours; ``[S, H, W]`` for numbers.
        kind: ``"image"``; ``"depth"``, where all rows of this kind share their colour scale; or ``"error"``, relative
            errors, in percent with a scale of their own.
    """

    title: str
    maps: Tensor
    kind: str


def save_picture(path: Path, panels: Sequence[Panel], title: str, clouds: Sequence[tuple[str, Tensor]] = ()) -> None:
    """Write a PNG with a row for each panel, at most `MAX_COLUMNS` views, and `clouds` (pictures by title) below.

    Raises:
        InputError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    views, height, width = panels[0].maps.shape[:3]
    columns = min(views, MAX_COLUMNS)
    shown = [i * views // columns for i in range(columns)]
    cell_w = max(1.35, min(2.6, 11.0 / columns))
    row_h = cell_w * height / width
    total_w = max(columns * cell_w + 1.0, 6.5)
    cloud_h = total_w / len(clouds) * max(p.shape[0] / p.shape[1] for _, p in clouds) if clouds else 0.0
    heights = [row_h + 0.34] * len(panels) + ([cloud_h + 0.34] if clouds else [])
    figure = Figure(figsize=(total_w, sum(heights) + 0.6), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    rows: Any = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    scale = depth_scale([panel.maps for panel in panels if panel.kind == "depth"])
    for row, panel in zip(rows, panels, strict=False):
        _draw_panel(row, panel, shown, scale)
    if clouds:
        axes = rows[-1].subplots(1, len(clouds), squeeze=False)[0]
        for axis, (name, picture) in zip(axes, clouds, strict=True):
            axis.imshow(picture.numpy(), interpolation="lanczos")
            axis.set_title(name, fontsize=9, loc="left")
            axis.axis("off")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def _draw_panel(row: Any, panel: Panel, shown: list[int], scale: tuple[float, float]) -> None:
    row.suptitle(panel.title, fontsize=9, x=0.01, ha="left")
    *axes, bar = row.subplots(1, len(shown) + 1, width_ratios=[1.0] * len(shown) + [0.06], squeeze=False)[0]
    options: dict[str, Any] = {}
    maps = panel.maps
    if panel.kind == "depth":
        options = {"cmap": "turbo_r", "vmin": scale[0], "vmax": scale[1]}
    elif panel.kind == "error":
        maps = maps * 100
        options = {"cmap": "magma", "vmin": 0, "vmax": max(_quantile(maps, 0.99), 1e-6)}
    drawn = [axis.imshow(maps[view].numpy(), interpolation="nearest", **options) for axis, view in zip(axes, shown, strict=True)]
    for axis in axes:
        axis.axis("off")
    if panel.kind == "image":
        bar.axis("off")
    else:
        row.colorbar(drawn[0], cax=bar, extend="max", label="% of depth" if panel.kind == "error" else "depth")
        bar.yaxis.label.set_fontsize(8)
        bar.tick_params(labelsize=7)


def depth_scale(maps: list[Tensor]) -> tuple[float, float]:
    """The range of colours for depth maps: without their outermost values."""
    if not maps:
        return 0.0, 1.0
    values = torch.cat([m.flatten() for m in maps])
    low, high = _quantile(values, 0.02), _quantile(values, 0.98)
    return low, max(high, low + 1e-6)


def _quantile(values: Tensor, q: float) -> float:
    values = values[values.isfinite()].flatten()
    return values.kthvalue(max(1, round(q * len(values)))).values.item() if len(values) else 0.0
