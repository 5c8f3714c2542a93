"""One picture of several reconstructions of the same views, side by side, with the numbers in it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ...files import write_atomically
from .pictures import depth_scale

INK, QUIET = "#14171c", "#5b6470"
LABEL = 0.26  # inches above a row of maps


@dataclass(frozen=True)
class Column:
    """A reconstruction in the picture.

    Attributes:
        title: What it is called.
        text: Its numbers, a line each.
        depth: ``[S, H, W]``, NaN where there is none, in one unit for all columns.
        error: ``[S, H, W]``, relative to the truth; None for the truth itself.
        cloud: A picture ``[h, w, 3]`` uint8 of the points.
    """

    title: str
    text: Sequence[str]
    depth: Tensor
    error: Tensor | None
    cloud: Tensor


def save_comparison(path: Path, title: str, images: Tensor, columns: Sequence[Column], notes: Sequence[str], most: int = 3) -> None:
    """Write a PNG: the photographs ``[S, H, W, 3]`` above, then a column for each reconstruction, at most `most` views in it.

    Raises:
        InputError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, strip = 4.3 * len(columns), 8
    shown = np.linspace(0, len(images) - 1, min(most, len(images))).round().astype(int)
    row, looks = 4.3 / len(shown), 4.3 * columns[0].cloud.shape[0] / columns[0].cloud.shape[1]
    views = np.linspace(0, len(images) - 1, min(strip, len(images))).round().astype(int)
    heads, photos = 0.9, min((width - 0.3) / len(views), 1.75)
    heights = [0.55, photos + 0.1, heads, row + LABEL, row + LABEL, looks + 0.15, 0.24 * len(notes) + 0.15]
    figure = Figure(figsize=(width, sum(heights)), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    tops = np.cumsum(heights) / sum(heights)
    bands = [(1 - top, height / sum(heights)) for top, height in zip(tops, heights, strict=True)]
    figure.text(0.008, bands[0][0] + bands[0][1] * 0.5, title, fontsize=15, weight="bold", color=INK, va="center")
    _strip(figure, bands[1], [images[i].numpy() for i in views], width, left=0.008)
    low, high = depth_scale([column.depth for column in columns])
    worst = 0.4
    for i, column in enumerate(columns):
        left = i / len(columns)
        bottom, height = bands[2]
        figure.text(left + 0.008, bottom + height * 0.74, column.title, fontsize=13, weight="bold", color=INK, va="center")
        for k, line in enumerate(column.text):
            figure.text(left + 0.008, bottom + height * (0.42 - 0.26 * k), line, fontsize=9.5, color=QUIET, va="center")
        _label(figure, left, bands[3], f"depth, {low:.1f} to {high:.1f} m" if i == 0 else "depth")
        maps = [column.depth[j].numpy() for j in shown]
        _strip(figure, bands[3], maps, width, left, len(columns), cmap="turbo_r", vmin=low, vmax=high)
        if column.error is not None:
            _label(figure, left, bands[4], f"error of depth, black 0 to yellow {worst:.0%}")
            errors = [column.error[j].numpy() for j in shown]
            _strip(figure, bands[4], errors, width, left, len(columns), cmap="inferno", vmin=0, vmax=worst)
        bottom, height = bands[5]
        axis = figure.add_axes((left + 0.004, bottom, 1 / len(columns) - 0.008, height))
        axis.imshow(column.cloud.numpy(), interpolation="lanczos")
        axis.axis("off")
    bottom, height = bands[6]
    for k, note in enumerate(notes):
        figure.text(0.008, bottom + height * (1 - (k + 0.6) / (len(notes) + 0.4)), note, fontsize=9.5, color=INK, va="center")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def _label(figure: Any, left: float, band: tuple[float, float], text: str) -> None:
    figure.text(left + 0.008, band[0] + band[1] - 0.04 / figure.get_figheight(), text, fontsize=8.5, color=QUIET, va="top")


def _strip(figure: Any, band: tuple[float, float], maps: list[Any], width: float, left: float, columns: int = 1, **options: Any) -> None:
    """Maps side by side in a band of the figure, at their own shape."""
    bottom, height = band
    share = (1 / columns - 0.016) / len(maps)
    tall = share * width / figure.get_figheight() * maps[0].shape[0] / maps[0].shape[1]
    if columns == 1:
        tall = height * 0.94
        share = tall * figure.get_figheight() / width * maps[0].shape[1] / maps[0].shape[0]
        left -= 0.008
    for k, values in enumerate(maps):
        axis = figure.add_axes((left + 0.008 + k * share, bottom, share * 0.98, tall * 0.98))
        axis.imshow(values, interpolation="nearest" if options else "lanczos", aspect="auto", **options)
        axis.axis("off")
