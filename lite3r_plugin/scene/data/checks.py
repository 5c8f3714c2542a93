"""What holds for the frames of every layout: names of their own, poses that FP32 tells apart, and a word about what only some have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...errors import InputError
from ..images import require_decoders
from ..reading import listed, say
from .scene import Frame, Scene

# Of the distances between cameras: what FP32 may round their translations by.
RESOLUTION = 1e-3
FLOAT32 = 2.0**-24  # the largest error of rounding, relative


def make_scene(name: str, frames: Sequence[Frame], folder: Path) -> Scene:
    """A scene of frames that were read from `folder`.

    Poses that lie so far from the origin of the world that FP32 would round them to others, as map coordinates do, get their middle as the
    origin, which a `DataWarning` says. Frames without a depth map or mask, where others have one, are named in a `DataWarning` as well.

    Raises:
        InputError: there are fewer than two frames, several of one name, or images of kinds that are not read here.
    """
    twice = [frame for frame, count in Counter(frame.name for frame in frames).items() if count > 1]
    if twice:
        raise InputError(f"{folder} holds several images of one name: {listed(twice)}; rename or remove them")
    require_decoders([frame.image for frame in frames if isinstance(frame.image, Path)])
    for what in ("depth", "mask"):
        without = [frame.name for frame in frames if getattr(frame, what) is None]
        if 0 < len(without) < len(frames):
            say(f"{folder}: {len(without)} of {len(frames)} views have no {what}: {listed(without)}")
    return Scene(name, tuple(_near(frames, folder)), str(folder))


def _near(frames: Sequence[Frame], folder: Path) -> Sequence[Frame]:
    known = [frame.world_to_camera for frame in frames if frame.world_to_camera is not None]
    if len(known) < 2:
        return frames
    poses = torch.stack(known)
    centres = -(poses[:, :, :3].mT @ poses[:, :, 3:])[:, :, 0]
    spread = (centres - centres.mean(0)).norm(dim=1).max().item()
    error = FLOAT32 * centres.abs().max().item()
    # Where even FP64 tells no two centres apart, the camera only turned.
    if error <= RESOLUTION * spread or spread < 1e-12 * centres.abs().max().item():
        return frames
    middle = centres.mean(0)
    say(
        f"{folder}: the cameras lie {middle.norm():.6g} from the origin and {spread:.3g} from their middle, which 32-bit numbers cannot "
        "hold; their middle becomes the origin"
    )
    return [_moved(frame, middle) for frame in frames]


def _moved(frame: Frame, origin: Tensor) -> Frame:
    """The frame in a world with another origin."""
    if frame.world_to_camera is None:
        return frame
    R, t = frame.world_to_camera.split((3, 1), -1)
    return replace(frame, world_to_camera=torch.cat((R, t + R @ origin[:, None]), -1))
