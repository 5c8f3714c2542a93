"""Views from videos: the sharpest frames, upright, and words for videos that are none."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from videos import turn, write_video

from lite3r_plugin.errors import InputError
from lite3r_plugin.scene.reading import DataWarning, limits
from lite3r_plugin.scene.video import read_video, sharpest


def frames(count: int, sharp: tuple[int, ...] = (), size: tuple[int, int] = (48, 64)) -> list[np.ndarray]:
    """Grey frames, each a little brighter, with details that only those called `sharp` show."""
    details = np.random.default_rng(0).integers(0, 60, (*size, 1)).repeat(3, 2)
    found = []
    for i in range(count):
        image = Image.fromarray((details + 5 * i + 40).clip(0, 255).astype(np.uint8))
        found.append(np.asarray(image if i in sharp else image.filter(ImageFilter.GaussianBlur(2))))
    return found


def brightness(image: Image.Image) -> float:
    return float(np.asarray(image).mean())


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "avi"])
def test_the_sharpest_frame_of_each_stretch(suffix: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / f"a.{suffix}", frames(12, (1, 6, 11)))
    views = read_video(path, max_views=3)
    assert [name for name, _ in views] == ["a_000001.png", "a_000006.png", "a_000011.png"]
    assert [image.size for _, image in views] == [(64, 48)] * 3
    for (_, image), i in zip(views, (1, 6, 11), strict=True):
        assert abs(brightness(image) - frames(12, (1, 6, 11))[i].mean()) < 4


def test_stretches_of_seconds_where_frames_come_as_they_like(tmp_path: Path) -> None:
    times = [0, 0.1, 0.2, 0.3, 0.4, 2.0, 2.1, 2.15, 3.9]
    path = write_video(tmp_path / "a.mp4", frames(9, (2, 7, 8)), times)
    assert [name[2:8] for name, _ in read_video(path, every=1)] == ["000002", "000007", "000008"]
    assert [name[2:8] for name, _ in read_video(path, max_views=2, every=1)] == ["000002", "000007"]


def test_stretches() -> None:
    times = [i / 30 for i in range(300)]
    assert len(sharpest(times, [1.0] * 300)) == 32
    assert sharpest(times, [1.0] * 300, 3) == [0, 100, 200]
    assert len(sharpest(times, [1.0] * 300, every=0.5)) == 20
    assert sharpest(times[:2], [1.0, 2.0], 5) == [0, 1]


@pytest.mark.parametrize(
    ("degrees", "size", "corner"), [(0, (64, 48), (8, 8)), (90, (48, 64), (40, 8)), (180, (64, 48), (56, 40)), (270, (48, 64), (8, 56))]
)
def test_phones_that_are_held_upright(degrees: int, size: tuple[int, int], corner: tuple[int, int], tmp_path: Path) -> None:
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:16, :16] = 255  # which is turned clockwise with the picture
    path = write_video(tmp_path / "a.mp4", [pixels] * 3)
    turn(path, degrees)
    ((_, image),) = read_video(path, max_views=1)
    assert image.size == size
    assert image.getpixel(corner)[0] > 200
    assert brightness(image) < 60


def test_a_video_that_ends_early_gives_what_there_is_and_says_so(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", frames(40, size=(120, 160)))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(DataWarning, match=r"a\.mkv ends early, after [0-9]+ frames"):
        views = read_video(path, max_views=4)
    assert len(views) == 4


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "no frames"])
def test_videos_that_are_none(damage: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames(10))
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "text": b"not a video" * 100, "empty": b"", "no frames": data}[damage])
    if damage == "no frames":
        at, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
        path.write_bytes(data[:at] + bytes(end - at) + data[end:])
    with pytest.raises(InputError, match=r"a\.mp4 (cannot be read as a video|has no frame that can be decoded|has no pictures)"):
        read_video(path)


def test_sound_alone(tmp_path: Path) -> None:
    import av

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(InputError, match="has no pictures"):
        read_video(tmp_path / "a.mp4")


def test_limits_of_pixels_hold(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames(3))
    with limits(pixels=64 * 48 - 1), pytest.raises(InputError, match="has frames of 3,072 pixels, more than the 3,071 that are read"):
        read_video(path)
    with limits(pixels=64 * 48):
        assert len(read_video(path)) == 3


def test_lists_of_other_files_are_not_followed(tmp_path: Path) -> None:
    secret = write_video(tmp_path / "secret.mp4", frames(3))
    (tmp_path / "a.mp4").write_text(f"ffconcat version 1.0\nfile {secret.name}\n")
    (tmp_path / "b.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret.name}\n#EXT-X-ENDLIST\n")
    for name in ("a.mp4", "b.mp4"):
        with pytest.raises(InputError, match="cannot be read as a video"):
            read_video(tmp_path / name)


def test_what_is_wrong_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for every in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="seconds above 0"):
            read_video(tmp_path / "a.mp4", every=every)
    with pytest.raises(InputError, match=r"none\.mp4 is missing"):
        read_video(tmp_path / "none.mp4")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "av" else find(name))
    with pytest.raises(InputError, match=r"pip install 'lite3r-plugin\[video\]'"):
        read_video(tmp_path / "a.mp4")
