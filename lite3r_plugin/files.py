"""Output files: checked before the work, written whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
import secrets
import shutil
import socket
import stat
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InputError, short

LONGEST_NAME = 150  # bytes; of the 255 that file systems take, the name while it is written needs the rest
LEFTOVER_SECONDS = 24 * 3600


def check_output(path: Path, suffix: str) -> None:
    """Raise `InputError` unless `path` ends in `suffix` and can be written in a folder that exists."""
    if path.suffix.lower() != suffix:
        raise InputError(f"{path} must end in {suffix}")
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise InputError(f"{path.name[:40]}... is too long for the name of a file; it takes {LONGEST_NAME} bytes")
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder; name a file in it")
    _check_folder(path.absolute().parent)


def check_output_folder(folder: Path, mark: str) -> None:
    """Raise `InputError` unless `folder` can be filled: it is new, empty, or holds the file `mark`, which says that it was filled before.

    Other folders are somebody's: files of the same names would be lost.
    """
    if len(os.fsencode(folder.name)) > LONGEST_NAME:
        raise InputError(f"{folder.name[:40]}... is too long for the name of a folder; it takes {LONGEST_NAME} bytes")
    if not os.path.lexists(folder):
        _check_folder(folder.absolute().parent)
        return
    if not os.path.isdir(folder):
        raise InputError(f"the folder {folder} cannot be made: there is a file of that name")
    _check_folder(folder.absolute())
    if os.listdir(folder) and not os.path.isfile(folder / mark):
        raise InputError(f"the folder {folder} holds other files; name a new one")


def _check_folder(folder: Path) -> None:
    if not os.path.isdir(folder):
        raise InputError(f"the folder {folder} does not exist; create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"the folder {folder} is not writable; choose another one")


@contextlib.contextmanager
def filling(folder: Path, last: str) -> Iterator[Path]:
    """A new folder to write to, whose files and folders move into `folder` at the end, each in place of what has its name, `last` last.

    What else `folder` holds stays. Nobody ever sees half a file, and where the work fails, `folder` is as it was.

    Raises:
        InputError: the system refuses, as without room.
    """
    _clear_leftovers(folder)
    beside = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(8)}.tmp")
    try:
        (beside / "new").mkdir(parents=True)
        yield beside / "new"
        folder.mkdir(exist_ok=True)
        for i, path in enumerate(sorted((beside / "new").iterdir(), key=lambda path: path.name == last)):
            if path.is_dir() and (folder / path.name).is_dir():
                os.replace(folder / path.name, beside / f"old{i}")  # a folder takes the place of an empty one only
            os.replace(path, folder / path.name)
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be written: {error.strerror}") from error
    except InputError as error:  # of a file, by the name that it would get
        raise InputError(str(error).replace(str(beside / "new"), str(folder))) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write to, in a folder of its own beside `path`; it takes the place of `path` at the end: nobody ever sees half a file.

    The folder's name is new and cannot be foreseen, so that threads and hosts do not meet in it and no link lies in wait; what a library
    that writes needs besides is in it too. The file is on the disk before it takes the place, readable for whom the umask lets. What
    killed processes left beside `path` is cleared away.
    """
    _clear_leftovers(path)
    folder = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(8)}.tmp")
    try:
        folder.mkdir(mode=0o700)
        beside = folder / path.name
        beside.touch()
        mode = stat.S_IMODE(beside.stat().st_mode)
        yield beside
        os.chmod(beside, mode)  # a library may have made the file anew, for its owner alone
        _sync(beside)
        os.replace(beside, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _sync(path.absolute().parent)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write `data` to `path`, whole or not at all. Raises `InputError`."""
    try:
        with replacing(path) as beside:
            beside.write_bytes(data.encode() if isinstance(data, str) else data)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error


class _Held:
    """Lives as long as who holds a lock."""


@contextlib.contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Wait until nobody else has locked `folder`, thread or process, then have it for oneself, or with others that read.

    For files that belong together. The lock ends with its process, however that ends. Where the system or the disk has no such locks,
    there is none.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    held, descriptor = _Held(), os.open(folder, os.O_RDONLY)
    close = weakref.finalize(held, os.close, descriptor)  # also where an interruption on the way out passes over what follows
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing does not, where a process was forked meanwhile
        close()


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises `InputError` where it cannot be read, or is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON: {short(error)}") from error


def to_json(data: Any) -> str:
    """`data` as the text of a JSON file, with null for numbers that are not finite: JSON has none."""
    return json.dumps(_finite(data), indent=1, allow_nan=False) + "\n"


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk, where the system can tell."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _clear_leftovers(path: Path) -> None:
    """Delete what processes left beside `path` when they were killed while they wrote it: of this host those that are gone, of others'
    what nobody has touched for a day."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        host, pid = (leftover.name.removeprefix(f".{path.name}.").rsplit(".", 3) + ["", ""])[:2]
        with contextlib.suppress(OSError):
            gone = not _is_alive(int(pid)) if host == socket.gethostname() and pid.isdecimal() else False
            if gone or time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                shutil.rmtree(leftover)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True
