"""What resizing and cropping do to cameras, and the one validation of the cameras that files hold.

Pixel (u, v) has its centre at (u + 0.5, v + 0.5), so intrinsics scale with the image and no half pixel is left over.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError

ROTATION_TOLERANCE = 0.02  # files round their numbers; wrong conventions are off by far more
LAST_ROW_TOLERANCE = 1e-6
FARTHEST = 1e15  # in any unit that somebody uses; its square fits FP32
MAX_SKEW = 0.1  # of the focal length
FOCALS = (0.05, 100.0)  # of the image's side: angles of view from 169 to 0.57 degrees
CENTRES = (-1.0, 2.0)  # of the image's side: what is cut out of a larger photograph may lie beside the principal point
SMALLEST = 16  # pixels; a smaller image may have its middle at 1


@dataclass(frozen=True)
class Fit:
    """Resizing a whole image, then cutting its middle out. All in pixels; `make` finds the numbers.

    Attributes:
        source: Height and width before.
        whole: Height and width after resizing.
        corner: Row and column where the cut begins.
        size: Height and width of the cut.
    """

    source: tuple[int, int]
    whole: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]

    @classmethod
    def make(cls, source: tuple[int, int], size: tuple[int, int] | None) -> Fit:
        """The largest middle part of `source` with the shape of `size`, at that size; None changes nothing."""
        if size is None:
            return cls(source, source, (0, 0), source)
        scale = max(size[0] / source[0], size[1] / source[1])
        whole = max(size[0], round(source[0] * scale)), max(size[1], round(source[1] * scale))
        return cls(source, whole, ((whole[0] - size[0]) // 2, (whole[1] - size[1]) // 2), size)

    def image(self, image: Tensor) -> Tensor:
        """An image ``[C, h, w]`` of the source's size, in [0, 1], resized with bicubic antialiasing and cut."""
        if self.whole != self.source:
            image = F.interpolate(image[None], self.whole, mode="bicubic", align_corners=False, antialias=True)[0].clamp(0, 1)
        (top, left), (height, width) = self.corner, self.size
        return image[:, top : top + height, left : left + width]

    def nearest(self, values: Tensor) -> Tensor:
        """A map ``[h, w]`` over the source image, at any resolution: the value nearest to each pixel's centre."""
        rows, columns = (
            (2 * (torch.arange(self.size[i], device=values.device) + self.corner[i]) + 1) * values.shape[i] // (2 * self.whole[i])
            for i in (0, 1)
        )
        return values[rows[:, None], columns]

    def intrinsics(self, K: Tensor) -> Tensor:
        """``[3, 3]`` of the source's pixels to those of the cut."""
        (top, left), (height, width) = self.corner, self.source
        sy, sx = self.whole[0] / height, self.whole[1] / width
        change = K.new_tensor([[sx, 0, -left], [0, sy, -top], [0, 0, 1]])
        return change @ K


def camera_matrix(numbers: np.ndarray, origin: str) -> Tensor:
    """Intrinsics ``[3, 3]`` in FP64, which fit FP32.

    Raises:
        InputError: the numbers are no pinhole camera; the message names `origin`.
    """
    K = torch.from_numpy(np.array(numbers, dtype=np.float64))
    single = K.float()
    pinhole = K[2].tolist() == [0, 0, 1] and K[1, 0] == 0 and K[0, 1].abs() <= MAX_SKEW * K[0, 0]
    if not pinhole or not single.isfinite().all() or single[0, 0] <= 0 or single[1, 1] <= 0:
        raise InputError(f"{origin}: the intrinsics are no pinhole camera: {K.tolist()}")
    return K


def check_camera(K: Tensor, size: tuple[int, int], origin: str) -> None:
    """Refuse intrinsics that no photograph of that size has: in other units than its pixels, for another image, or damaged.

    Args:
        K: ``[3, 3]``.
        size: Height and width in pixels.
        origin: What the message names.

    Raises:
        InputError: a focal length outside `FOCALS`, or a principal point outside `CENTRES`.
    """
    for i, side in ((0, size[1]), (1, size[0])):
        focal, centre = K[i, i].item(), K[i, 2].item()
        if not (FOCALS[0] <= focal / side <= FOCALS[1] and CENTRES[0] <= centre / side <= CENTRES[1]):
            raise InputError(
                f"{origin} has {size[1]}x{size[0]} pixels; a camera with focal length {focal:.6g} and principal point {centre:.6g} in "
                f"{'xy'[i]} is not for it: intrinsics are in pixels of the image"
            )
    if min(size) >= SMALLEST and 0 < K[0, 2] <= 1 and 0 < K[1, 2] <= 1:
        raise InputError(f"{origin}: the principal point {K[:2, 2].tolist()} is a share of the image; it should be in pixels")


def world_to_camera(rotation: np.ndarray, translation: np.ndarray, origin: str) -> Tensor:
    """``[3, 4]`` in FP64, which fits FP32, with the rotation that is nearest to the numbers of a file.

    Raises:
        InputError: the numbers are no rotation and translation; the message names `origin`.
    """
    R, t = np.asarray(rotation, dtype=np.float64), np.asarray(translation, dtype=np.float64)  # torch takes ten times as long for so little
    if not (np.isfinite(R).all() and np.isfinite(t).all()):
        raise InputError(f"{origin}: the pose holds numbers that are not finite")
    rotates = np.abs(R).max() < 2 and np.abs(R @ R.T - np.eye(3)).max() <= ROTATION_TOLERANCE and np.linalg.det(R) > 0
    if not rotates:
        raise InputError(f"{origin}: the pose has no rotation: {[[round(x, 4) for x in row] for row in R.tolist()]}")
    if (length := np.abs(t).max()) > FARTHEST or 0 < length < 1 / FARTHEST:
        raise InputError(f"{origin}: the pose has the translation {t.tolist()}, which is of no unit")
    U, _, Vh = np.linalg.svd(R)
    return torch.from_numpy(np.column_stack((U @ Vh, t)))


def inverse_pose(rotation: np.ndarray, centre: np.ndarray, origin: str) -> Tensor:
    """World to camera ``[3, 4]`` of a camera to world rotation and the camera's centre."""
    R = world_to_camera(rotation.T, centre, origin)[:, :3]  # looks at the numbers of the centre as well
    return world_to_camera(R.numpy(), -R.numpy() @ centre, origin)


def rigid(matrix: np.ndarray, origin: str) -> tuple[np.ndarray, np.ndarray]:
    """Rotation and translation of a 4x4 matrix.

    Raises:
        InputError: it is not finite, or its last row is not 0 0 0 1: the matrix is transposed or scaled, or no pose.
    """
    if not np.isfinite(matrix).all():
        raise InputError(f"{origin}: the pose holds numbers that are not finite")
    last = matrix[3]
    if np.abs(last - (0, 0, 0, 1)).max() > LAST_ROW_TOLERANCE:
        raise InputError(f"{origin}: the pose has the last row {last.tolist()}, not 0 0 0 1; is it transposed?")
    return matrix[:3, :3], matrix[:3, 3]
