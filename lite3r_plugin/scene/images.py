"""Photographs from a folder, as every model of the command line wants them: upright, RGB, eight bit, in name order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")


def find_images(folder: Path) -> list[Path]:
    """The image files of `folder` (not of its subfolders), in natural order: ``2.png`` before ``10.png``.

    Raises:
        InputError: no such folder, or no image in it.
    """
    if not folder.exists():
        raise InputError(f"{folder} does not exist; name a folder with photographs of one scene")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; name the folder that holds the photographs")
    try:
        files = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from error
    images = sorted((p for p in files if p.suffix.lower() in SUFFIXES), key=_natural)
    if not images:
        held = f"its {len(files)} files are of other kinds" if files else "it is empty"
        raise InputError(f"{folder} holds no images ({', '.join(SUFFIXES)}): {held}")
    return images


def choose_views(paths: Sequence[Path], max_views: int | None) -> list[Path]:
    """At most `max_views` of `paths`, evenly spread, the first one included."""
    if max_views is None or len(paths) <= max_views:
        return list(paths)
    return [paths[i * len(paths) // max_views] for i in range(max_views)]


def load_image(path: Path) -> Image.Image:
    """One image as 8-bit RGB: turned upright by its EXIF entry, transparency laid over white, 16-bit grey scaled.

    Raises:
        InputError: the file is no image, is damaged, or has floating-point pixels.
    """
    try:
        with Image.open(path) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16-bit grey; 32-bit containers hold 16-bit values too
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            rgb, floating = image.convert("RGB"), image.mode == "F"
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, DecompressionBombError ...
        raise InputError(f"{path} cannot be read as an image ({error}); replace it or take it out of the folder") from error
    if floating:
        raise InputError(f"{path} has floating-point pixels; save it with 8 or 16 bits per channel")
    return rgb


def load_images(paths: Sequence[Path]) -> list[Image.Image]:
    """`load_image` of each path."""
    return [load_image(path) for path in paths]


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Images of one size as ``[S, 3, H, W]`` float32 in [0, 1]."""
    pixels = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255)


def crop_centre(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle `width` x `height` pixels of an image that is at least as large."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def pad_centre(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image in the middle of a white canvas of `width` x `height` pixels."""
    if image.size == (width, height):
        return image
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas


def _natural(path: Path) -> list[tuple[int, int, str]]:
    parts = re.findall(r"[0-9]+|[^0-9]+", path.name.lower())
    return [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts]
