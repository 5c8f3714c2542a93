"""Output files: checked before the work, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import InputError


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


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` beside `path`, then move it there, so that no reader ever sees half a file. Raises `InputError`."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
