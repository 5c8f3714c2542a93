"""Limits of what is read, and names that no file can have."""

from __future__ import annotations

import io
import resource
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lite3r_plugin.errors import InputError
from lite3r_plugin.scene.data import DataWarning, open_scenes
from lite3r_plugin.scene.data.archives import read_matrices
from lite3r_plugin.scene.data.files import image_size, read_image
from lite3r_plugin.scene.data.maps import read_colmap_depth, read_pfm
from lite3r_plugin.scene.data.mvsnet import read_pairs
from lite3r_plugin.scene.images import find_images, load_image
from lite3r_plugin.scene.reading import Limits, current_limits, entries, is_dir, is_file, limits, listed, read_bytes, say

GIB = 2**30


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def png(path: Path, width: int, height: int, colour: int = 2) -> Path:
    """An image of one colour, written without ever being in memory."""
    row = b"\0" + bytes(width * (3 if colour == 2 else 1))
    pack = zlib.compressobj(9)
    body = b"".join([*(pack.compress(row) for _ in range(height)), pack.flush()])

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, colour, 0, 0, 0])
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b""))
    return path


def test_limits_hold_in_their_block() -> None:
    assert current_limits() == Limits(50_000_000, 2**31)
    with limits(pixels=200), limits(size=30) as inner:
        assert current_limits() == inner == Limits(200, 30)
    assert current_limits() == Limits()
    with pytest.raises(InputError, match="limits are whole numbers above 0, not pixels=0"), limits(pixels=0):
        pass


