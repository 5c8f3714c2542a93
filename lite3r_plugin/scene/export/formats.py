"""Which file is written: the suffix of ``--out`` decides, and a folder gets all of them.

| suffix | what |
|---|---|
| ``.ply`` | points with colours, in the prediction's axes (OpenCV's: x right, y down, z forward) |
| ``.glb`` | points and cameras, y up |
| ``.npz`` | depth, confidence, cameras, images as arrays |
| ``.json`` | nerfstudio's ``transforms.json``; images and points in a folder beside it |
| ``.colmap`` | a folder with a COLMAP model in ``sparse/0``, binary and text, and ``images`` |
| ``.html`` | one page to look around in, with everything in it |
| none | a folder with all of them |
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import InputError, plural
from ...files import check_output, check_output_folder, filling, to_json, write_atomically
from ..reading import entries, is_dir, is_file, read_bytes, say, shown
from .arrays import load_npz, save_npz
from .colmap import INSTALL, has_pycolmap, write_colmap, write_images
from .glb import save_glb
from .page import save_page
from .point_cloud import save_ply
from .reconstruction import Facts, Reconstruction
from .transforms import transforms

RECORD = "lite3r.json"  # marks the folders that are ours
SUFFIXES = (".ply", ".glb", ".npz", ".json", ".colmap", ".html")


def check_out(out: Path, names: tuple[str, ...] = ()) -> None:
    """Raise `InputError` unless `save` can write `out` for runs called `names`, and a picture beside it: before any work is lost."""
    suffix = _suffix(out)
    if suffix not in ("", *SUFFIXES):
        raise InputError(f"{out} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, or be a folder, which gets all of them")
    if suffix == ".colmap" and not has_pycolmap():
        raise InputError(INSTALL)
    for path in _places(out, names):
        if suffix in ("", ".colmap"):
            check_output_folder(path, RECORD)
        else:
            check_output(path, suffix)
        if suffix == ".json":
            check_output_folder(_beside(path), RECORD)
    if suffix:
        check_output(picture_path(out), ".png")


def picture_path(out: Path) -> Path:
    """Where the picture of `out` goes: beside a file, into a folder."""
    return out.with_suffix(".png") if _suffix(out) else out / "scene.png"


def save(out: Path, runs: Mapping[str, Reconstruction], facts: Facts) -> dict[Path, str]:
    """Write reconstructions of the same views, the main one last: ``scene.ply``, and of each other one ``scene.NAME.ply``.

    A page holds all of them.

    Returns:
        The files and folders, and what each of them is.

    Raises:
        InputError: `out` has another suffix, something cannot be written, or the scene has no points or cameras that a file could hold.
    """
    suffix = _suffix(out)
    if suffix == ".html":
        save_page(out, runs, facts)
        return {out: "a page to look around in; open it in a browser"}
    *others, main = runs
    written: dict[Path, str] = {}
    if not suffix:
        with filling(out, RECORD) as folder:
            _fill(folder, main, runs[main], facts)
            save_page(folder / "scene.html", runs, facts)
            for name in others:
                (folder / f"{name}_run").mkdir()  # not NAME itself: to COLMAP, dense/ is something else
                _fill(folder / f"{name}_run", name, runs[name], facts)
        kinds = [
            "scene.ply",
            "scene.glb",
            "scene.npz",
            "scene.html",
            "transforms.json",
            "images",
            "sparse/0",
            *(f"{name}_run" for name in others),
        ]
        return {out: ", ".join(kind for kind in kinds if (out / kind).exists())}
    for name, path in zip((*others, main), _places(out, (*others, main)), strict=True):
        scene = runs[name]
        if suffix == ".colmap":
            with filling(path, RECORD) as folder:
                _fill_images(folder, name, scene, facts)
                write_colmap(scene, folder)
            what = "a COLMAP model in sparse/0, and its images"
        elif suffix == ".json":
            with filling(_beside(path), RECORD) as folder:
                _fill_images(folder, name, scene, facts)
                save_ply(scene.cloud, folder / "points.ply")
            beside = _beside(path).name
            _write_json(path, transforms(scene, f"{beside}/images", f"{beside}/points.ply"))
            what = f"{plural(len(scene.names), 'camera')}; images in {beside}"
        else:
            what = _save_file(scene, path, suffix)
        written[path] = f"{what}, {name}"
    return written


def load(path: Path) -> tuple[dict[str, Reconstruction], Facts]:
    """What `save` wrote as arrays: the runs of a folder, the main one last, or the one of an ``.npz`` file, and what is told of them.

    Raises:
        InputError: there is nothing of the kind, or it is damaged.
    """
    if not is_dir(path):
        scene = load_npz(path)
        return {path.stem: scene}, Facts(f"{path.name}: {plural(len(scene.names), 'view')}")
    places = [*sorted(p for p in entries(path) if p.name.endswith("_run")), path]
    if not is_file(path / RECORD) or not is_file(path / "scene.npz"):
        raise InputError(f"{path} is no folder that `lite3r reconstruct --out {path}` wrote: it has no {RECORD} and scene.npz")
    runs, facts = {}, Facts(path.name)
    for place in places:
        try:
            told = json.loads(read_bytes(place / RECORD))
            facts = Facts(str(told["title"]), *(_texts(told[key]) for key in ("columns", "rows", "notes")))
            name = str(told["run"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{place / RECORD} is damaged ({shown(str(error), 200)}); reconstruct the scene again") from error
        runs[name] = load_npz(place / "scene.npz")
    return runs, facts


def _texts(value: Any) -> Any:
    """Lists of a JSON file, of text or of lists of text, as tuples."""
    if isinstance(value, list):
        return tuple(_texts(part) for part in value)
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.50} is no text")
    return value


def _save_file(scene: Reconstruction, path: Path, suffix: str) -> str:
    if suffix == ".npz":
        save_npz(scene, path)
        return "depth, confidence, cameras"
    if suffix == ".glb":
        save_glb(scene, path)
    else:
        save_ply(scene.cloud, path)
    return plural(len(scene.cloud.points), "point")


def _fill(folder: Path, name: str, scene: Reconstruction, facts: Facts) -> None:
    save_ply(scene.cloud, folder / "scene.ply")
    save_glb(scene, folder / "scene.glb")
    save_npz(scene, folder / "scene.npz")
    _fill_images(folder, name, scene, facts)
    _write_json(folder / "transforms.json", transforms(scene, "images", "scene.ply"))
    if has_pycolmap():
        write_colmap(scene, folder)
    else:
        say(f"the COLMAP model is left out: {INSTALL}")


def _fill_images(folder: Path, name: str, scene: Reconstruction, facts: Facts) -> None:
    write_images(scene, folder / "images")
    _write_json(folder / RECORD, {"run": name, "views": scene.names, **dataclasses.asdict(facts)})


def _write_json(path: Path, data: object) -> None:
    write_atomically(path, to_json(data))


def _places(out: Path, names: tuple[str, ...]) -> list[Path]:
    """Where each run goes, the main one, the last, being `out` itself."""
    if _suffix(out) in ("", ".html"):
        return [out]
    return [*(out.with_suffix(f".{name}{out.suffix}") for name in names[:-1]), out]


def _beside(path: Path) -> Path:
    """The folder of what a ``transforms.json`` names."""
    return path.with_name(f"{path.stem}_files")


def _suffix(out: Path) -> str:
    return "" if out.is_dir() and out.suffix.lower() != ".colmap" else out.suffix.lower()
