"""What all readers of people's files share: limits, lookups that never raise what they should not, and saying what is left out.

Limits are environment variables, because they hold for whole processes and their workers: `MAX_PIXELS` for one image, `MAX_BYTES` for one
file. What is over a limit is refused before memory is taken for it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..errors import InputError

MAX_PIXELS, MAX_BYTES = "LITE3R_MAX_PIXELS", "LITE3R_MAX_BYTES"
# 50 million pixels take 0.8 GB on their way to a float32 tensor.
LIMITS = {MAX_PIXELS: 50_000_000, MAX_BYTES: 2**31}


class DataWarning(UserWarning):
    """Part of the data is left out, or one of several possible readings was chosen; the message names how many and which."""


def limit(name: str) -> int:
    """The limit `MAX_PIXELS` or `MAX_BYTES`: of the environment variable of that name, or the default.

    Raises:
        InputError: the variable is set to no whole number above 0.
    """
    word = os.environ.get(name, str(LIMITS[name]))
    if not (word.isascii() and word.isdigit() and len(word) <= 18 and int(word)):
        raise InputError(f"the environment variable {name} should be a whole number above 0, is {word[:40]!r}")
    return int(word)


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
        most: More bytes are refused; None: the limit `MAX_BYTES`.

    Raises:
        InputError: it is missing, unreadable or too large.
    """
    if not is_file(path):
        raise InputError(f"{shown(str(path), 300)} is missing")
    allowed = limit(MAX_BYTES) if most is None else most
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(allowed + 1) if size <= allowed else b""
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if size > allowed or len(data) > allowed:
        way_out = f"; the environment variable {MAX_BYTES} sets another limit" if most is None else "; it is another kind of file"
        raise InputError(f"{path} has {max(size, len(data)):,} bytes, more than the {allowed:,} that are read{way_out}")
    return data


def only(found: Sequence[Path], what: str) -> Path:
    """The only one of `found`.

    Raises:
        InputError: there are several; which one is meant nobody can tell.
    """
    if len(found) > 1:
        raise InputError(f"{found[0].parent} holds {len(found)} files for {what}: {listed(p.name for p in found)}; keep one")
    return found[0]
