"""Views from a video: the sharpest frame of each stretch of it, upright, RGB, eight bit."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import InputError
from .images import spread, too_many
from .reading import current_limits, is_file, say, shown

SUFFIXES = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".3gp", ".mpg", ".mpeg", ".mts", ".m2ts", ".wmv", ".flv")
# Lists of other files, which may lie anywhere in the world, are containers to FFmpeg too.
CONTAINERS = "mov,matroska,avi,mpeg,mpegts,asf,flv"
INSTALL = "videos are read by PyAV: pip install 'lite3r-plugin[video]'"
VIEWS = 32  # of a video, where nobody says how many
JUDGED = 480  # pixels of the longer side at which sharpness is judged: noise of pixels is none


def is_video(path: Path) -> bool:
    """Whether the name is that of a video."""
    return path.suffix.lower() in SUFFIXES


def require_reader() -> None:
    """Raise `InputError` where videos cannot be read here."""
    if importlib.util.find_spec("av") is None:
        raise InputError(INSTALL)


def read_video(path: Path, max_views: int | None = None, every: float | None = None) -> list[tuple[str, Image.Image]]:
    """The sharpest frame of each stretch of a video, and a name for each: of the file and the frame's number, from 0.

    The video is decoded twice, to judge the frames and to take them, so that memory holds no more than the frames taken.

    Args:
        path: The file.
        max_views: As many stretches of equally many frames; with `every`, at most so many of its stretches, evenly spread.
        every: Stretches of so many seconds. Frames need not come at a constant rate.

    Raises:
        InputError: PyAV is not installed, the file is no video or has no frame that can be decoded, or its frames have more pixels than
            `lite3r_plugin.scene.reading.Limits` allow.
    """
    if every is not None and not 0 < every < math.inf:
        raise InputError(f"--every takes seconds above 0, got {every}")
    require_reader()
    if not is_file(path):
        raise InputError(f"{shown(str(path), 300)} is missing")
    times, sharpness = _judge(path)
    chosen = sharpest(times, sharpness, max_views, every)
    wanted, images = set(chosen), list[Image.Image]()
    for number, (frame, aspect) in enumerate(_frames(path, quiet=True)):
        if number in wanted:
            images.append(_upright(frame, aspect))
        if len(images) == len(chosen):
            break
    if len(images) < len(chosen):
        raise InputError(f"{path} gives other frames each time it is read; save it anew")
    return [(f"{path.stem}_{number:06d}.png", image) for number, image in zip(chosen, images, strict=True)]


def sharpest(times: Sequence[float], sharpness: Sequence[float], max_views: int | None = None, every: float | None = None) -> list[int]:
    """Numbers of the sharpest frames, one of each stretch; the arguments are those of `read_video`, `times` in seconds, growing."""
    count = len(times)
    if every is None:
        most = min(count, VIEWS if max_views is None else max_views)
        stretches = [range(i * count // most, (i + 1) * count // most) for i in range(most)]
    else:
        by_time = groupby(range(count), lambda i: (times[i] - times[0]) // every)
        stretches = spread([list(group) for _, group in by_time], max_views)
    return [max(stretch, key=lambda i: sharpness[i]) for stretch in stretches]


def _judge(path: Path) -> tuple[list[float], list[float]]:
    """Seconds and sharpness of each frame: the variance of its brightness' Laplacian."""
    times, sharpness = list[float](), list[float]()
    for frame, _ in _frames(path):
        shown_at = times[-1] if times else -math.inf
        time = frame.time
        times.append(time if time is not None and time > shown_at else shown_at + 1 / 30 if times else 0.0)
        scale = min(1.0, JUDGED / max(frame.width, frame.height))
        small = frame.reformat(max(4, round(frame.width * scale)), max(4, round(frame.height * scale)), "gray")
        grey = small.to_ndarray().astype(np.float32)
        laplacian = 4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]
        sharpness.append(float(laplacian.var()))
    return times, sharpness


def _frames(path: Path, quiet: bool = False) -> Iterator[tuple[Any, float]]:
    """The frames of the first video stream, in the order in which they are shown, with the width of a pixel divided by its height; says,
    unless `quiet`, where they end too early."""
    import av

    allowed, count, last = current_limits().pixels, 0, 0.0
    try:
        container = av.open(str(path.absolute()), options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"})
    except Exception as error:  # PyAV has an error of its own for each of FFmpeg's
        raise InputError(f"{path} cannot be read as a video ({shown(str(error), 200)}); it is damaged, or of another kind") from error
    with container:
        if not container.streams.video:
            raise InputError(f"{path} has no pictures")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        stream.codec_context.options = {"max_pixels": str(2 * allowed + 100_000)}  # before a frame is there; FFmpeg counts its margins
        aspect = float(stream.sample_aspect_ratio or 1)
        damage = ""
        decoded = container.decode(stream)
        while True:
            try:
                _check_pixels(path, stream.codec_context, allowed)
                frame = next(decoded, None)
            except InputError:
                raise
            except Exception as error:
                damage = shown(str(error), 200)
                break
            if frame is None:
                break
            _check_pixels(path, frame, allowed)
            count, last = count + 1, frame.time if frame.time is not None else last
            yield frame, aspect if 0.1 < aspect < 10 else 1.0
        whole = (container.duration or 0) / av.time_base
    if not count:
        raise InputError(f"{path} has no frame that can be decoded ({damage or 'it ends early'}); it is damaged, or needs a decoder")
    if not quiet and (damage or last < 0.9 * whole - 1):
        why = damage or f"it announces {whole:.1f} s"
        say(f"{path} ends early, after {count} frames and {last:.1f} s: {why}; what was read is used")


def _check_pixels(path: Path, size: Any, allowed: int) -> None:
    if (count := size.width * size.height) > allowed:
        raise InputError(f"{path} has frames of {count:,} pixels, {too_many(allowed)}")


def _upright(frame: Any, aspect: float) -> Image.Image:
    """A frame as people see it: pixels made square, turned as its file says."""
    image = frame.to_image()
    if aspect != 1:
        image = image.resize((max(1, round(image.width * aspect)), image.height), Image.Resampling.BICUBIC)
    turn = frame.rotation % 360
    return image.rotate(turn, expand=True) if turn else image
