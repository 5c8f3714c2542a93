"""Finding the folders and files of data sets, and reading their images; errors name the file."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from ...errors import InputError
from ..images import SUFFIXES, is_image, load_image, opened, to_tensor
from ..reading import entries, is_dir, is_file, listed, only, say, shown

LONGEST = 50  # times the shorter side: a longer strip takes far more memory when it is resized than it has pixels


def read_image(path: Path, posed: bool = False) -> Tensor:
    """An image as ``[3, H, W]`` float32 in [0, 1].

    Args:
        path: The file.
        posed: Its camera is known: an EXIF tag that turns it is refused, because nobody can tell which pixels the camera is for.
    """
    image = load_image(_there(path), posed)
    if max(image.size) > LONGEST * min(image.size):
        raise InputError(f"{path} has {image.width}x{image.height} pixels: it is no photograph")
    return to_tensor([image])[0]


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image, as it is stored, without reading its pixels.

    Raises:
        InputError: it is missing or no image.
    """
    with opened(_there(path), pixels=False) as file:
        return file.height, file.width


def folders(path: Path) -> list[Path]:
    """The folders in a folder, in name order."""
    return [p for p in entries(path) if is_dir(p)]


def find_scenes(path: Path, holds: Callable[[Path], bool], wanted: str) -> tuple[Path, list[str]]:
    """The folder of scenes, and their names: `path` itself where it holds one, else those of its folders that do.

    Folders without a scene beside others with one are left out with a `DataWarning`.

    Args:
        path: Where.
        holds: Whether a folder is a scene.
        wanted: What a scene is, for the error.

    Raises:
        InputError: there is none.
    """
    if holds(path):
        return path.parent, [path.name]
    below = folders(path)
    found = [folder for folder in below if holds(folder)]
    if not found:
        raise InputError(f"{path} holds no scene: {wanted}")
    if len(found) < len(below):
        rest = [folder.name for folder in below if folder not in found]
        say(f"{path}: {len(rest)} of {len(below)} folders are left out, which hold no scene ({wanted}): {listed(rest)}")
    return path, [folder.name for folder in found]


def child(folder: Path, *names: str) -> Path:
    """The first of `names` that is in `folder`, upper and lower case being the same; where none is, the first as it stands."""
    for name in names:
        found = Names(folder).find(name)
        if found is not None:
            return found
    return folder / names[0]


class Names:
    """Finds files by names relative to a folder, also where upper and lower case differ, or Windows wrote the slashes.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.root, self._folders = root, dict[Path, dict[str, list[Path]]]()

    def find(self, name: str) -> Path | None:
        """The file or folder of that name: the very one, or the only one that differs in case alone; None: there is none.

        Raises:
            InputError: several differ in case alone.
        """
        for spelled in dict.fromkeys((name, name.replace("\\", "/"))):
            path = self.root / spelled
            if is_file(path) or is_dir(path):
                return path
            if ".." not in path.parts and not Path(spelled).is_absolute() and (found := self._any_case(spelled)) is not None:
                return found
        return None

    def _any_case(self, name: str) -> Path | None:
        path = self.root
        for part in Path(name).parts:
            if path not in self._folders:
                held: dict[str, list[Path]] = {}
                for entry in entries(path) if is_dir(path) else ():
                    held.setdefault(_folded(entry.name), []).append(entry)
                self._folders[path] = held
            found = self._folders[path].get(_folded(part))
            if found is None:
                return None
            path = path / part if path / part in found else only(found, part)
        return path


def _folded(name: str) -> str:
    """A name without case, and with accents as one letter: macOS writes them apart."""
    return unicodedata.normalize("NFC", name).casefold()


def numbered(paths: Iterable[Path], pattern: str, what: str) -> dict[int, Path]:
    """Those of `paths` whose whole names `pattern` matches, in any case, by the number in its first group.

    Raises:
        InputError: two have the same number.
    """
    compiled = re.compile(pattern, re.IGNORECASE | re.ASCII)
    found: dict[int, list[Path]] = {}
    for path in paths:
        if match := compiled.fullmatch(path.name):
            found.setdefault(int(match[1]), []).append(path)
    return {number: only(found[number], f"{what} {number}") for number in sorted(found)}


def images_by_number(folder: Path, pattern: str = r"[^0-9]*(?:[0-9]+[^0-9]+)*([0-9]{1,12})") -> dict[int, Path]:
    """The images of a folder by the last number of their names, or what `pattern` matches of the names without suffix."""
    return numbered((p for p in entries(folder) if is_image(p)), rf"{pattern}\.(?:{'|'.join(s[1:] for s in SUFFIXES)})", "image")


def _there(path: Path) -> Path:
    if not is_file(path):
        raise InputError(f"{shown(str(path), 300)} is missing")
    return path