def test_images_have_a_limit_of_pixels(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    with (
        limits(pixels=599),
        pytest.raises(InputError, match=r"a\.png has 600 pixels, more than the 599 that are read; .*--max-pixels or .*limits\(pixels="),
    ):
        load_image(tmp_path / "a.png")
    with limits(pixels=600):
        assert load_image(tmp_path / "a.png").size == (30, 20)


def test_images_have_a_limit_of_bytes(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    size = (tmp_path / "a.png").stat().st_size
    with limits(size=size):
        assert load_image(tmp_path / "a.png").size == (30, 20)
    with limits(size=size - 1), pytest.raises(InputError, match=rf"a\.png has {size} bytes, more than the {size - 1} .* with --max-bytes"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (20_000, 20_000), (60_000, 60_000)])
def test_an_image_that_unpacks_to_more_is_refused_before_it_does(width: int, height: int, tmp_path: Path) -> None:
    file = png(tmp_path / "a.png", width, height // 100)
    data = bytearray(file.read_bytes())
    data[20:24] = height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    file.write_bytes(bytes(data))
    before = peak()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Pillow's own words from 89 million pixels on
        with pytest.raises(InputError, match=r"a\.png has .*more than the 50,000,000 that are read"):
            load_image(file)
    assert peak() - before < GIB // 10


@pytest.mark.slow
def test_the_largest_image_takes_less_than_a_gibibyte(tmp_path: Path) -> None:
    file = png(tmp_path / "a.png", 8_000, 6_250)
    assert file.stat().st_size < 5 * 2**20
    before = peak()
    assert read_image(file).shape == (3, 6_250, 8_000)
    assert peak() - before < GIB


def test_a_users_limit_is_pillows_too(tmp_path: Path) -> None:
    file = png(tmp_path / "a.png", 10_000, 9_500)  # Pillow warns from 89 million pixels on
    before = Image.MAX_IMAGE_PIXELS
    with limits(pixels=100_000_000):
        assert image_size(file) == (9_500, 10_000)
    assert before == Image.MAX_IMAGE_PIXELS


def test_strips_are_no_photographs(tmp_path: Path) -> None:
    Image.new("RGB", (2000, 3)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png has 2000x3 pixels: it is no photograph"):
        read_image(tmp_path / "a.png")


def test_files_have_a_limit_of_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(100))
    assert len(read_bytes(tmp_path / "a.bin", 100)) == 100
    with pytest.raises(InputError, match=r"a\.bin has 100 bytes, more than the 99 that are read; it is another kind"):
        read_bytes(tmp_path / "a.bin", 99)
    with (
        limits(size=99),
        pytest.raises(
            InputError, match=r"a\.bin has 100 bytes, more than the 99 that are read; raise the limit with --max-bytes or .*limits\(size="
        ),
    ):
        read_bytes(tmp_path / "a.bin")


def test_a_file_without_content_of_any_size(tmp_path: Path) -> None:
    """A terabyte that takes no room on the disk."""
    with (tmp_path / "a.bin").open("wb") as file:
        file.truncate(2**40)
    before = peak()
    with pytest.raises(InputError, match=r"a\.bin has 1,099,511,627,776 bytes"):
        read_bytes(tmp_path / "a.bin")
    assert peak() - before < GIB // 10


def test_a_limit_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(100))
    with limits(size=10**18):
        assert len(read_bytes(tmp_path / "a.bin")) == 100


@pytest.mark.parametrize("head", [b"Pf\n999999999 999999999\n-1\n", b"Pf\n" + b"9" * 5000 + b" 1\n-1\n", b"Pf\n100000 1000\n-1\n"])
def test_depth_that_announces_too_much(head: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(head)
    with pytest.raises(InputError, match=r"a (is no grey PFM|announces .* more than the|should hold)"):
        read_pfm(tmp_path / "a")
    (tmp_path / "a").write_bytes(head[3:].replace(b"\n", b"&").replace(b" ", b"&"))
    with pytest.raises(InputError, match=r"a (is no depth map|announces .* more than the|should hold)"):
        read_colmap_depth(tmp_path / "a")


@pytest.mark.parametrize("count", ["1e18", "999999999999", "9" * 5000, "inf", "nan", "-3", "2.5", "٣"])
def test_pairs_that_announce_too_much(count: str, tmp_path: Path) -> None:
    words = r"pair\.txt (ends early: it announces|announces|should have a whole number)"
    (tmp_path / "pair.txt").write_text(f"{count}\n0 -1\n")
    with pytest.raises(InputError, match=words):
        read_pairs(tmp_path / "pair.txt")
    (tmp_path / "pair.txt").write_text(f"2\n0\n{count} 1 0.5\n")
    with pytest.raises(InputError, match=words):
        read_pairs(tmp_path / "pair.txt")


# --- archives


def archive(path: Path, name: str, shape: tuple[int, ...], dtype: str, size: int, kind: int = zipfile.ZIP_DEFLATED) -> Path:
    """An archive with one array of `size` zero bytes, whatever its header says."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": dtype, "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w", kind) as target, target.open(f"{name}.npy", "w", force_zip64=True) as file:
        file.write(head.getvalue())
        for _ in range(size // 2**20):
            file.write(bytes(2**20))
        file.write(bytes(size % 2**20))
    return path


@pytest.mark.parametrize(
    ("shape", "dtype", "size", "message"),
    [
        pytest.param((2**26,), "<f8", 2**29, r"world_mat_0 takes 536,\d+,\d+ bytes", marks=pytest.mark.slow),
        ((4, 4), "<f8", 2**29, r"world_mat_0 takes 536,\d+,\d+ bytes"),
        ((2**40,), "<f8", 128, r"should be a 4x4 matrix of real numbers, is \[1099511627776\] of float64"),
        ((4, 4), "<f8", 120, "cannot be read|ends early"),
        ((3, 4), "<f8", 96, "should be a 4x4 matrix"),
        ((4, 4), "<f2", 32, "should be a 4x4 matrix of real numbers, is .* of float16"),
        ((4, 4), "<c16", 256, "is .* of complex128"),
        ((4, 4), "<U8", 512, "is .* of <U8"),
        ((4, 4), "|S8", 128, r"is .* of \|S8"),
        ((4, 4), "<m8[s]", 128, "is .* of timedelta64"),
        ((4, 4), "|O", 128, "is .* of object"),
        ((4, 4), "|b1", 16, "is .* of bool"),
    ],
)
def test_archives_are_looked_at_before_they_are_unpacked(
    shape: tuple[int, ...], dtype: str, size: int, message: str, tmp_path: Path
) -> None:
    file = archive(tmp_path / "a.npz", "world_mat_0", shape, dtype, size)
    before = peak()
    with pytest.raises(InputError, match=rf"a\.npz.*({message})"):
        read_matrices(file, "world_mat_")
    assert peak() - before < GIB // 10


def test_archives_of_other_programs(tmp_path: Path) -> None:
    file = archive(tmp_path / "a.npz", "world_mat_0", (4, 4), "<f8", 128, zipfile.ZIP_LZMA)
    with pytest.raises(InputError, match="packed in a way that NumPy does not write"):
        read_matrices(file, "world_mat_")
    np.savez(file, world_mat_1=np.eye(4, dtype=np.float32), world_mat_2=np.asfortranarray(np.triu(np.ones((4, 4)))), other=np.zeros(3))
    found = read_matrices(file, "world_mat_")
    assert sorted(found) == [1, 2]
    assert np.array_equal(found[2], np.triu(np.ones((4, 4))))
    np.savez(file, world_mat_1=np.eye(4), world_mat_01=np.eye(4))
    with pytest.raises(InputError, match="twice, or by two spellings"):
        read_matrices(file, "world_mat_")
    np.savez(file, **{f"world_mat_{'9' * 5000}": np.eye(4)})
    assert read_matrices(file, "world_mat_") == {}


# --- names and folders


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    for name in ("a" * 5000, "a\0b", "a/" * 3000):
        assert not is_file(tmp_path / name)
        assert not is_dir(tmp_path / name)
        with pytest.raises(InputError, match=r"is no folder|is missing"):
            entries(tmp_path / name)
        with pytest.raises(InputError, match="does not exist"):
            find_images(tmp_path / name)
        for layout in ("images", "colmap", "dtu-idr"):
            with pytest.raises(InputError, match="is no folder"):
                open_scenes(f"{layout}:{tmp_path / name}")
    with pytest.raises(InputError, match="~nosuchuser/x is no folder"):
        open_scenes("images:~nosuchuser/x")
    with pytest.raises(InputError, match="procedural scenes take"):
        open_scenes("procedural:scenes=²")


def test_messages_stay_short_and_printable() -> None:
    assert listed(["a\nb", "ü", *"cdefgh"]) == r"a\nb, ü, c, d, e and 3 more"
    assert listed(["x" * 300]) == "x" * 80 + "..."
    with pytest.warns(DataWarning, match="hello"):
        say("hello")


def test_a_stack_of_images_is_what_its_images_are(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1300, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert torch.equal(read_image(tmp_path / "a.png"), torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)
