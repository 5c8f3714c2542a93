"""Damage to files, by chance and by what parsers trip over, undone afterwards."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

# Words that are numbers to some parser or other, or too large for it.
WORDS = tuple(
    word.encode()
    for word in (
        "nan", "inf", "-inf", "NaN", "1e999", "1e39", "-1", "0", "-0", "1e-300", "1e18", "4294967296", "18446744073709551615", "0x10",
        "1_0", "²", "３", "½", "true", "null", "[]", "{}", '""', "..", "/", "#", ",", ";", "1e39999999", "9.9e37", "-9e99", "1,5", "\0",
        "é", "\u2028", "extrinsic", "images", "00000001", "9" * 5000, "0." + "0" * 5000, "a" * 5000, "",
    )
) + (b"\xff\xfe", b"\xef\xbb\xbf")  # fmt: skip


def damage(root: Path, draw: random.Random) -> list[str]:
    """Change one to three things under `root`; what was done, for a report."""
    done = []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        files = sorted(p for p in root.rglob("*") if p.is_file())
        if not files:
            break
        # Each kind of file as often as the next, however many there are of it.
        suffix = draw.choice(sorted({p.suffix for p in files}))
        path = draw.choice([p for p in files if p.suffix == suffix])
        change = draw.choice((_bytes, _bytes, _words, _words, _words, _lines, _whole))
        done.append(f"{path.relative_to(root)}: {change(path, files, draw)}")
    return done


@contextlib.contextmanager
def restored(root: Path) -> Iterator[None]:
    """What is under `root` is afterwards as it was before."""
    folders = {path for path in root.rglob("*") if path.is_dir()}
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    try:
        yield
    finally:
        for path in sorted(root.rglob("*"), reverse=True):  # what is in a folder before the folder
            if path.is_dir() and path not in folders:
                path.rmdir()
            elif path.is_file() and path not in before:
                path.unlink()
        for path, content in before.items():
            if not path.is_file() or path.read_bytes() != content:
                path.write_bytes(content)


def _bytes(path: Path, _: list[Path], draw: random.Random) -> str:
    data = bytearray(path.read_bytes())
    at = draw.randrange(len(data) + 1)
    kind = draw.choice(("flip", "cut", "insert", "remove", "repeat", "number"))
    if kind == "flip" and data:
        for _ in range(draw.choice((1, 1, 4, 30))):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "insert":
        data[at:at] = draw.randbytes(draw.choice((1, 8, 100)))
    elif kind == "remove":
        del data[at : at + draw.choice((1, 8, 100))]
    elif kind == "repeat":
        data[at:at] = data[max(0, at - 200) : at] * draw.choice((1, 3))
    else:  # a count, an offset, a float
        size = draw.choice((2, 4, 8))
        data[at : at + size] = draw.choice((b"\xff", b"\0", b"\x7f", b"\x80")) * size
    path.write_bytes(bytes(data))
    return f"{kind} at {at}"


def _words(path: Path, _: list[Path], draw: random.Random) -> str:
    data = path.read_bytes()
    words = list(re.finditer(rb"[^\s,&\"\[\]{}:]+", data[:20_000]))
    if not words:
        return "nothing"
    word, new = draw.choice(words), draw.choice(WORDS)
    path.write_bytes(data[: word.start()] + new + data[word.end() :])
    return f"{word[0][:20]!r} becomes {new[:20]!r}"


def _lines(path: Path, _: list[Path], draw: random.Random) -> str:
    lines = path.read_bytes().split(b"\n")
    at, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    kind = draw.choice(("remove", "repeat", "swap", "empty", "many"))
    if kind == "remove":
        del lines[at]
    elif kind == "repeat":
        lines.insert(other, lines[at])
    elif kind == "swap":
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == "empty":
        lines.insert(at, b"")
    else:
        lines[at:at] = lines[at : at + 1] * 300
    path.write_bytes(b"\n".join(lines))
    return f"{kind} line {at}"


def _whole(path: Path, files: list[Path], draw: random.Random) -> str:
    data = path.read_bytes()

    def encoded(encoding: str) -> Callable[[], object]:
        return lambda: path.write_bytes(data.decode("latin-1").encode(encoding, errors="replace"))

    changes: dict[str, Callable[[], object]] = {
        "removed": path.unlink,
        "emptied": lambda: path.write_bytes(b""),
        "replaced by another file": lambda: path.write_bytes(draw.choice(files).read_bytes()),
        "upper case": lambda: path.rename(path.with_name(path.name.upper())),
        "copied beside": lambda: path.with_name(f"{path.stem} 2{path.suffix}").write_bytes(data),
        "other number": lambda: path.rename(path.with_name(re.sub(r"\d", str(draw.randrange(10)), path.name, count=draw.randrange(1, 9)))),
        "UTF-16": encoded("utf-16"),
        "UTF-8 with a mark": encoded("utf-8-sig"),
        "Windows lines": lambda: path.write_bytes(data.replace(b"\n", b"\r\n")),
        "a folder": lambda: (path.unlink(), path.mkdir()),
        "zeros": lambda: path.write_bytes(bytes(len(data))),
        "long": lambda: path.write_bytes(data * 200),
    }
    kind = draw.choice(sorted(changes))
    with contextlib.suppress(IsADirectoryError):  # the new name is that of a folder that an earlier change made
        changes[kind]()
    return kind
