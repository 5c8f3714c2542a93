"""Reading depth maps and masks; whatever is wrong with one is an `InputError` that names the file.

A map without content, or with values of another range than its format says, is refused: nothing would be known of the scene, unsaid.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from ..images import opened
from ..reading import MORE_PIXELS, current_limits, read_bytes, say

# Depth in any unit that somebody uses; numbers of another byte order or type are spread over all exponents.
DEPTHS = (1e-15, 1e15)


def read_pfm(path: Path) -> Tensor:
    """A depth map of a grey PFM file, ``[H, W]`` with the top row first."""
    data = read_bytes(path)
    head = re.match(rb"(P[fF])\s{1,9}([0-9]{1,9})\s{1,9}([0-9]{1,9})\s{1,9}([-+]?)([0-9.eE+-]{1,40})\s", data)
    if head is None or head[1] != b"Pf":
        raise InputError(f"{path} is no grey PFM file: it begins with {data[:16]!r}")
    try:
        factor = float(head[5])
    except ValueError:
        factor = 0.0
    if factor != 1:
        raise InputError(f"{path} scales its values by {head[5].decode()}; writers do not agree on what that means; save it with 1 or -1")
    order = "<f4" if head[4] == b"-" else ">f4"  # the sign of the scale tells the byte order
    return checked_depth(_values(data, head.end(), int(head[2]), int(head[3]), order, path)[::-1], path)


def write_pfm(path: Path, values: Tensor) -> None:
    """The file that `read_pfm` reads."""
    height, width = values.shape
    body = values.detach().cpu().float().flip(0).contiguous().numpy().astype("<f4").tobytes()
    path.write_bytes(f"Pf\n{width} {height}\n-1.0\n".encode() + body)


def read_colmap_depth(path: Path) -> Tensor:
    """A depth map of COLMAP's dense stereo, ``[H, W]``: ``width&height&channels&``, then float32 row by row."""
    data = read_bytes(path)
    head = re.match(rb"([0-9]{1,9})&([0-9]{1,9})&1&", data)
    if head is None:
        raise InputError(f"{path} is no depth map of COLMAP: it begins with {data[:16]!r}")
    return checked_depth(_values(data, head.end(), int(head[1]), int(head[2]), "<f4", path), path, estimated=True)


def read_depth_png(path: Path, unit: float = 0.001, unknown: tuple[int, ...] = (0, 65535)) -> Tensor:
    """A depth map of 16-bit integers, ``[H, W]`` times `unit`; 0 where it is one of `unknown`."""
    with opened(path) as file:
        if not file.mode.startswith("I"):
            bits = "8-bit pixels" if file.mode in ("L", "P", "RGB", "RGBA") else f"pixels of kind {file.mode}"
            raise InputError(f"{path} has {bits}; depth has 16 bits")
        values = np.array(file)
    if values.min() < 0 or values.max() > 65535:
        raise InputError(f"{path} has values from {values.min()} to {values.max()}; depth has 16 bits, 0 to 65535")
    depth = values.astype(np.float32)
    for value in unknown:
        depth[values == value] = 0
    return checked_depth(np.multiply(depth, np.float32(unit), out=depth), path)


def read_mask(path: Path) -> Tensor:
    """A mask ``[H, W]`` of an image: true in the lighter half of 0 to 255 (or 65535), or, where nothing is over 1, at 1."""
    with opened(path) as file:
        if file.has_transparency_data:
            raise InputError(f"{path} has an alpha channel, so it is not plain which part is meant; save the mask as black and white")
        values = np.array(file if file.mode.startswith("I") else file.convert("L"))
    low, high = int(values.min()), int(values.max())
    top = next((top for top in (1, 255, 65535) if high <= top), 0)
    if high == 0:
        raise InputError(f"{path} is an empty mask: it is black all over; take the view out, or mend the mask")
    if low < 0 or high <= top // 2:
        raise InputError(f"{path} has values from {low} to {high}; a mask is black and white: 0 and 255, or 0 and 1")
    return torch.from_numpy(values > top // 2)


def checked_depth(values: np.ndarray, path: Path, estimated: bool = False) -> Tensor:
    """A depth map as float32 ``[H, W]``, as it is, once it is known to be one.

    Args:
        values: ``[H, W]``.
        path: What messages name.
        estimated: From the images, which may tell nothing: a map without content is said in a `DataWarning`. Else it is refused.

    Raises:
        InputError: it holds NaN, knows no depth, or values that are none.
    """
    values = np.array(values, dtype=np.float32, order="C")  # memory of its own: that of a file is aligned by chance
    if np.isnan(values).any():
        raise InputError(f"{path} holds {int(np.isnan(values).sum())} NaN; depth is 0 where it is unknown")
    known = values[np.isfinite(values) & (values > 0)]
    if not len(known) and estimated:
        say(f"{path} knows no depth of {values.shape[1]}x{values.shape[0]}")
        return torch.from_numpy(values)
    if not len(known):
        raise InputError(f"{path} holds no depth: nothing of {values.shape[1]}x{values.shape[0]} is known; mend it, or take the view out")
    if known.min() < DEPTHS[0] or known.max() > DEPTHS[1]:
        raise InputError(f"{path} holds depths from {known.min():.3g} to {known.max():.3g}: its numbers are of another type or byte order")
    return torch.from_numpy(values)


def _values(data: bytes, start: int, width: int, height: int, order: str, path: Path) -> np.ndarray:
    """``[H, W]`` of 4-byte values."""
    if width * height > (allowed := current_limits().pixels):
        raise InputError(f"{path} announces {width}x{height} values, more than the {allowed:,} that are read; {MORE_PIXELS}")
    if not width or not height or len(data) - start != 4 * width * height:
        raise InputError(
            f"{path} should hold {width}x{height} values in {4 * width * height} bytes, has {len(data) - start}: it is damaged"
        )
    return np.frombuffer(data, order, offset=start).reshape(height, width)
