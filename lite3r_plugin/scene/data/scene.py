"""What every layout is read into: scenes of frames, and views of them as tensors.

Cameras are OpenCV's: x right, y down, z forward, world to camera; pixel (u, v) has its centre at (u + 0.5, v + 0.5); depth is the z
coordinate in the camera's frame, in the data set's own unit. Images are in [0, 1]: what a model normalises is its own business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from ...errors import InputError
from ..geometry import Geometry, relative_to_first
from .cameras import Fit, check_camera
from .files import read_image

Lazy = Tensor | Callable[[], Tensor]


@dataclass(frozen=True)
class Frame:
    """One view of a scene; files are read when it is loaded.

    Attributes:
        name: Unique in its scene.
        image: A file, or ``[3, h, w]`` in [0, 1].
        intrinsics: ``[3, 3]`` in pixels of the image, or None where unknown.
        world_to_camera: ``[3, 4]``, or None where unknown.
        depth: ``[h', w']`` over the whole image, at its resolution or another; 0, negative or infinite where unknown.
        mask: ``[h', w']``, true where the scene is, or None: everywhere.
        size: Height and width that the intrinsics hold for, where the files tell; an image of another size is refused.
        covisible: Numbers of the frames that see the same parts, the best first, where the files tell.
    """

    name: str
    image: Path | Tensor
    intrinsics: Tensor | None = None
    world_to_camera: Tensor | None = None
    depth: Lazy | None = None
    mask: Lazy | None = None
    size: tuple[int, int] | None = None
    covisible: tuple[int, ...] = ()


@dataclass(frozen=True)
class Views:
    """S views of one scene at one size, float32.

    Attributes:
        names: Of the frames.
        images: ``[S, 3, H, W]`` in [0, 1].
        depth: ``[S, H, W]``; 0 where unknown.
        valid: ``[S, H, W]``, true where the depth is known and the mask holds.
        mask: ``[S, H, W]``; true everywhere where the data has no masks.
        intrinsics: ``[S, 3, 3]`` in pixels of `images`, or None unless all are known.
        world_to_camera: ``[S, 3, 4]``, or None unless all are known.
    """

    names: tuple[str, ...]
    images: Tensor
    depth: Tensor
    valid: Tensor
    mask: Tensor
    intrinsics: Tensor | None
    world_to_camera: Tensor | None

    def relative(self) -> Views:
        """The same views with the frame of the first camera as the world, as feed-forward models predict.

        Raises:
            InputError: no poses.
        """
        if self.world_to_camera is None:
            raise InputError("these views have no poses; open a layout with cameras")
        return replace(self, world_to_camera=relative_to_first(self.world_to_camera))

    def geometry(self) -> Geometry:
        """Depth, cameras and mask, as `lite3r_plugin.scene.metrics` measures them.

        Raises:
            InputError: no cameras.
        """
        if self.intrinsics is None or self.world_to_camera is None:
            raise InputError("these views have no cameras; open a layout with cameras")
        return Geometry(self.depth, self.world_to_camera, self.intrinsics, self.valid)

    def as_sample(self) -> dict[str, Tensor]:
        """A batch of this one scene in the format of the renderer, `lite3r_plugin.scene.procedural.ProcScenes`, for training losses.

        Raises:
            InputError: no cameras.
        """
        if self.intrinsics is None or self.world_to_camera is None:
            raise InputError("these views have no cameras; open a layout with cameras")
        ok = torch.ones(len(self.names), dtype=torch.bool, device=self.images.device)
        parts = {"rgb": self.images, "depth": self.depth, "valid": self.valid, "K": self.intrinsics, "w2c": self.world_to_camera, "ok": ok}
        return {name: part[None] for name, part in parts.items()}


@dataclass(frozen=True)
class Scene:
    """Frames that show one static scene.

    Attributes:
        name: Unique in its data set.
        frames: In the data set's order.
        origin: The folder, for messages.

    Raises:
        InputError: fewer than two frames.
    """

    name: str
    frames: tuple[Frame, ...]
    origin: str

    def __post_init__(self) -> None:
        if len(self.frames) < 2:
            held = f"one view only, {self.frames[0].name}" if self.frames else "no views"
            raise InputError(f"{self.origin} holds {held}; a scene needs two or more")

    def __len__(self) -> int:
        return len(self.frames)

    def sample(self, indices: Iterable[int], size: tuple[int, int] | None = None) -> Views:
        """Load frames.

        Args:
            indices: Their numbers.
            size: Height and width: the largest middle part of that shape is cut out and resized. None: as they are.

        Raises:
            InputError: a file is missing or damaged, or, without `size`, the images differ in size.
        """
        indices = list(indices)
        if not indices or not all(-len(self) <= i < len(self) for i in indices):
            raise InputError(f"{self.origin} has frames 0 to {len(self) - 1}, asked for {indices}")
        frames = [self.frames[i] for i in indices]
        images, depths, masks, intrinsics = zip(*(_load(self, frame, size) for frame in frames), strict=True)
        if len({image.shape for image in images}) > 1:
            sizes = ", ".join(f"{f.name} {i.shape[2]}x{i.shape[1]}" for f, i in zip(frames, images, strict=True))
            raise InputError(f"{self.origin}: the images differ in size ({sizes}); name a size")
        depth, mask = torch.stack(depths), torch.stack(masks)
        poses = [frame.world_to_camera for frame in frames]
        return Views(
            tuple(frame.name for frame in frames), torch.stack(images), depth, (depth > 0) & mask, mask, _stack(intrinsics), _stack(poses)
        )


class Scenes(Sequence[Scene]):
    """The scenes of a data set, each read when it is asked for.

    Args:
        names: Their names.
        load: Reads one.
        test: The names of the published test split, or None where none is published.
        unused: Names that the published split keeps for validation: neither training nor test.
    """

    def __init__(
        self, names: Sequence[str], load: Callable[[str], Scene], test: Iterable[str] | None = None, unused: Iterable[str] = ()
    ) -> None:
        self.names, self._load = tuple(names), load
        self._test, self._unused = None if test is None else frozenset(test), frozenset(unused)

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Scene: ...
    @overload
    def __getitem__(self, index: slice) -> Scenes: ...
    def __getitem__(self, index: int | slice) -> Scene | Scenes:
        if isinstance(index, slice):
            return Scenes(self.names[index], self._load, self._test, self._unused)
        return self._load(self.names[index])

    def only(self, names: Iterable[str]) -> Scenes:
        """The scenes with these names, in the order of the data set.

        Raises:
            InputError: there is no scene of such a name.
        """
        wanted = set(names)
        if unknown := wanted - set(self.names):
            raise InputError(f"no scene {', '.join(sorted(unknown))}; there are {', '.join(self.names[:20])}")
        return Scenes([name for name in self.names if name in wanted], self._load, self._test, self._unused)

    def split(self, test: Iterable[str] | None = None) -> tuple[Scenes, Scenes]:
        """Training and test scenes, which share none.

        Args:
            test: The names of the test scenes; None: the published split.

        Raises:
            InputError: nothing is published for this data set, or there is no scene of such a name.
        """
        unused: frozenset[str] = frozenset()
        if test is None:
            if self._test is None:
                raise InputError("this data set has no published split; name the test scenes")
            test, unused = self._test & set(self.names), self._unused
        tests = self.only(test)
        return self.only(set(self.names) - set(tests.names) - unused), tests


def _load(scene: Scene, frame: Frame, size: tuple[int, int] | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    image = read_image(frame.image, posed=frame.intrinsics is not None) if isinstance(frame.image, Path) else frame.image
    source = (image.shape[1], image.shape[2])
    if frame.size is not None and source != frame.size:
        raise InputError(
            f"{_origin(scene, frame)} has {source[1]}x{source[0]} pixels, its camera is for {frame.size[1]}x{frame.size[0]}; "
            "use the images that the cameras were made for"
        )
    if frame.intrinsics is not None:
        check_camera(frame.intrinsics, source, _origin(scene, frame))
    fit = Fit.make(source, size)
    depth, mask = _map(scene, frame, frame.depth, source), _map(scene, frame, frame.mask, source)
    depth = image.new_zeros(fit.size) if depth is None else fit.nearest(depth).float()
    depth = torch.where(depth.isfinite() & (depth > 0), depth, 0.0)
    mask = image.new_ones(fit.size, dtype=torch.bool) if mask is None else fit.nearest(mask).bool()
    return fit.image(image), depth, mask, None if frame.intrinsics is None else fit.intrinsics(frame.intrinsics)


def _map(scene: Scene, frame: Frame, values: Lazy | None, source: tuple[int, int]) -> Tensor | None:
    """A depth map or mask, which must cover the image: have its shape, to a pixel."""
    values = values() if callable(values) else values
    if values is not None:
        height, width = values.shape
        if abs(width * source[0] - height * source[1]) > max(*source, height, width):
            raise InputError(f"{_origin(scene, frame)} has {source[1]}x{source[0]} pixels, its depth or mask {width}x{height}")
    return values


def _origin(scene: Scene, frame: Frame) -> str:
    return str(frame.image) if isinstance(frame.image, Path) else f"{scene.origin}, frame {frame.name}"


def _stack(parts: Sequence[Tensor | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.stack(known).float() if len(known) == len(parts) else None
