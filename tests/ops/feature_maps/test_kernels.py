"""The kernels for feature maps against their definition: on a GPU as compiled, elsewhere interpreted at small sizes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from numerics import assert_as_accurate
from pairs import grid
from sla_cases import DEVICE, DTYPES, GPU

from lite3r_plugin.ops.feature_maps import Scales, naive, output_size, upsample, upsample_with_embedding

kernels = pytest.importorskip("lite3r_plugin.ops.feature_maps.kernels")

CHANNELS = (3, 16, 48, 300)
# From where to where: up, down, an odd ratio, one pixel, the same.
SIZES = (((3, 5), (6, 10)), ((7, 4), (3, 9)), ((2, 3), (1, 1)), ((1, 2), (4, 70)), ((4, 3), (4, 3)))


def random_map(channels: int, size: tuple[int, int], dtype: torch.dtype, count: int = 2) -> torch.Tensor:
    """A map with channels side by side."""
    return torch.randn(count, channels, *size, device=DEVICE).to(dtype, memory_format=torch.channels_last)


@pytest.mark.parametrize(("channels", "sizes", "align_corners", "dtype"), grid(CHANNELS, SIZES, (False, True), DTYPES))
def test_upsample(channels: int, sizes: tuple[tuple[int, int], tuple[int, int]], align_corners: bool, dtype: torch.dtype) -> None:
    x = random_map(channels, sizes[0], dtype)
    result = kernels.upsample(x, sizes[1], align_corners=align_corners)
    same, exact = (naive.upsample(x.to(kind), sizes[1], align_corners=align_corners) for kind in (dtype, torch.float64))
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert_as_accurate(result, same, exact)


@pytest.mark.parametrize("scales", [(1.7, 2.6), (0.4, None), (None, 3.0)])
def test_upsample_by_given_scales(scales: Scales) -> None:
    x = random_map(16, (5, 7), torch.float32)
    size = output_size(x, (scales[0] or 1.0, scales[1] or 1.0))
    result, exact = (
        kernels.upsample(x, size, align_corners=False, scales=scales),
        naive.upsample(x.double(), size, align_corners=False, scales=scales),
    )
    assert_as_accurate(result, exact.float(), exact)


@pytest.mark.parametrize(("channels", "size", "dtype"), grid((1, 2, 3, 32, 80, 256), ((1, 1), (3, 5), (9, 37)), DTYPES))
def test_add_bias(channels: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    x, bias = random_map(channels, size, dtype), torch.randn(channels, device=DEVICE)
    expected = naive.add_bias_(x.clone(), bias)
    result = kernels.add_bias_(x, bias)
    assert result is x
    assert torch.equal(result, expected)


@pytest.mark.parametrize(("channels", "size", "dtype", "embedding"), grid((2, 6, 64, 300), ((1, 3), (5, 2), (3, 40)), DTYPES, DTYPES))
def test_add_embedding(channels: int, size: tuple[int, int], dtype: torch.dtype, embedding: torch.dtype) -> None:
    x = random_map(channels, size, dtype)
    across, down = (torch.randn(length, channels // 2, device=DEVICE).to(embedding) for length in reversed(size))
    result, expected = kernels.add_embedding(x, across, down), naive.add_embedding(x, across, down)
    assert result.dtype == expected.dtype
    assert torch.equal(result, expected)
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("channels", "sizes", "align_corners", "dtype", "embedding"), grid((2, 6, 64, 300), SIZES, (False, True), DTYPES, DTYPES)
)
def test_upsample_with_embedding(
    channels: int, sizes: tuple[tuple[int, int], tuple[int, int]], align_corners: bool, dtype: torch.dtype, embedding: torch.dtype
) -> None:
    """The bits of one pass after the other, and as exact as torch's."""
    x = random_map(channels, sizes[0], dtype)
    across, down = (torch.randn(length, channels // 2, device=DEVICE).to(embedding) for length in reversed(sizes[1]))
    result = kernels.upsample_with_embedding(x, sizes[1], across, down, align_corners=align_corners)
    by_two = kernels.add_embedding(kernels.upsample(x, sizes[1], align_corners=align_corners), across, down)
    same, exact = (
        naive.upsample_with_embedding(x.to(kind), sizes[1], across.to(wide), down.to(wide), align_corners=align_corners)
        for kind, wide in ((dtype, embedding), (torch.float64, torch.float64))
    )
    assert result.dtype == same.dtype
    assert torch.equal(result, by_two)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert_as_accurate(result, same, exact)


@pytest.mark.parametrize("channels", [6, 300])
def test_an_upsampled_map_is_written_everywhere_and_nowhere_else(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is NaN before: each number of the result is written, and none behind it."""
    x = random_map(channels, (3, 5), torch.float32)
    across, down = torch.randn(37, channels // 2, device=DEVICE), torch.randn(7, channels // 2, device=DEVICE)
    expected = naive.upsample_with_embedding(x, (7, 37), across, down, align_corners=True)
    room: list[torch.Tensor] = []

    def poisoned(shape: tuple[int, ...], **arguments: Any) -> torch.Tensor:
        count = math.prod(shape)
        room.append(torch.full((count + 4096,), torch.nan, dtype=arguments["dtype"], device=arguments["device"]))
        return room[0][:count].view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)

    monkeypatch.setattr(torch, "empty", poisoned)
    result = kernels.upsample_with_embedding(x, (7, 37), across, down, align_corners=True)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert room[0][result.numel() :].isnan().all()


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements() -> None:
    x = torch.zeros(9, 256, 16, 16, device=DEVICE, dtype=torch.float16).to(memory_format=torch.channels_last)
    x[-1] = torch.randn(256, 16, 16, device=DEVICE)
    result = upsample(x, (1024, 1024), align_corners=True)  # 2.4e9
    assert result.numel() > 2**31
    assert not result[:-1].any()
    torch.testing.assert_close(result[-1:], upsample(x[-1:], (1024, 1024), align_corners=True), rtol=0, atol=0)
    kernels.add_bias_(result, torch.ones(256, device=DEVICE))
    assert bool((result[:-1] == 1).all())
    del result
    ones = torch.ones(1024, 128, device=DEVICE, dtype=torch.float16)
    result = upsample_with_embedding(x, (1024, 1024), ones, 2 * ones, align_corners=True)
    assert bool((result[:-1, :128] == 1).all())
    assert bool((result[:-1, 128:] == 2).all())


if GPU:
    CHANNELS = (*CHANNELS, 1024)
