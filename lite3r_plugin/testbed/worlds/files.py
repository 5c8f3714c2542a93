"""Packed worlds: triangles, textures, light maps and clips of cameras in one ``npz`` file."""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]
SKY, ALPHA, BRIGHT = 1, 2, 4  # bits of `World.flags`


@dataclass
class World:
    """A world in memory: T triangles, N vertices, K textures, C clips of 16 cameras; metres, z up.

    Attributes:
        meta: Name, source and licence among others; ``col_is_light`` says whether ``col`` is baked light.
        pos, uv, lm, col: Of the vertices: positions ``[N, 3]``, texture and light map coordinates ``[N, 2]``, colours ``[N, 3]`` u8.
        layer, page: Of the vertices: texture, and light map or -1.
        tri: Vertices of the triangles ``[T, 3]``.
        flags, textures, pages: `SKY`, `ALPHA`, `BRIGHT` of the textures ``[K]``; ``[K, S, S, 4]`` u8; light maps ``[P, L, L, 3]`` u8.
        clip_pos, clip_rot: Camera centres ``[C, 16, 3]``, quaternions (w, x, y, z) of the rotations to the camera ``[C, 16, 4]``.
        clip_clear, clip_fov, clip_scale: Free space around each camera in metres ``[C, 16]``, field of view over the longer side in
            degrees ``[C]``, distance to what is looked at in metres ``[C]``.
        clip_overlap: Percent of its pixels that a view shares with another, ``[C, 16, 16]``.
    """

    meta: dict[str, Any]
    pos: Array
    uv: Array
    lm: Array
    col: Array
    layer: Array
    page: Array
    tri: Array
    flags: Array
    textures: Array
    pages: Array
    clip_pos: Array
    clip_rot: Array
    clip_clear: Array
    clip_fov: Array
    clip_scale: Array
    clip_overlap: Array


def load_world(path: str | Path) -> World:
    """A packed world, dequantised."""
    with np.load(path) as file:
        data = {name: file[name] for name in file.files}
    meta = json.loads(data["meta"].tobytes())
    plain = ("layer", "page", "flags", "clip_pos", "clip_rot", "clip_clear", "clip_fov", "clip_scale", "clip_overlap")
    return World(
        meta=meta,
        pos=data["q"].T * np.float32(meta["step"]) + np.array(meta["lo"], np.float32),
        uv=data["uv"].T * np.float32(meta["uv_step"]),
        lm=data["lm"].T * np.float32(meta["lm_step"]),
        col=(data["col"].T.astype(np.uint8) << 2) | (data["col"].T >> 4),
        tri=data["tri"].T.astype(np.int32),
        textures=_stack(_pictures(data["tex_bytes"], data["tex_at"], "RGBA"), 4),
        pages=_stack(_pictures(data["page_bytes"], data["page_at"], "RGB"), 3),
        **{name: data[name] for name in plain},
    )


def load_pictures(path: str | Path) -> list[Image.Image]:
    """Square pictures (RGBA) that can be laid over textures."""
    with np.load(path) as file:
        return _pictures(file["photos_bytes"], file["photos_at"], "RGBA")


def _pictures(data: Array, at: Array, mode: str) -> list[Image.Image]:
    raw = data.tobytes()
    return [Image.open(io.BytesIO(raw[start:end])).convert(mode) for start, end in itertools.pairwise(at)]


def _stack(pictures: list[Image.Image], channels: int) -> Array:
    if not pictures:
        return np.zeros((0, 1, 1, channels), np.uint8)
    side = max(picture.size[0] for picture in pictures)
    return np.stack([np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR)) for picture in pictures])
