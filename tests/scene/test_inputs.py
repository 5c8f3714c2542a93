"""What people name on the command line, as views."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from videos import write_video

from lite3r_plugin.errors import InputError
from lite3r_plugin.scene.inputs import load_inputs
from lite3r_plugin.scene.reading import DataWarning


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in: ``photos`` with three photographs, ``trip`` with two subfolders, a video ``clip.mp4``."""
    for i, name in enumerate(("photos/2.jpg", "photos/10.jpg", "photos/b.png", "trip/100/1.jpg", "trip/101/1.jpg", "trip/9/3.jpg")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(tmp_path / name)
    write_video(tmp_path / "clip.mp4", [np.full((32, 32, 3), 20 * i, np.uint8) for i in range(10)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*words: str, **options: object) -> list[str]:
    return [photo.name for photo in load_inputs(words, **options)]


@pytest.mark.usefixtures("here")
def test_kinds_of_words() -> None:
    assert names("photos") == ["2.jpg", "10.jpg", "b.png"]
    assert names("photos/b.png", "photos/2.jpg") == ["b.png", "2.jpg"]
    assert names("photos/*.jpg") == ["2.jpg", "10.jpg"]
    assert names("clip.mp4", max_views=2) == ["clip_000000.png", "clip_000005.png"]
    assert names("photos", "clip.mp4", max_views=4) == ["2.jpg", "10.jpg", "clip_000000.png", "clip_000005.png"]
    assert names("clip.mp4", every=0.5) == ["clip_000000.png", "clip_000005.png"]
    assert names("photos", max_views=2) == ["2.jpg", "10.jpg"]


@pytest.mark.usefixtures("here")
def test_subfolders_are_taken_where_a_folder_has_none_of_its_own() -> None:
    with pytest.warns(DataWarning, match=r"trip holds no images itself; .* taken: 9 \(1\), 100 \(1\), 101 \(1\)"):
        photos = load_inputs(["trip"])
    assert [photo.image.getpixel((0, 0))[0] // 40 for photo in photos] == pytest.approx([5, 3, 4], abs=1)
    assert names("**/1.jpg") == ["1.jpg", "1.jpg"]


def test_a_list(here: Path) -> None:
    (here / "lists").mkdir()
    (here / "lists" / "a.txt").write_bytes("\ufeff# the good ones\r\n../photos/b.png\r\n\r\n../trip/*/1.jpg\r\n".encode())
    assert names("lists/a.txt") == ["b.png", "1.jpg", "1.jpg"]
    for content, message in (
        (b"../photos/b.png\n../none.jpg\n", r"a\.txt, line 2: .*none\.jpg does not exist"),
        (b"a.txt\n", "line 1: .* is a list named in a list"),
        (b"# nothing\n", "names nothing"),
        (b"\xff\xfe\x00", "no text in UTF-8"),
    ):
        (here / "lists" / "a.txt").write_bytes(content)
        with pytest.raises(InputError, match=message):
            load_inputs(["lists/a.txt"])


def test_what_is_left_out_is_named(here: Path) -> None:
    (here / "photos" / "notes.doc").write_text("")
    (here / "photos" / "c.cr2").write_text("")
    with pytest.warns(DataWarning, match=r"3 files are named more than once and taken once: 2\.jpg, 10\.jpg, b\.png"):
        assert names("photos/2.jpg", "photos/10.jpg", "photos/b.png", "photos/*.jpg", "photos/b.png") == ["2.jpg", "10.jpg", "b.png"]
    with pytest.warns(DataWarning, match=r"2 files of other kinds are left out: c\.cr2, notes\.doc"):
        names("photos/*")
    with pytest.warns(DataWarning, match=r"1 picture of another kind is left out: c\.cr2"):
        names("photos")


def test_what_cannot_be_taken_is_said(here: Path) -> None:
    (here / "videos").mkdir()
    write_video(here / "videos" / "a.mov", [np.zeros((32, 32, 3), np.uint8)] * 2)
    (here / "notes.doc").write_text("")
    (here / "links").mkdir()
    for link in (here / "link.jpg", here / "links" / "link.jpg"):
        link.symlink_to("nothing.jpg")
    os.mkfifo(here / "pipe.jpg")
    for words, options, message in (
        (["none"], {}, "none does not exist; name photographs of one scene"),
        (["videos"], {}, r"videos holds no photographs, but 1 video: a\.mov; name one of them"),
        (["notes.doc"], {}, r"notes\.doc is of no kind that is read here"),
        (["*.doc"], {}, "finds 1 file of other kinds"),
        (["no*"], {}, r"finds 1 file of other kinds"),
        (["x*"], {}, r"finds nothing; \*\* stands for"),
        (["photos"], {"every": 1.0}, "--every is for videos"),
        (["photos/2.jpg"], {"at_least": 2}, r"at least 2 images are needed, photos/2\.jpg gives 1"),
        (["a\0b"], {}, "does not exist"),
        (["photos", ""], {}, "one of the names is empty; name photographs of one scene"),
        (["pipe.jpg"], {}, r"pipe\.jpg is no file or folder, but a device, a pipe, or a link to nothing; name photographs"),
        (["link.jpg"], {}, r"link\.jpg is no file or folder"),
        (["links"], {}, r"links holds no images .*: it holds no files"),
        (["x" * 5000], {}, "does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            load_inputs(words, **options)


def test_all_kinds_of_photographs_together(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    image = Image.new("RGB", (32, 32), "red")
    pillow_heif.from_pillow(image).save(tmp_path / "1.heic")
    image.save(tmp_path / "2.jpg")
    image.save(tmp_path / "3.avif")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names(str(tmp_path)) == ["1.heic", "2.jpg", "3.avif"]
