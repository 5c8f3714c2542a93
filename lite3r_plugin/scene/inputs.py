"""What people have, as views: folders, photographs, videos, globs and lists of them, mixed as they like."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..errors import InputError, plural
from .images import SUFFIXES, find_images, has_images, is_image, load_image, natural, require_decoders, spread
from .reading import entries, is_dir, is_file, listed, read_bytes, say, shown
from .video import SUFFIXES as VIDEOS
from .video import is_video, read_video, require_reader

NAME = "name photographs of one scene: a folder, files, a video, a list"
LISTS = (".txt", ".lst")
LONGEST_LIST = 10_000_000  # bytes


@dataclass(frozen=True)
class Photo:
    """A view: what it is called, and its pixels, 8-bit RGB and upright."""

    name: str
    image: Image.Image


def load_inputs(words: Sequence[str], max_views: int | None = None, every: float | None = None, at_least: int = 1) -> list[Photo]:
    """Views of what `words` name, in their order, and in natural order within each.

    A word is a folder (its photographs; where it has none, those of its subfolders), a photograph, a video
    (`lite3r_plugin.scene.video.read_video`), a pattern such as ``photos/**/*.jpg``, or a text file with one of these a line, relative to
    it; # begins a comment. What is left out is named in a `DataWarning`.

    Args:
        words: What users type.
        max_views: At most so many, evenly spread over all; a video gives 32 unless this or `every` is set.
        every: Seconds of a video that give one view.
        at_least: Fewer are refused.

    Raises:
        InputError: a word names nothing, a file cannot be read, or there are too few views.
    """
    paths = _distinct(list(_expand_all(words)))
    photographs, videos = [p for p in paths if not is_video(p)], [p for p in paths if is_video(p)]
    if every is not None and not videos:
        raise InputError("--every is for videos, and there is none; --max-views takes fewer photographs")
    if videos:
        require_reader()
    require_decoders(photographs)
    if not videos:
        photographs = spread(photographs, max_views)
        _require(len(photographs), at_least, words)
        return [Photo(path.name, load_image(path)) for path in photographs]
    views: list[Photo] = []
    for path in paths:
        views += [Photo(*view) for view in read_video(path, max_views, every)] if is_video(path) else [Photo(path.name, load_image(path))]
    views = spread(views, max_views)
    _require(len(views), at_least, words)
    return views


def _require(count: int, at_least: int, words: Sequence[str]) -> None:
    if count < at_least:
        raise InputError(f"at least {plural(at_least, 'image is', 'images are')} needed, {listed(words)} gives {count}")


def _distinct(paths: list[Path]) -> list[Path]:
    found = {path.resolve(): path for path in reversed(paths)}
    if len(found) < len(paths):
        twice = [path for path, count in Counter(path.resolve() for path in paths).items() if count > 1]
        files = plural(len(paths) - len(found), "file is", "files are")
        say(f"{files} named more than once and taken once: {listed(path.name for path in twice)}")
    return list(reversed(found.values()))


def _expand_all(words: Sequence[str], root: Path | None = None) -> Iterator[Path]:
    for word in words:
        if not word.strip():  # a variable of the shell that is not set; as a path it would be the current folder
            raise InputError(f"one of the names is empty; {NAME}")
        path = Path(word) if root is None else root / word
        if is_dir(path):
            yield from _folder(path)
        elif is_file(path):
            yield from _file(path, in_a_list=root is not None)
        elif glob.has_magic(word):
            yield from _pattern(str(path))
        else:
            what = "is no file or folder, but a device, a pipe, or a link to nothing" if os.path.lexists(path) else "does not exist"
            raise InputError(f"{shown(str(path), 300)} {what}; {NAME}")


def _folder(folder: Path) -> list[Path]:
    if has_images(folder):
        return find_images(folder)
    below = sorted((p for p in folder.rglob("*") if is_image(p) and is_file(p) and not _hidden(p, folder)), key=lambda p: _order(p, folder))
    if below:
        counts = Counter(p.parent.relative_to(folder).as_posix() for p in below)
        say(f"{folder} holds no images itself; those of its subfolders are taken: {listed(f'{n} ({c})' for n, c in counts.items())}")
        return below
    if videos := [p.name for p in entries(folder) if is_video(p)]:
        raise InputError(f"{folder} holds no photographs, but {plural(len(videos), 'video')}: {listed(videos)}; name one of them")
    return find_images(folder)  # which says what is there instead


def _file(path: Path, in_a_list: bool) -> Iterator[Path]:
    if path.suffix.lower() in LISTS:
        if in_a_list:
            raise InputError(f"{path} is a list named in a list; name it itself")
        yield from _list(path)
    elif is_image(path) or is_video(path):
        yield path
    else:
        kinds = ", ".join((*SUFFIXES, *VIDEOS, *LISTS))
        raise InputError(f"{path} is of no kind that is read here ({kinds}); save it as JPEG or PNG to use it")


def _pattern(pattern: str) -> list[Path]:
    found = sorted((Path(name) for name in glob.glob(pattern, recursive=True)), key=lambda p: _order(p, Path()))
    files = [p for p in found if is_file(p)]
    taken = [p for p in files if is_image(p) or is_video(p)]
    if not taken:
        what = f"{plural(len(files), 'file')} of other kinds" if files else "nothing"
        raise InputError(f"the pattern {shown(pattern, 200)} finds {what}; ** stands for any folders, * for any name")
    if rest := [p.name for p in files if p not in set(taken)]:
        files = plural(len(rest), "file of another kind is", "files of other kinds are")
        say(f"{shown(pattern, 200)}: {files} left out: {listed(rest)}")
    return taken


def _list(path: Path) -> Iterator[Path]:
    try:
        text = read_bytes(path, LONGEST_LIST).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text in UTF-8; write one path a line") from error
    lines = [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1)]
    lines = [(i, line) for i, line in lines if line and not line.startswith("#")]
    if not lines:
        raise InputError(f"{path} names nothing; write one path a line")
    for number, line in lines:
        try:
            yield from _expand_all([line], path.parent)
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from error


def _order(path: Path, root: Path) -> list[list[tuple[int, int, str]]]:
    return [natural(part) for part in (path.relative_to(root) if path.is_relative_to(root) else path).parts]


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)
