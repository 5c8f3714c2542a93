"""Photographs from a folder, as every model of the command line wants them: upright, RGB, eight bit, in name order."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError, features
from torch import Tensor

from ..errors import InputError, plural
from .reading import MORE_BYTES, MORE_PIXELS, current_limits, entries, is_dir, is_file, listed, say, shown

T = TypeVar("T")

HEIC, AVIF = (".heic", ".heif", ".hif"), (".avif",)
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff", ".bmp", *AVIF, *HEIC)
# What cameras and phones write as well, which is said when it is left out. Other files beside photographs are no views.
OTHER_PICTURES = {
    ".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".pef", ".srw", ".gif", ".jp2", ".j2k", ".jxl", ".exr", ".hdr",
    ".psd", ".tga", ".mov", ".mp4", ".avi", ".mkv", ".webm",
}  # fmt: skip
# Pillow would hand other content, such as PostScript, to other programs, whatever the file is called.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "DIB", "GIF", "PPM", "AVIF")
SEVERAL = ("TIFF", "WEBP", "GIF", "PNG", "AVIF", "HEIF")  # not MPO: phones put previews and gain maps there
BAND = 512  # rows that are converted at a time: Pillow takes memory twice for what it hands over
ORIENTATION = 0x0112  # EXIF tag; 1 is upright, and so is what is not 2 to 8
INSTALL_HEIC = "install the reader, pip install 'lite3r-plugin[heic]', or save it as JPEG"
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def find_images(folder: Path) -> list[Path]:
    """The image files of `folder`, in natural order: ``2.png`` before ``10.png``.

    Pictures of other kinds (raw, video, ...) without an image of the same name, and subfolders with images, are left out with a
    `DataWarning`.

    Raises:
        InputError: no such folder, or no image in it.
    """
    name = shown(str(folder), 300)
    if is_file(folder):
        raise InputError(f"{name} is a file; name the folder that holds the photographs")
    if not is_dir(folder):
        raise InputError(f"{name} does not exist; name a folder with photographs of one scene")
    held = entries(folder)
    files = [p for p in held if is_file(p)]
    images = sorted((p for p in files if is_image(p)), key=lambda p: natural(p.name))
    if not images:
        kinds = f"{plural(len(files), 'file')} of other kinds" if files else "no files"
        what = f"it holds {kinds}" if held else "it is empty"
        raise InputError(f"{folder} holds no images ({', '.join(SUFFIXES)}): {what}")
    stems = {p.stem.lower() for p in images}
    if other := [p.name for p in files if p.suffix.lower() in OTHER_PICTURES and p.stem.lower() not in stems]:
        say(
            f"{folder}: {plural(len(other), 'picture of another kind is', 'pictures of other kinds are')} left out: {listed(other)}; "
            "save them as JPEG or PNG to use them"
        )
    if below := [p.name for p in held if is_dir(p) and has_images(p)]:
        say(
            f"{folder}: {plural(len(below), 'subfolder with images is', 'subfolders with images are')} left out: {listed(below)}; "
            "put all photographs of a scene into one folder"
        )
    return images


def is_image(path: Path) -> bool:
    """Whether the name is that of an image that can be read here or elsewhere."""
    return path.suffix.lower() in SUFFIXES


def has_images(folder: Path) -> bool:
    """Whether there is an image in `folder` itself; in a folder that cannot be read there is none."""
    try:
        return any(is_image(p) and is_file(p) for p in entries(folder))
    except InputError:
        return False


def spread(items: Sequence[T], most: int | None) -> list[T]:
    """At most `most` of `items`, evenly spread, the first one included."""
    if most is None or len(items) <= most:
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]


@contextlib.contextmanager
def opened(path: Path, pixels: bool = True) -> Iterator[Image.Image]:
    """The image of a file, as it is stored; what fails on it is an `InputError` that names the file.

    Args:
        path: The file.
        pixels: Load them; else only what the file says about itself.

    Raises:
        InputError: the file is no image, is damaged, or has more bytes or pixels than `lite3r_plugin.scene.reading.Limits` allow.
    """
    allowed = current_limits().pixels
    try:
        with _decoder(path) as file:
            if (count := file.width * file.height) > allowed:
                raise InputError(f"{path} has {count:,} pixels, {too_many(allowed)}")
            if pixels:
                file.load()
            if pixels and file.format in SEVERAL and (count := getattr(file, "n_frames", 1)) > 1:
                say(f"{path} holds {count} pictures; only the first is used")
            yield file
    except (InputError, Warning):
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} has {too_many(allowed)}") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error ...
        why = "its content is of no kind that is read here" if isinstance(error, UnidentifiedImageError) else shown(str(error), 200)
        raise InputError(f"{path} cannot be read as an image ({why}); replace it or take it out of the folder") from error


def require_decoders(paths: Sequence[Path]) -> None:
    """Refuse images that nobody reads here, all at once: without them it would be another scene.

    Raises:
        InputError: there are HEIC photographs and no pillow-heif, or AVIF images and too old a Pillow.
    """
    heic, avif = ([path for path in paths if path.suffix.lower() in kinds] for kinds in (HEIC, AVIF))
    if heic and not _has_heic():
        raise InputError(
            f"{heic[0].parent} holds {plural(len(heic), 'HEIC photograph')} among {len(paths)}: {_names(heic)}; {INSTALL_HEIC}"
        )
    if avif and not features.check("avif"):
        raise InputError(
            f"{avif[0].parent} holds {plural(len(avif), 'AVIF image')} among {len(paths)}: {_names(avif)}; update Pillow to 11.3"
        )


def load_image(path: Path, posed: bool = False) -> Image.Image:
    """One image as 8-bit RGB: turned upright by its EXIF entry, transparency laid over white, 16-bit grey scaled.

    Args:
        path: The file.
        posed: Its camera is known: an EXIF entry that turns it is refused, because nobody can tell which pixels the camera is for.

    Raises:
        InputError: the file is no image, is damaged, is too large, or its pixels are floating-point numbers or of no range that is known.
    """
    with opened(path) as file:
        turn = TURNS.get(orientation(file))
        if posed and turn is not None:
            raise InputError(f"{path} has an EXIF tag that turns it, and a camera; turn its pixels or remove the tag")
        image = file if turn is None else file.transpose(turn)
        if image.mode == "F":
            raise InputError(f"{path} has floating-point pixels; save it with 8 or 16 bits per channel")
        if image.mode.startswith("I"):
            image = Image.fromarray(_eight_bits(np.asarray(image), path))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def orientation(image: Image.Image) -> int:
    """How a loaded image is to be turned, as EXIF counts, 1 to 8; an entry that is damaged or none of these says nothing: 1."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # like decoders, Pillow's parser of EXIF data raises whatever it trips over
        return 1
    return value if isinstance(value, int) and value in TURNS else 1


