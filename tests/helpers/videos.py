"""Small videos as phones write them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def write_video(path: Path, frames: Sequence[np.ndarray], times: Sequence[float] | None = None, codec: str = "mpeg4") -> Path:
    """Frames ``[H, W, 3]`` uint8, shown at `times` in seconds, by default 10 a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(1000 * (i / 10 if times is None else times[i])), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def turn(path: Path, degrees: int) -> None:
    """Set what a phone that is held upright writes: the matrix of the track, turned clockwise."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # past version, times, ids, layers: the matrix of version 0
    c, s = round(math.cos(math.radians(degrees))), round(math.sin(math.radians(degrees)))
    matrix = [c * 65536, s * 65536, 0, -s * 65536, c * 65536, 0, 0, 0, 1 << 30]
    data[at : at + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    path.write_bytes(data)
