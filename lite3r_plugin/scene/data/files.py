"""Reading the files of data sets; whatever is wrong with one is an `InputError` that names it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...errors import InputError
from ..images import SUFFIXES, load_image, to_tensor

ORIENTATION = 0x0112  # EXIF tag; 1 is upright


def read_image(path: Path, posed: bool = False) -> Tensor:
    """An image as ``[3, H, W]`` float32 in [0, 1].

    Args:
        path: The file.
        posed: Its camera is known: an EXIF tag that turns it is refused, because nobody can tell which pixels the camera is for.
    """
    image = load_image(_there(path))
    if posed:
        with Image.open(path) as file:
            if file.getexif().get(ORIENTATION, 1) != 1:
                raise InputError(f"{path} has an EXIF tag that turns it, and a camera; turn its pixels or remove the tag")
    return to_tensor([image])[0]


def read_text(path: Path) -> str:
    """A text file."""
    try:
        return _there(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {error}") from error


def read_bytes(path: Path) -> bytes:
    """A binary file."""
    try:
        return _there(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def read_numbers(path: Path, least: int) -> np.ndarray:
    """The numbers of a text file, `least` or more of them."""
    return parse_numbers(read_text(path).split(), least, path)


def parse_numbers(words: Iterable[str], least: int, path: Path) -> np.ndarray:
    """Words of `path` as numbers, `least` or more of them."""
    try:
        numbers = np.array([float(word) for word in words])
    except ValueError as error:
        raise InputError(f"{path} should hold numbers: {error}") from error
    if len(numbers) < least:
        raise InputError(f"{path} ends early: {len(numbers)} numbers of {least}")
    return numbers


def read_pfm(path: Path) -> Tensor:
    """A depth map of a grey PFM file, ``[H, W]`` with the top row first."""
    data = read_bytes(path)
    head = re.match(rb"(P[fF])\s+(\d+)\s+(\d+)\s+([-+.\deE]+)\s", data)
    if head is None or head[1] != b"Pf":
        raise InputError(f"{path} is no grey PFM file: it begins with {data[:16]!r}")
    width, height = int(head[2]), int(head[3])
    body = data[head.end() :]
    if not width or not height or len(body) != 4 * width * height:
        raise InputError(f"{path} should hold {width}x{height} values in {4 * width * height} bytes, has {len(body)}: it is damaged")
    order = "<f4" if head[4].startswith(b"-") else ">f4"  # the sign of the scale tells the byte order
    values = np.frombuffer(body, order).reshape(height, width)[::-1]
    return checked_depth(values.astype(np.float32), path)


def write_pfm(path: Path, values: Tensor) -> None:
    """The file that `read_pfm` reads."""
    height, width = values.shape
    body = values.detach().cpu().float().flip(0).contiguous().numpy().astype("<f4").tobytes()
    path.write_bytes(f"Pf\n{width} {height}\n-1.0\n".encode() + body)


def read_depth_png(path: Path, unit: float = 0.001, unknown: tuple[int, ...] = (0, 65535)) -> Tensor:
    """A depth map of 16-bit integers, ``[H, W]`` times `unit`; 0 where it is one of `unknown`."""
    values = _grey(path)
    if values.dtype == np.uint8:
        raise InputError(f"{path} has 8-bit pixels; depth has 16")
    return torch.from_numpy(np.where(np.isin(values, unknown), 0, values).astype(np.float32)) * unit


def read_mask(path: Path) -> Tensor:
    """A mask ``[H, W]`` of an image, true in its lighter half."""
    values = _grey(path)
    return torch.from_numpy(values > (127 if values.dtype == np.uint8 else 0))


def checked_depth(values: np.ndarray, path: Path) -> Tensor:
    """A depth map without NaN."""
    if np.isnan(values).any():
        raise InputError(f"{path} holds {int(np.isnan(values).sum())} NaN; depth is 0 where it is unknown")
    return torch.from_numpy(values)


def image_named(folder: Path, stem: str) -> Path:
    """The image `stem` of `folder`, of whichever kind."""
    for suffix in SUFFIXES:
        if (path := folder / (stem + suffix)).is_file():
            return path
    raise InputError(f"{folder} has no image {stem} ({', '.join(SUFFIXES)})")


def folders(path: Path) -> list[Path]:
    """The folders in a folder, in name order."""
    if not path.is_dir():
        raise InputError(f"{path} is no folder; name the folder that holds the data")
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _grey(path: Path) -> np.ndarray:
    try:
        with Image.open(_there(path)) as file:
            values = np.asarray(file if file.mode.startswith("I") else file.convert("L"))
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error ...
        raise InputError(f"{path} cannot be read as an image ({error})") from error
    return values


def _there(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{path} is missing")
    return path
