"""What all readers of people's files share: limits, lookups that never raise what they should not, and saying what is left out."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..errors import InputError


class DataWarning(UserWarning):
    """Part of the data is left out, or one of several possible readings was chosen; the message names how many and which."""


@dataclass(frozen=True)
class Limits:
    """What is refused before memory is taken for it.

    Attributes:
        pixels: More of them in an image, or values in a depth map. 50 million take 0.8 GB on their way to a float32 tensor.
        size: More bytes in a file that is read whole.
    """

    pixels: int = 50_000_000
    size: int = 2**31


DEFAULT = Limits()
MORE_PIXELS = "raise the limit with --max-pixels or lite3r_plugin.scene.data.limits(pixels=...)"
MORE_BYTES = "raise the limit with --max-bytes or lite3r_plugin.scene.data.limits(size=...)"
_LIMITS: ContextVar[Limits] = ContextVar("lite3r_data_limits", default=DEFAULT)


def current_limits() -> Limits:
    """The limits that hold here: those of the innermost `limits`, or the defaults."""
    return _LIMITS.get()


@contextlib.contextmanager
def limits(pixels: int | None = None, size: int | None = None) -> Iterator[Limits]:
    """Other limits inside the block, in this thread: ``with limits(pixels=200_000_000): scene.sample(...)``.

    Args:
        pixels, size: As in `Limits`; None: as outside.

    Raises:
        InputError: one is below 1.
    """
    outside = _LIMITS.get()
    inside = Limits(outside.pixels if pixels is None else pixels, outside.size if size is None else size)
    if min(inside.pixels, inside.size) < 1:
        raise InputError(f"limits are whole numbers above 0, not pixels={pixels}, size={size}")
    pillows, token = Image.MAX_IMAGE_PIXELS, _LIMITS.set(inside)
    if pillows is not None and inside.pixels > pillows:
        Image.MAX_IMAGE_PIXELS = inside.pixels  # Pillow has a limit of its own, for the whole process
    try:
        yield inside
    finally:
        Image.MAX_IMAGE_PIXELS = pillows
        _LIMITS.reset(token)


def say(message: str) -> None:
    """Warn with a `DataWarning`."""
    warnings.warn(message, DataWarning, stacklevel=3)


def listed(names: Iterable[object], most: int = 5) -> str:
    """Names for a message, at most `most` of them, and how many more there are."""
    words = [shown(str(name)) for name in names]
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def shown(text: str, most: int = 80) -> str:
    """Text of a file, or a name, as a message can print it: one short line."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= most else f"{text[:most]}..."


def is_file(path: Path) -> bool:
    """Whether there is such a file; names that no file can have, such as too long ones, are none."""
    return _holds(path, Path.is_file)


def is_dir(path: Path) -> bool:
    """Whether there is such a folder; names that no folder can have, such as too long ones, are none."""
    return _holds(path, Path.is_dir)


def _holds(path: Path, check: Callable[[Path], bool]) -> bool:
    try:
        return check(path)
    except (OSError, ValueError):  # too long, a NUL in it, a folder on the way that may not be entered
        return False


def entries(folder: Path) -> list[Path]:
    """What a folder holds, hidden names left out, in name order.

    Raises:
        InputError: it is no folder or cannot be read.
    """
    if not is_dir(folder):
        raise InputError(f"{shown(str(folder), 300)} is no folder; name the folder that holds the data")
    try:
        return sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from error


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """A whole file.

    Args:
        path: The file.
        most: More bytes are refused; None: `Limits.size`.

    Raises:
        InputError: it is missing, unreadable or too large.
    """
    if not is_file(path):
        raise InputError(f"{shown(str(path), 300)} is missing")
    allowed = current_limits().size if most is None else most
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read() if size <= allowed else b""
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if size > allowed or len(data) > allowed:
        way_out = MORE_BYTES if most is None else "it is another kind of file"
        raise InputError(f"{path} has {max(size, len(data)):,} bytes, more than the {allowed:,} that are read; {way_out}")
    return data


def only(found: Sequence[Path], what: str) -> Path:
    """The only one of `found`.

    Raises:
        InputError: there are several; which one is meant nobody can tell.
    """
    if len(found) > 1:
        raise InputError(f"{found[0].parent} holds {len(found)} files for {what}: {listed(p.name for p in found)}; keep one")
    return found[0]
