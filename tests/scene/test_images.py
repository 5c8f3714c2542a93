"""Photographs of a folder: order, orientation, modes, damage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lite3r_plugin.errors import InputError
from lite3r_plugin.scene.images import choose_views, find_images, load_image


def test_natural_order_and_selection(tmp_path: Path) -> None:
    for name in ("10.png", "2.png", "b1.JPG", ".hidden.png", "notes.txt"):
        Image.new("RGB", (4, 4)).save(tmp_path / name, format="PNG")
    (tmp_path / "folder.png").mkdir()
    found = find_images(tmp_path)
    assert [p.name for p in found] == ["2.png", "10.png", "b1.JPG"]
    assert [p.name for p in choose_views(found, 2)] == ["2.png", "10.png"]
    assert choose_views(found, None) == found


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        find_images(tmp_path / "none")
    with pytest.raises(InputError, match="it is empty"):
        find_images(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError, match="1 files are of other kinds"):
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