def load_images(paths: Sequence[Path]) -> list[Image.Image]:
    """`load_image` of each path, of all or, where this installation cannot read some, of none."""
    require_decoders(paths)
    return [load_image(path) for path in paths]


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Images of one size as ``[S, 3, H, W]`` float32 in [0, 1], channels last in memory."""
    width, height = images[0].size
    channels_last = torch.channels_last  # as in the images, lest convolutions round otherwise
    pixels = torch.empty(len(images), 3, height, width, memory_format=channels_last, device="cpu")
    for target, image in zip(pixels.numpy(), images, strict=True):
        for top in range(0, height, BAND):
            bottom = min(top + BAND, height)
            target[:, top:bottom] = np.asarray(image.crop((0, top, width, bottom))).transpose(2, 0, 1)
    return pixels.div_(255)


def to_image(pixels: Tensor) -> Image.Image:
    """Pixels ``[H, W, 3]`` in [0, 1] as 8-bit RGB."""
    return Image.fromarray((pixels * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy())


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


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts names as people do: ``2.png`` before ``10.png``."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name.lower())
    return [(0, int(part), "") if part[0] in "0123456789" and len(part) < 1000 else (1, 0, part) for part in parts]


def _eight_bits(values: np.ndarray, path: Path) -> np.ndarray:
    """Grey values of 16 bits, in containers of 16 or 32, as 8 bits."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise InputError(f"{path} has pixels from {low} to {high}; 16-bit ones are from 0 to 65535; save it with 8 or 16 bits per channel")
    if 0 < high < 256:
        raise InputError(f"{path} has 16-bit pixels, of which none is over {high}: they would all be black; save it with 8 bits")
    return (values // 257).astype(np.uint8)


def too_many(allowed: int) -> str:
    return f"more than the {allowed:,} that are read; make it smaller, or {MORE_PIXELS}"


def _decoder(path: Path) -> Image.Image:
    """The file as an image, not loaded yet, by what is in it, whatever it is called."""
    with path.open("rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > (allowed := current_limits().size):
            raise InputError(f"{path} has {size:,} bytes, more than the {allowed:,} that are read; {MORE_BYTES}")
        head = file.read(64)
    if head[4:8] == b"ftyp" and b"avif" not in head:
        if not _has_heic():
            raise InputError(f"{path} is a HEIC photograph: {INSTALL_HEIC}")
        from pillow_heif import HeifImageFile

        return HeifImageFile(path)  # Pillow's registry stays as it is
    Image.init()
    return Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN])


def _names(paths: Sequence[Path]) -> str:
    return listed(path.name for path in paths)


def _has_heic() -> bool:
    return importlib.util.find_spec("pillow_heif") is not None
