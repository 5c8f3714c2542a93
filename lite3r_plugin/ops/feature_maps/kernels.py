"""Triton twin of `naive`, for maps whose channels lie side by side. They are bound by memory.

A program makes some pixels of one row, all of their channels or a block of them, so that whatever depends on the place is computed once a
pixel and every access is a run of channels. Rows are reached by 64-bit offsets: maps may be larger than 2^31 elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..sizes import cover, power_of_2
from .naive import Scales

TILE = 4096  # numbers of one program: enough loads in flight, few enough registers
WARPS = 4
MOST_LANES = 256  # channels of one program, where one makes several pixels


@triton.jit
def _source(place, size, scale, ALIGNED: tl.constexpr):
    """The two neighbours of a point of an axis of `size`, and the fraction of the second."""
    if ALIGNED:
        at = place.to(tl.float32) * scale
    else:
        at = tl.maximum((place.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
    first = tl.minimum(at.to(tl.int32), size - 1)
    return first, tl.minimum(first + 1, size - 1), at - first.to(tl.float32)


@triton.jit
def _embedding(Across, Down, row, column, channel, live, C: tl.constexpr):
    """The embedding of pixels of one row, FP32: of their columns in the first half of the channels, of the row in the second.

    Across, Down     [W, C / 2] and [H, C / 2] contiguous
    """
    HALF: tl.constexpr = C // 2
    of_column = Across + column[:, None] * HALF + channel[None, :]
    across = tl.load(of_column, mask=live & (channel < HALF)[None, :], other=0.0).to(tl.float32)
    of_row = Down + row * HALF + channel - HALF
    down = tl.load(of_row, mask=(channel >= HALF) & (channel < C), other=0.0).to(tl.float32)
    return tl.where((channel < HALF)[None, :], across, down[None, :])


@triton.jit(do_not_specialize=["H", "W", "out_h", "out_w", "blocks", "scale_y", "scale_x"])
def _upsample_kernel(
    X, Across, Down, Out, H, W, out_h, out_w, blocks, scale_y, scale_x,
    C: tl.constexpr, LANES: tl.constexpr, PIXELS: tl.constexpr, ALIGNED: tl.constexpr, EMBEDDED: tl.constexpr,
):  # fmt: skip
    """PIXELS pixels of one row; programs [N * out_h * blocks, blocks of LANES channels].

        X         [N, H, W, C] contiguous
        Out       [N, out_h, out_w, C] contiguous
        Across, Down     [out_w, C / 2] and [out_h, C / 2] contiguous, if EMBEDDED: the embedding of Out

    `blocks` is out_w / PIXELS rounded up; scale_y and scale_x are from places of Out to those of X (ALIGNED: align_corners).
    """
    row = tl.program_id(0) // blocks
    column = (tl.program_id(0) % blocks) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * LANES + tl.arange(0, LANES)
    live = (column < out_w)[:, None] & (channel < C)[None, :]
    top, bottom, down = _source(row % out_h, H, scale_y, ALIGNED)
    left, right, across = _source(column, W, scale_x, ALIGNED)
    first = (row // out_h).to(tl.int64) * H
    above, below = X + (first + top) * (W * C), X + (first + bottom) * (W * C)
    left, right = left[:, None] * C + channel[None, :], right[:, None] * C + channel[None, :]
    across = across[:, None]
    a = tl.load(above + left, mask=live, other=0.0).to(tl.float32)
    b = tl.load(above + right, mask=live, other=0.0).to(tl.float32)
    c = tl.load(below + left, mask=live, other=0.0).to(tl.float32)
    d = tl.load(below + right, mask=live, other=0.0).to(tl.float32)
    mixed = (1.0 - down) * ((1.0 - across) * a + across * b) + down * ((1.0 - across) * c + across * d)
    if EMBEDDED:
        mixed = mixed.to(X.dtype.element_ty).to(tl.float32) + _embedding(Across, Down, row % out_h, column, channel, live, C)
    to = Out + row.to(tl.int64) * (out_w * C)
    tl.store(to + column[:, None] * C + channel[None, :], mixed.to(Out.dtype.element_ty), mask=live)


@triton.jit
def _bias_kernel(X, Bias, elements, C: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr):
    """Add Bias [C] to X, ROWS runs of WIDTH numbers, the channels of one pixel or of several; LANES is WIDTH up to a power of two.

    Triton is to see that `elements` is a multiple of 16, where it is: else the end may be anywhere, and each number is loaded by itself.
    """
    first = tl.program_id(0).to(tl.int64) * (ROWS * WIDTH)
    lane = tl.arange(0, LANES)
    at = tl.arange(0, ROWS)[:, None] * WIDTH + lane[None, :]
    live = (lane < WIDTH)[None, :] & (at < tl.minimum(elements - first, ROWS * WIDTH).to(tl.int32))
    bias = tl.load(Bias + lane % C, mask=lane < WIDTH, other=0.0).to(X.dtype.element_ty).to(tl.float32)
    x = tl.load(X + first + at, mask=live, other=0.0).to(tl.float32) + bias[None, :]
    tl.store(X + first + at, x.to(X.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["H", "W", "blocks"])
def _embedding_kernel(X, Across, Down, Out, H, W, blocks, C: tl.constexpr, LANES: tl.constexpr, PIXELS: tl.constexpr):
    """X plus an embedding, PIXELS pixels of one row; programs [N * H * blocks, blocks of LANES channels].

    X, Out           [N, H, W, C] contiguous
    Across, Down     [W, C / 2] and [H, C / 2] contiguous
    """
    row = tl.program_id(0) // blocks
    column = (tl.program_id(0) % blocks) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * LANES + tl.arange(0, LANES)
    live = (column < W)[:, None] & (channel < C)[None, :]
    base = row.to(tl.int64) * (W * C)
    at = column[:, None] * C + channel[None, :]
    x = tl.load(X + base + at, mask=live, other=0.0).to(tl.float32)
    x += _embedding(Across, Down, row % H, column, channel, live, C)
    tl.store(Out + base + at, x.to(Out.dtype.element_ty), mask=live)


def upsample(x: Tensor, size: tuple[int, int], *, align_corners: bool, scales: Scales = (None, None)) -> Tensor:
    """As `naive.upsample`, of a map with channels side by side."""
    return _upsample(x, size, align_corners, scales, None)


def upsample_with_embedding(x: Tensor, size: tuple[int, int], across: Tensor, down: Tensor, *, align_corners: bool) -> Tensor:
    """As `naive.upsample_with_embedding`, of a map with channels side by side."""
    return _upsample(x, size, align_corners, (None, None), (across.contiguous(), down.contiguous()))


def _upsample(x: Tensor, size: tuple[int, int], align_corners: bool, scales: Scales, embedding: tuple[Tensor, Tensor] | None) -> Tensor:
    count, channels, height, width = x.shape
    dtype = torch.promote_types(x.dtype, embedding[0].dtype) if embedding else x.dtype
    out = torch.empty((count, channels, *size), dtype=dtype, device=x.device, memory_format=torch.channels_last)
    steps = [_step(*axis, align_corners) for axis in zip((height, width), size, scales, strict=True)]
    lanes, pixels = _tile(channels)
    blocks = cover(size[1], pixels)
    launch(
        _upsample_kernel, (count * size[0] * blocks, cover(channels, lanes)), x, *(embedding or (x, x)), out, height, width, *size, blocks,
        *steps, C=channels, LANES=lanes, PIXELS=pixels, ALIGNED=align_corners, EMBEDDED=embedding is not None, num_warps=WARPS,
    )  # fmt: skip
    return out


def add_bias_(x: Tensor, bias: Tensor) -> Tensor:
    """As `naive.add_bias_`, of a map with channels side by side."""
    channels = x.shape[1]
    width = channels * max(1, 64 // channels)  # several pixels of few channels make a run that is worth a vector
    lanes = power_of_2(width)
    rows = max(1, TILE // lanes)
    launch(
        _bias_kernel, (cover(x.numel(), rows * width),), x, bias.contiguous(), x.numel(),
        C=channels, WIDTH=width, LANES=lanes, ROWS=rows, num_warps=WARPS,
    )  # fmt: skip
    return x


def add_embedding(x: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """As `naive.add_embedding`, of a map with channels side by side."""
    count, channels, height, width = x.shape
    out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, across.dtype))
    lanes, pixels = _tile(channels)
    blocks = cover(width, pixels)
    launch(
        _embedding_kernel, (count * height * blocks, cover(channels, lanes)), x, across.contiguous(), down.contiguous(), out,
        height, width, blocks, C=channels, LANES=lanes, PIXELS=pixels, num_warps=WARPS,
    )  # fmt: skip
    return out


def _step(size: int, out: int, scale: float | None, align_corners: bool) -> float:
    """From a place of the result to one of the source."""
    if align_corners:
        return (size - 1) / (out - 1) if out > 1 else 0.0
    return 1 / scale if scale else size / out


def _tile(channels: int) -> tuple[int, int]:
    """Channels and pixels of one program."""
    lanes = min(MOST_LANES, power_of_2(channels))
    return lanes, max(1, TILE // lanes)
