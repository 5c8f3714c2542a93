"""What passes between reconstruction models and the command line: `ModelEntry` in, `Prediction` out.

Cameras are OpenCV's: x right, y down, z forward; a pixel (u, v) has its centre at (u + 0.5, v + 0.5); depth is the z
coordinate in the camera's frame. Units are the model's own, metres only where the model says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .errors import AdapterError, InputError
from .weights import RANDOM, find_weights, load_weights

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Prediction:
    """A reconstructed scene of S views, float32 on the CPU.

    Attributes:
        depth: ``[S, H, W]``, along the camera's z axis.
        confidence: ``[S, H, W]``, larger is surer; the scale is the model's own.
        points: ``[S, H, W, 3]`` in world coordinates.
        world_to_camera: ``[S, 3, 4]``, rotation and translation.
        intrinsics: ``[S, 3, 3]`` in pixels of the images below.
        images: ``[S, H, W, 3]`` in [0, 1], what the model saw.

    Raises:
        AdapterError: the shapes do not fit together.
    """

    depth: Tensor
    confidence: Tensor
    points: Tensor
    world_to_camera: Tensor
    intrinsics: Tensor
    images: Tensor

    def __post_init__(self) -> None:
        size = tuple(self.depth.shape)
        views = size[:1]
        shapes = {
            "depth": size, "confidence": size, "points": (*size, 3), "images": (*size, 3),
            "world_to_camera": (*views, 3, 4), "intrinsics": (*views, 3, 3),
        }  # fmt: skip
        if len(size) != 3:
            raise AdapterError(f"Prediction.depth is [S, H, W], got {list(size)}")
        for name, shape in shapes.items():
            value = getattr(self, name)
            if tuple(value.shape) != shape:
                raise AdapterError(f"Prediction.{name} must be {list(shape)} to fit depth {list(size)}, got {list(value.shape)}")
            object.__setattr__(self, name, value.detach().to("cpu", torch.float32))

    @property
    def num_views(self) -> int:
        """S."""
        return self.depth.shape[0]


@dataclass(frozen=True)
class ModelEntry:
    """A model that the command line can build and run.

    Attributes:
        name: What users type after ``--model``.
        summary: One line about it.
        create: Makes the model with random weights, on the CPU. It may import the model's library.
        preprocess: RGB images to the model's input, ``[S, 3, H, W]``.
        predict: Runs the model on that input, already on the model's device, without gradients.
        default_weights: Hub id or file that is loaded when the user names none; None: the user must name one.
        library: Import name of the library that `create` needs, or None.
        install: How to get that library.
        rename: As in `lite3r_plugin.weights.load_weights`.
        min_views: Fewest images it takes.
        mixed_sizes: What `preprocess` does to images of different sizes, as the end of "images of different sizes are ...".
    """

    name: str
    summary: str
    create: Callable[[], nn.Module]
    preprocess: Callable[[Sequence[Image.Image]], Tensor]
    predict: Callable[[nn.Module, Tensor], Prediction]
    default_weights: str | None = None
    library: str | None = None
    install: str = ""
    rename: Callable[[str], str | None] | None = None
    min_views: int = 1
    mixed_sizes: str = "resized to the size of the first"

    @property
    def available(self) -> bool:
        """Whether the library that it needs can be found."""
        return self.library is None or importlib.util.find_spec(self.library) is not None

    def build(self, weights: str | None = None, device: torch.device | str = "cpu") -> nn.Module:
        """The model in evaluation mode, in FP32, on `device`.

        Args:
            weights: A file, a Hub id, ``"random"`` (the same numbers every time; for timing only), or None for
                `default_weights`.
            device: Where to put it.

        Raises:
            InputError: the library or the weights cannot be had, or the weights belong to another model.
        """
        if not self.available:
            raise InputError(f"the model {self.name!r} needs the library {self.library!r}, which is not installed: {self.install}")
        weights = weights or self.default_weights
        if weights is None:
            raise InputError(f"the model {self.name!r} has no default weights; name a file or a Hub id, or {RANDOM!r} for timing only")
        file = None if weights == RANDOM else find_weights(weights)
        try:
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(0)
                model = self.create()
        except ImportError as error:
            raise InputError(
                f"the library {self.library!r} of the model {self.name!r} cannot be imported ({error}): {self.install}"
            ) from error
        if file is not None:
            load_weights(model, file, self.rename)
        return model.eval().to(device)


@dataclass(frozen=True)
class DepthError:
    """Absolute relative depth error |depth - reference| / reference over pixels: mean, 95th percentile, maximum."""

    mean: float
    p95: float
    maximum: float


def depth_error(depth: Tensor, reference: Tensor, align_scale: bool = False) -> DepthError:
    """Compare depth maps ``[S, H, W]`` where the reference is finite and positive.

    Args:
        depth: What is judged.
        reference: What it is compared with; 0, negative or not finite where unknown.
        align_scale: First multiply `depth` by one number for the whole scene, the median of reference / depth. For
            references from another source than the model, which knows no scale.
    """
    known = reference.isfinite() & (reference > 0)
    depth, reference = depth[known].double(), reference[known].double()
    if not len(reference):
        return DepthError(float("nan"), float("nan"), float("nan"))
    if align_scale:
        depth = depth * (reference / depth).median()
    error = (depth - reference).abs() / reference
    rank = max(1, round(0.95 * len(error)))
    return DepthError(error.mean().item(), error.kthvalue(rank).values.item(), error.max().item())


def unproject(depth: Tensor, world_to_camera: Tensor, intrinsics: Tensor) -> Tensor:
    """World points ``[S, H, W, 3]`` of depth maps ``[S, H, W]`` with cameras ``[S, 3, 4]`` and ``[S, 3, 3]``."""
    height, width = depth.shape[-2:]
    v, u = torch.meshgrid(
        torch.arange(height, device=depth.device) + 0.5, torch.arange(width, device=depth.device) + 0.5, indexing="ij"
    )  # fmt: skip
    pixels = torch.stack((u, v, torch.ones_like(u)), -1).to(depth.dtype)  # [H, W, 3]
    rays = torch.einsum("sij,hwj->shwi", torch.linalg.inv(intrinsics.to(depth.dtype)), pixels)
    rotation, translation = world_to_camera[:, :, :3].to(depth.dtype), world_to_camera[:, :, 3].to(depth.dtype)
    return torch.einsum("sji,shwj->shwi", rotation, rays * depth[..., None] - translation[:, None, None])


def fit_intrinsics(camera_points: Tensor) -> Tensor:
    """Pinhole intrinsics ``[S, 3, 3]`` with a central principal point that explain camera-frame points ``[S, H, W, 3]``.

    For models that predict points but no focal length. Robust: the median over pixels of each axis.
    """
    views, height, width = camera_points.shape[:3]
    x, y, z = camera_points.float().unbind(-1)
    u = (torch.arange(width, device=x.device) + 0.5 - width / 2).expand_as(x)
    v = (torch.arange(height, device=x.device) + 0.5 - height / 2)[:, None].expand_as(y)
    intrinsics = torch.zeros(views, 3, 3, device=x.device)
    for axis, pixel, coordinate in ((0, u, x), (1, v, y)):
        slope = coordinate / z
        focal = (pixel / torch.where(slope == 0, 1e-9, slope)).flatten(1).median(1).values
        intrinsics[:, axis, axis] = focal.clamp_min(1.0)
    intrinsics[:, 0, 2], intrinsics[:, 1, 2], intrinsics[:, 2, 2] = width / 2, height / 2, 1.0
    return intrinsics
