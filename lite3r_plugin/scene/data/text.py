"""Reading text files of data sets, in the encodings of people's editors, and the numbers in them; errors name the file."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ...errors import InputError
from ..reading import read_bytes, shown

SMALL = 2**20  # bytes of a file that holds the numbers of one camera
MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
# Python's float would take digits of other scripts and underscores too.
NUMBER = re.compile(r"[-+]?(?:(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,5})?|nan|inf|infinity)", re.IGNORECASE)
LONGEST = 400  # characters of a number: the smallest and largest ones written out in full
WHOLE = 2**53  # up to here every whole number has a float of its own


def read_text(path: Path, most: int | None = None) -> str:
    """A text file: UTF-8, or UTF-16 where its first bytes say so, or else Latin-1.

    Args:
        path: The file.
        most: More bytes are refused; None: as `lite3r_plugin.scene.reading.read_bytes`.

    Raises:
        InputError: it is missing, too large, or no text.
    """
    data = read_bytes(path, most)
    encoding = next((name for mark, name in MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8":
            raise InputError(f"{path} cannot be read as text: {error.reason} at byte {error.start}") from error
        text = data.decode("latin-1")
    if "\0" in text:
        raise InputError(f"{path} cannot be read as text: it holds zero bytes")
    return text


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, whatever system ended them, without their ends and the spaces around them."""
    for line in io.StringIO(read_text(path), newline=None):
        yield line.strip()


def read_numbers(path: Path, *counts: int) -> np.ndarray:
    """The numbers of a small text file, float64.

    Args:
        path: The file.
        counts: How many there may be; one count by itself stands in the error of any other.
    """
    numbers = parse_numbers(read_text(path, SMALL).split(), path)
    if len(numbers) not in counts:
        what = "ends early" if len(numbers) < min(counts) else "holds something else"
        raise InputError(f"{path} {what}: it should hold {' or '.join(map(str, counts))} numbers, has {len(numbers)}")
    return numbers


def parse_numbers(words: Sequence[str], path: Path) -> np.ndarray:
    """Words of `path` as float64; NaN and infinity are numbers here."""
    for word in words:
        if len(word) > LONGEST or NUMBER.fullmatch(word) is None:
            raise InputError(f"{path} should hold numbers, has {shown(word, 40)!r}")
    return np.array([float(word) for word in words])


def parse_integers(words: Iterable[str], path: Path) -> list[int]:
    """Words of `path` as whole numbers, also those written as 3.0 or 3e0; a fraction is refused, never cut off."""
    return [_integer(word, path) for word in words]


def _integer(word: str, path: Path) -> int:
    value = float(word) if len(word) <= LONGEST and NUMBER.fullmatch(word) else np.nan
    if not (abs(value) < WHOLE and value == int(value)):
        raise InputError(f"{path} should have a whole number where it has {shown(word, 40)!r}")
    return int(value)
