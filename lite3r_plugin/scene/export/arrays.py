"""NumPy archives: everything that a model predicted, for programs, and back."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import torch

from ...errors import InputError
from ...files import write_atomically
from ..geometry import unproject
from ..prediction import Prediction
from ..reading import MORE_BYTES, current_limits, read_bytes, shown
from .reconstruction import Reconstruction

FIELDS = ("depth", "confidence", "world_to_camera", "intrinsics", "images", "names")


def save_npz(scene: Reconstruction, path: Path) -> None:
    """Write all pixels of all views, compressed. Raises `InputError` when that fails.

    ``depth`` and ``confidence`` ``[S, H, W]``, ``world_to_camera`` ``[S, 3, 4]`` and ``intrinsics`` ``[S, 3, 3]`` in float32, as
    predicted; ``images`` ``[S, H, W, 3]`` uint8; ``names`` ``[S]``. Axes are OpenCV's, as in `lite3r_plugin.scene.prediction`.
    """
    found = scene.prediction
    images = (found.images * 255).round().clamp(0, 255).to(torch.uint8)
    arrays = {name: getattr(found, name).numpy() for name in FIELDS[:4]}
    data = io.BytesIO()
    np.savez_compressed(data, images=images.numpy(), names=np.array(scene.names), **arrays)
    write_atomically(path, data.getvalue())


def load_npz(path: Path, drop_percent: float = 20.0, max_points: int = 1_000_000) -> Reconstruction:
    """Read what `save_npz` wrote; the points are those of depth and cameras.

    Raises:
        InputError: the file is missing, damaged or another.
    """
    try:
        data = io.BytesIO(read_bytes(path))
        if (size := sum(entry.file_size for entry in zipfile.ZipFile(data).infolist())) > current_limits().size:
            raise InputError(f"{path} holds {size:,} bytes, more than the {current_limits().size:,} that are read; {MORE_BYTES}")
        with np.load(data, allow_pickle=False) as archive:
            if missing := [name for name in FIELDS if name not in archive]:
                raise InputError(f"{path} has no array {missing[0]!r}; view takes what `lite3r reconstruct --out scene.npz` wrote")
            found = {name: archive[name] for name in FIELDS}
        tensors = {name: torch.from_numpy(np.asarray(found[name], np.float32)) for name in FIELDS[:4]}
        images = torch.from_numpy(np.asarray(found["images"], np.float32) / 255)
        points = unproject(tensors["depth"], tensors["world_to_camera"], tensors["intrinsics"])
        names = tuple(str(name) for name in found["names"])
        return Reconstruction(Prediction(points=points, images=images, **tensors), names, drop_percent, max_points)
    except InputError:
        raise
    except Exception as error:  # a damaged archive raises whatever its parser trips over
        raise InputError(f"{path} cannot be read as a reconstruction: {shown(str(error), 200)}") from error
