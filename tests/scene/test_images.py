"""Photographs of a folder: order, orientation, modes, damage."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from lite3r_plugin.errors import InputError
from lite3r_plugin.scene.data import open_scenes
from lite3r_plugin.scene.images import ORIENTATION, TURNS, find_images, load_image, load_images, spread
from lite3r_plugin.scene.reading import DataWarning


def test_natural_order_and_selection(tmp_path: Path) -> None:
    for name in ("10.png", "2.png", "b1.JPG", ".hidden.png", "notes.txt"):
        Image.new("RGB", (4, 4)).save(tmp_path / name, format="PNG")
    (tmp_path / "folder.png").mkdir()
    found = find_images(tmp_path)
    assert [p.name for p in found] == ["2.png", "10.png", "b1.JPG"]
    assert [p.name for p in spread(found, 2)] == ["2.png", "10.png"]
    assert spread(found, None) == found


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        find_images(tmp_path / "none")
    with pytest.raises(InputError, match="it is empty"):
        find_images(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError, match="it holds 1 file of other kinds"):
        find_images(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        find_images(tmp_path / "a.txt")


def test_exif_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (20, 30)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_over_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((1, 1), (0, 0, 0, 255))
    image.convert(mode).save(tmp_path / "a.png")
    pixels = np.asarray(load_image(tmp_path / "a.png"))
    assert pixels.shape == (4, 4, 3)
    assert (pixels[0, 0] == 255).all()
    assert (pixels[1, 1] == 0).all()


def test_16_bit_grey_is_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 65535, 32896]], dtype=np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(load_image(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 255, 128]


@pytest.mark.parametrize("mode", ["1", "L", "CMYK"])
def test_other_modes(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / "a.tif")
    assert load_image(tmp_path / "a.tif").mode == "RGB"


def test_damaged_images_are_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    Image.new("F", (2, 2)).save(tmp_path / "float.tif")
    for name, content in (("cut.png", data[: len(data) // 2]), ("text.jpg", b"not an image"), ("empty.png", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            load_image(tmp_path / name)
    with pytest.raises(InputError, match="floating-point"):
        load_image(tmp_path / "float.tif")


# --- kinds of files


def heic(path: Path, **options: object) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), (200, 30, 30))).save(path, **options)


def test_heic_is_read_where_its_reader_is_installed(tmp_path: Path) -> None:
    heic(tmp_path / "a.HEIC")
    heic(tmp_path / "b.jpg", format="HEIF")  # some programs only change the name
    Image.new("RGB", (64, 48)).save(tmp_path / "c.jpg")
    assert [p.name for p in find_images(tmp_path)] == ["a.HEIC", "b.jpg", "c.jpg"]
    for name in ("a.HEIC", "b.jpg"):
        image = load_image(tmp_path / name)
        assert image.size == (64, 48)
        assert np.abs(np.asarray(image)[20, 30].astype(int) - (200, 30, 30)).max() < 12


def test_heic_without_its_reader_is_an_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        Image.new("RGB", (4, 4)).save(tmp_path / f"IMG_{i}.jpg")
    for i in range(3, 9):
        (tmp_path / f"IMG_{i}.HEIC").write_bytes(b"\0\0\0\x1cftypheic" + bytes(16))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(InputError, match=r"6 HEIC photographs among 9: IMG_3\.HEIC, .* and 1 more; .*pip install 'lite3r-plugin\[heic\]'"):
        load_images(find_images(tmp_path))
    with pytest.raises(InputError, match="6 HEIC photographs among 9"):
        open_scenes(f"images:{tmp_path}")[0]
    with pytest.raises(InputError, match=r"IMG_3\.HEIC is a HEIC photograph: install the reader"):
        load_image(tmp_path / "IMG_3.HEIC")


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read(tmp_path: Path) -> None:
    Image.new("RGB", (64, 48), (200, 30, 30)).save(tmp_path / "a.avif")
    (path,) = find_images(tmp_path)
    assert np.abs(np.asarray(load_image(path))[20, 30].astype(int) - (200, 30, 30)).max() < 12


def test_avif_that_nobody_reads_is_an_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.avif").write_bytes(b"")
    monkeypatch.setattr(features, "check", lambda _: False)
    with pytest.raises(InputError, match=r"1 AVIF image among 1: a\.avif; update Pillow"):
        load_images(find_images(tmp_path))


def test_pictures_of_other_kinds_are_named(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.CR2", "a.mov", "b.gif", "c.DNG", "notes.txt", "a.xmp"):
        (tmp_path / name).write_bytes(b"")
    with pytest.warns(DataWarning, match=r"2 pictures of other kinds are left out: b\.gif, c\.DNG; save them as JPEG or PNG") as said:
        assert [p.name for p in find_images(tmp_path)] == ["a.jpg"]
    assert len(said) == 1


def test_other_content_is_not_handed_to_other_programs(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(InputError, match=r"a\.jpg cannot be read as an image \(its content is of no kind"):
        load_image(tmp_path / "a.jpg")


def test_only_the_first_of_several_pictures_is_used_and_that_is_said(tmp_path: Path) -> None:
    pages = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "green")]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.warns(DataWarning, match=r"a\.tif holds 3 pictures; only the first is used"):
        assert load_image(tmp_path / "a.tif").getpixel((0, 0)) == (255, 0, 0)


# --- EXIF and ranges


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation_is_turned_upright(turn: int, tmp_path: Path) -> None:
    upright = Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 10)
    back = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}
    stored = upright if turn == 1 else upright.transpose(TURNS[back[turn]])
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    stored.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), np.asarray(upright))
    if turn == 1:
        load_image(tmp_path / "a.png", posed=True)
    else:
        with pytest.raises(InputError, match="EXIF tag that turns it, and a camera"):
            load_image(tmp_path / "a.png", posed=True)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_orientations_that_mean_nothing_are_upright(value: object, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (30, 20)
    assert load_image(tmp_path / "a.jpg", posed=True).size == (30, 20)


@pytest.mark.filterwarnings("ignore:.*EXIF data:UserWarning")  # Pillow's own words
@pytest.mark.parametrize("damage", [b"", b"MM", b"II*\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 30, bytes(range(200))])
@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])  # Pillow bears damage in the first alone
def test_damaged_exif_spoils_no_image(kind: str, damage: bytes, tmp_path: Path) -> None:
    file = tmp_path / f"a.{kind}"
    Image.new("RGB", (30, 20), "red").save(file, exif=damage)
    assert load_image(file, posed=True).size == (30, 20)


@pytest.mark.parametrize(("values", "message"), [([0, 255], "none is over 255"), ([0, 70_000], "from 0 to 70000"), ([-1, 900], "from -1")])
def test_grey_values_of_other_ranges_are_refused(values: list[int], message: str, tmp_path: Path) -> None:
    Image.fromarray(np.array([values], dtype=np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=rf"a\.tif has .*{message}"):
        load_image(tmp_path / "a.tif")
