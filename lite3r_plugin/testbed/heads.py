"""Output heads of the testbed: dense maps from patch tokens, cameras from camera tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Block


class DenseHead(nn.Module):
    """Maps in full resolution from patch tokens and the fine features of the image stem.

    Tokens are mixed by a residual convolution, brought to a quarter of the resolution, joined with the stem's
    features (edges), and each position then predicts its 4 x 4 pixels.
    """

    def __init__(self, dim: int, fine_dim: int, channels: int, hidden: int = 192, fine_hidden: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, hidden)
        self.mix = nn.Sequential(nn.Conv2d(hidden, hidden, 3, 1, 1), nn.GELU(), nn.Conv2d(hidden, hidden, 3, 1, 1))
        self.up = nn.Conv2d(hidden, 4 * fine_hidden, 1)
        self.skip = nn.Conv2d(fine_dim, fine_hidden, 1)
        self.refine = nn.Sequential(nn.GELU(), nn.Conv2d(fine_hidden, 2 * fine_hidden, 3, 1, 1), nn.GELU())
        self.out = nn.Conv2d(2 * fine_hidden, 16 * channels, 1)
        _start_small(self.out)

    def forward(self, tokens: Tensor, fine: Tensor, grid: tuple[int, int]) -> Tensor:
        """tokens: ``[B, h * w, C]``; fine: ``[B, F, 2h, 2w]``; grid: (h, w). Returns ``[B, channels, 8h, 8w]`` in FP32."""
        x = self.project(self.norm(tokens)).transpose(1, 2).unflatten(2, grid)
        x = x + self.mix(x)
        x = F.pixel_shuffle(self.up(x), 2) + self.skip(fine)
        return F.pixel_shuffle(self.out(self.refine(x)), 4).float()


class CameraHead(nn.Module):
    """Pose encodings from the camera tokens of all views, which exchange information once more."""

    def __init__(self, dim: int, width: int, head_dim: int, layer_scale: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, width)
        self.first_view = nn.Parameter(torch.zeros(width))
        self.trunk = nn.ModuleList(Block(width, head_dim, 2.0, layer_scale) for _ in range(2))
        last = nn.Linear(width, 9)
        _start_small(last)
        self.out = nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, width), nn.GELU(), last)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: ``[B, S, C]``, one camera token a view. Returns pose encodings ``[B, S, 9]`` in FP32 (see `cameras`)."""
        x = self.project(self.norm(tokens))
        first = torch.arange(x.shape[1], device=x.device) == 0
        x = x + first[:, None] * self.first_view
        for block in self.trunk:
            x = block(x)
        raw = self.out(torch.cat((x, x[:, :1].expand_as(x)), -1)).float()
        translation, turn, fov = raw.split((3, 4, 2), -1)
        turn = turn + (torch.arange(4, device=turn.device) == 3)  # starts near the identity
        return torch.cat((translation, F.normalize(turn, dim=-1), torch.pi * torch.sigmoid(fov - 0.7)), -1)


def _start_small(layer: nn.Linear | nn.Conv2d) -> None:
    nn.init.normal_(layer.weight, std=0.01)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
