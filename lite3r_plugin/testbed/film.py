"""What cameras and files do to images: exposure, colour, blur, noise, JPEG. Geometry is left alone."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

# quantisation of luminance in JPEG's annex K, by rows
_TABLE = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101,
    72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


@torch.no_grad()
def develop(rgb: Tensor, generator: torch.Generator) -> Tensor:
    """Random film and file of samples ``[B, S, 3, H, W]`` in [0, 1], H and W multiples of 8; most of it is common to a sample."""
    batch, views = rgb.shape[:2]

    def uniform(*shape: int, lo: float = 0.0, hi: float = 1.0) -> Tensor:
        values = torch.rand(*shape, generator=generator, device=rgb.device) * (hi - lo) + lo
        return values.reshape(*shape, *[1] * (5 - len(shape)))

    def sometimes(share: float) -> Tensor:
        return (uniform(batch) < share).to(rgb)

    gain = (uniform(batch, lo=-0.25, hi=0.25) + uniform(batch, views, lo=-0.12, hi=0.12)).exp()
    colour = 1 + uniform(batch, 1, 3, lo=-0.08, hi=0.08) + uniform(batch, views, 3, lo=-0.02, hi=0.02)
    x = (rgb * gain * colour).clamp(1e-4, 1) ** uniform(batch, lo=-0.2, hi=0.2).exp()
    grey = x.mean(2, keepdim=True)
    x = grey + (x - grey) * uniform(batch, lo=0.5, hi=1.2)
    soft = F.avg_pool2d(x.flatten(0, 1), 3, 1, 1, count_include_pad=False).view_as(x)
    x = torch.lerp(x, soft, sometimes(0.4) * uniform(batch, views))
    x = x + torch.randn(x.shape, generator=generator, device=x.device) * (sometimes(0.5) * uniform(batch, hi=0.03))
    return torch.where(sometimes(0.4).bool(), jpeg(x, uniform(batch, lo=0.2, hi=2.0)), x).clamp(0, 1)


def jpeg(rgb: Tensor, coarseness: Tensor) -> Tensor:
    """What JPEG leaves of images ``[..., 3, H, W]``; coarseness scales its table, 1 is quality 50. Colours are not subsampled."""
    cosines, table, to_ycc, to_rgb = _constants(rgb.device)
    ycc = torch.einsum("ij,...jhw->...ihw", to_ycc, rgb * 255)
    blocks = ycc.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8))  # [..., rows, 8, columns, 8]
    table = table * coarseness[..., None, None].clamp(min=0.02)
    waves = torch.einsum("ky,...yxc,lc->...kxl", cosines, blocks, cosines)
    waves = (waves / table).round() * table
    ycc = torch.einsum("ky,...kxl,lc->...yxc", cosines, waves, cosines).flatten(-2).flatten(-3, -2)
    return torch.einsum("ij,...jhw->...ihw", to_rgb, ycc) / 255


@functools.cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cosine transform ``[8, 8]``, table ``[8, 1, 8]``, and matrices to and from luminance and colour differences."""
    k = torch.arange(8.0, device="cpu")
    cosines = torch.cos((k + 0.5) * k[:, None] * (math.pi / 8)) * 0.5
    cosines[0] *= 0.5**0.5
    table = torch.tensor(_TABLE, dtype=torch.float32, device=device).view(8, 1, 8)
    return cosines.to(device), table, torch.tensor(_TO_YCC, device=device), torch.tensor(_TO_RGB, device=device)
