"""Passes over feature maps ``[N, C, H, W]`` of dense heads: up-sampling, the bias of a convolution, a position embedding.

`naive` is the definition, `kernels` its Triton twin for maps whose channels lie side by side (channels-last), in which torch's own
kernels reach a tenth of the bandwidth of memory. They have no gradients. Of maps whose rows lie side by side torch's kernels run.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..dispatch import TRITON_DTYPES, constant_in_graphs, register, require_one_device, triton_installed, under_trace
from . import naive
from .naive import Scales, output_size

__all__ = ["Scales", "add_bias_", "add_embedding", "output_size", "takes", "upsample", "upsample_with_embedding", "why_no_kernels"]

MAX_CHANNELS = 8192  # numbers of one pixel that fit into the registers of one program


@constant_in_graphs
def why_no_kernels(device: torch.device) -> str | None:
    """The reason why the kernels do not run on `device`, or None when they do."""
    return _why_no_kernels(device)


@functools.lru_cache(maxsize=64)
def _why_no_kernels(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the tensors are on {device}, not on a CUDA GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None if triton_installed() else "triton is not installed"


def takes(x: Tensor) -> bool:
    """Whether the kernels take `x`: a map with channels side by side, BF16, FP16 or FP32, on a GPU on which they run."""
    return (
        x.dim() == 4
        and x.dtype in TRITON_DTYPES
        and 0 < x.shape[1] <= MAX_CHANNELS
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()  # one channel, or one pixel: torch's kernels are as good
        and why_no_kernels(x.device) is None
    )


def upsample(x: Tensor, size: tuple[int, int], *, align_corners: bool, scales: Scales = (None, None)) -> Tensor:
    """`x` at another size by bilinear interpolation; `naive.upsample` is the definition.

    Args:
        x: ``[N, C, H, W]``.
        size: Height and width of the result.
        align_corners, scales: As in the definition.

    Returns:
        ``[N, C, *size]`` in x's dtype and memory format; arithmetic is FP32.
    """
    arguments = (x, *size, align_corners, *scales)
    return upsample_operator(*arguments) if under_trace() else _upsample(*arguments)


def add_bias_(x: Tensor, bias: Tensor) -> Tensor:
    """``x + bias[c]`` in the place of `x`, which is returned; `naive.add_bias_` is the definition.

    Args:
        x: ``[N, C, H, W]``; no tensor with gradients.
        bias: ``[C]``, which is rounded to x's dtype first.

    Raises:
        ConfigError, WeightsError: the tensors are on several devices, or one is on the meta device.
    """
    require_one_device(x, bias=bias)
    (add_bias_operator if under_trace() else _add_bias)(x, bias)
    return x


def add_embedding(x: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """`x` plus an embedding of columns in the first half of its channels, of rows in the second; `naive.add_embedding` is the definition.

    Args:
        x: ``[N, C, H, W]``, C even.
        across: ``[W, C / 2]``.
        down: ``[H, C / 2]``, in the dtype of `across`.

    Returns:
        ``[N, C, H, W]`` in the dtype to which those of x and the embedding promote, in x's memory format.

    Raises:
        ConfigError, WeightsError: the tensors are on several devices, or one is on the meta device.
    """
    require_one_device(x, across=across, down=down)
    return (add_embedding_operator if under_trace() else _add_embedding)(x, across, down)


def upsample_with_embedding(x: Tensor, size: tuple[int, int], across: Tensor, down: Tensor, *, align_corners: bool) -> Tensor:
    """`upsample`, and `add_embedding` to the result, in one pass; `naive.upsample_with_embedding` is the definition.

    Args:
        x: ``[N, C, H, W]``, C even.
        size: Height and width of the result.
        across: ``[size[1], C / 2]``.
        down: ``[size[0], C / 2]``, in the dtype of `across`.
        align_corners: As in the definition.

    Returns:
        ``[N, C, *size]`` in the dtype to which those of x and the embedding promote, in x's memory format.

    Raises:
        ConfigError, WeightsError: the tensors are on several devices, or one is on the meta device.
    """
    require_one_device(x, across=across, down=down)
    arguments = (x, *size, across, down, align_corners)
    return upsample_with_embedding_operator(*arguments) if under_trace() else _upsample_with_embedding(*arguments)


def _upsample(x: Tensor, height: int, width: int, align_corners: bool, scale_y: float | None, scale_x: float | None) -> Tensor:
    size, scales = (height, width), (scale_y, scale_x)
    if not takes(x) or height < 1 or width < 1:
        return naive.upsample(x, size, align_corners=align_corners, scales=scales)
    from . import kernels

    return kernels.upsample(x, size, align_corners=align_corners, scales=scales)


def _add_bias(x: Tensor, bias: Tensor) -> None:
    if not takes(x):
        naive.add_bias_(x, bias)
        return
    from . import kernels

    kernels.add_bias_(x, bias)


def _add_embedding(x: Tensor, across: Tensor, down: Tensor) -> Tensor:
    if not takes(x) or across.dtype not in TRITON_DTYPES:
        return naive.add_embedding(x, across, down)
    from . import kernels

    return kernels.add_embedding(x, across, down)


def _upsample_with_embedding(x: Tensor, height: int, width: int, across: Tensor, down: Tensor, align_corners: bool) -> Tensor:
    if not takes(x) or across.dtype not in TRITON_DTYPES or height < 1 or width < 1:
        return naive.upsample_with_embedding(x, (height, width), across, down, align_corners=align_corners)
    from . import kernels

    return kernels.upsample_with_embedding(x, (height, width), across, down, align_corners=align_corners)


def _empty_upsampled(x: Tensor, height: int, width: int, *_: Any) -> Tensor:
    return like_map(x, (height, width))


def like_map(x: Tensor, size: tuple[int, int], dtype: torch.dtype | None = None) -> Tensor:
    """An empty map of x's channels and memory format, at another size."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.empty(
        (*x.shape[:2], *size), dtype=dtype or x.dtype, device=x.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )  # fmt: skip


upsample_operator = register(
    "upsample",
    "(Tensor x, int height, int width, bool align_corners, float? scale_y, float? scale_x) -> Tensor",
    _upsample,
    _empty_upsampled,
)
add_bias_operator = register("add_bias_", "(Tensor(a!) x, Tensor bias) -> ()", _add_bias, lambda x, bias: None)
add_embedding_operator = register(
    "add_embedding",
    "(Tensor x, Tensor across, Tensor down) -> Tensor",
    _add_embedding,
    lambda x, across, down: like_map(x, tuple(x.shape[2:]), torch.promote_types(x.dtype, across.dtype)),
)
upsample_with_embedding_operator = register(
    "upsample_with_embedding",
    "(Tensor x, int height, int width, Tensor across, Tensor down, bool align_corners) -> Tensor",
    _upsample_with_embedding,
    lambda x, height, width, across, down, align_corners: like_map(x, (height, width), torch.promote_types(x.dtype, across.dtype)),
)
