"""Reading small matrices from NumPy's archives: what an array would take is known before anything is unpacked."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path

import numpy as np

from ...errors import InputError
from ..reading import is_file, shown

LARGEST = 70_000  # bytes of a matrix and its header, which has at most 65,535


def read_matrices(path: Path, prefix: str) -> dict[int, np.ndarray]:
    """The arrays ``PREFIX0``, ``PREFIX1``, ... of an ``.npz`` file: 4x4 in float64, by their numbers.

    Raises:
        InputError: the file is missing or damaged, or such an array is no real 4x4 matrix of 32 bits or more.
    """
    if not is_file(path):
        raise InputError(f"{path} is missing")
    wanted = re.compile(rf"{re.escape(prefix)}([0-9]{{1,9}})\.npy")
    found: dict[int, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if match := wanted.fullmatch(entry.filename):
                    if int(match[1]) in found:
                        raise InputError(f"{path} holds {shown(entry.filename)} twice, or by two spellings of its number")
                    found[int(match[1])] = _matrix(archive, entry, path)
    except InputError:
        raise
    except Exception as error:  # a damaged archive raises whatever its parser trips over
        raise InputError(f"{path} cannot be read as an archive of arrays: {shown(str(error), 200)}") from error
    return found


def _matrix(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> np.ndarray:
    name = entry.filename.removesuffix(".npy")
    if entry.file_size > LARGEST:
        raise InputError(f"{path}: {name} takes {entry.file_size:,} bytes; a 4x4 matrix takes 256")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(f"{path}: {name} is packed in a way that NumPy does not write")
    data = io.BytesIO(archive.read(entry))
    if np.lib.format.read_magic(data) != (1, 0):
        raise InputError(f"{path}: {name} has a header that NumPy does not write for matrices")
    shape, columns_first, dtype = np.lib.format.read_array_header_1_0(data)
    if shape != (4, 4) or dtype.kind not in "fiu" or (dtype.kind == "f" and dtype.itemsize < 4):
        raise InputError(f"{path}: {name} should be a 4x4 matrix of real numbers, is {list(shape)} of {shown(str(dtype), 40)}")
    values = np.frombuffer(data.read(), dtype)
    if len(values) != 16:
        raise InputError(f"{path}: {name} ends early")
    with np.errstate(over="ignore"):  # what a long double does not fit becomes infinite, which no camera is
        return values.reshape(4, 4, order="F" if columns_first else "C").astype(np.float64)
