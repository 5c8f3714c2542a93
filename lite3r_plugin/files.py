"""Output files: checked before the work, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import InputError


def check_output(path: Path, suffix: str) -> None:
    """Raise `InputError` unless `path` ends in `suffix` and can be written in a folder that exists."""
    if path.suffix.lower() != suffix:
        raise InputError(f"{path} must end in {suffix}")
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file in it")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise InputError(f"the folder {folder} does not exist; create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"the folder {folder} is not writable; choose another one")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to; it takes the place of `path` at the end, so that nobody ever sees half a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write `data` to `path`, whole or not at all. Raises `InputError`."""
    try:
        with replacing(path) as beside:
            beside.write_bytes(data.encode() if isinstance(data, str) else data)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
