"""Definition of the passes over feature maps ``[N, C, H, W]``.

Bilinear interpolation to H' x W' reads the source at a point of each axis and mixes its two neighbours, with f the fraction of y:

    y = y' (H - 1) / (H' - 1)          with align_corners (0 where H' is 1)
    y = max((y' + 1/2) / s - 1/2, 0)   else, with s the given scale, or H' / H
    out[y'] = (1 - f) x[floor y] + f x[min(floor y + 1, H - 1)]

and likewise along the rows. The bias of a convolution and an embedding of columns (in the first half of the channels) and rows (in the
second) are sums:

    x[n, c, y, x] += bias[c]
    out[n, c, y, x] = x[n, c, y, x] + (across[x, c] if c < C / 2 else down[y, c - C / 2])

An embedding of an interpolated map is added to what was rounded to the map's dtype, as if each had a pass of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Scales = tuple[float | None, float | None]
"""By how much height and width are said to grow; None: by the ratio of the sizes."""


def output_size(x: Tensor, scales: tuple[float, float]) -> tuple[int, int]:
    """Height and width of ``[N, C, H, W]`` times `scales`, rounded down."""
    height, width = (math.floor(size * scale) for size, scale in zip(x.shape[2:], scales, strict=True))
    return height, width


def upsample(x: Tensor, size: tuple[int, int], *, align_corners: bool, scales: Scales = (None, None)) -> Tensor:
    """`x` at another `size` by bilinear interpolation; see the module's docstring.

    Args:
        x: ``[N, C, H, W]``.
        size: H' and W'.
        align_corners: Whether the corners' centres stay where they are, and not their outer edges.
        scales: What stands for H' / H and W' / W without `align_corners`, where the size was rounded.

    Returns:
        ``[N, C, H', W']`` in x's dtype and memory format.
    """
    return torch.ops.aten.upsample_bilinear2d(x, size, align_corners, *scales)


def add_bias_(x: Tensor, bias: Tensor) -> Tensor:
    """``x + bias[c]`` in the place of `x`, which is returned; `bias` ``[C]`` is rounded to x's dtype first."""
    return x.add_(bias.to(x.dtype)[:, None, None])


def add_embedding(x: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """`x` ``[N, C, H, W]`` plus `across` ``[W, C / 2]`` and `down` ``[H, C / 2]``, in the dtype to which theirs promote."""
    height, width = x.shape[2:]
    embedding = torch.cat((across.expand(height, -1, -1), down[:, None].expand(-1, width, -1)), -1)
    return x + embedding.permute(2, 0, 1)


def upsample_with_embedding(x: Tensor, size: tuple[int, int], across: Tensor, down: Tensor, *, align_corners: bool) -> Tensor:
    """`upsample` to `size` (H', W'), and `add_embedding` to that of `across` ``[W', C / 2]`` and `down` ``[H', C / 2]``."""
    return add_embedding(upsample(x, size, align_corners=align_corners), across, down)
