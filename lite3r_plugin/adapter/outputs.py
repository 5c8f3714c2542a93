"""What a model returns, by what it means: what training compares with a teacher or with labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from ..errors import AdapterError


@dataclasses.dataclass(frozen=True)
class ModelOutputs:
    """The outputs of a reconstruction model for B scenes of S views each, or labels for them; None: there is no such thing.

    Floating-point tensors of any dtype on any device; those of a model with their gradients. Cameras are OpenCV's, as in
    `lite3r_plugin.scene.prediction`. Units are the model's own, or of labels any.

    Attributes:
        depth: ``[B, S, H, W]`` along the camera's z axis. In labels, not positive or not finite where unknown.
        points: ``[B, S, H, W, 3]`` in world coordinates; without `world_to_camera`, in the first camera's frame. In labels, not
            finite where unknown.
        world_to_camera: ``[B, S, 3, 4]``, rotation and translation. In labels, NaN where unknown.
        intrinsics: ``[B, S, 3, 3]`` in pixels. In labels, NaN where unknown.
        camera: ``[B, S, K]``, a raw encoding of cameras as the model predicts it. It is compared with a teacher's only.
        other: Anything else that is to stay as it is, such as logarithms of confidences, each ``[B, ...]``. Compared with a teacher's only.

    Raises:
        AdapterError: a field is no floating-point tensor, or shapes do not fit together; or there is nothing at all.
    """

    depth: Tensor | None = None
    points: Tensor | None = None
    world_to_camera: Tensor | None = None
    intrinsics: Tensor | None = None
    camera: Tensor | None = None
    other: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "other"}
        given = {name: value for name, value in given.items() if value is not None}
        if not isinstance(self.other, tuple):
            raise AdapterError(f"ModelOutputs.other is a tuple of tensors, got {type(self.other).__name__}")
        if not given and not self.other:
            raise AdapterError("ModelOutputs has nothing in it: give at least one of its fields")
        for name, value in [*given.items(), *(("other", x) for x in self.other)]:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                what = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
                raise AdapterError(f"ModelOutputs.{name} is a floating-point tensor, got {what}")
        forms = {"depth": "BSHW", "points": "BSHW3", "world_to_camera": "BS34", "intrinsics": "BS33", "camera": "BSK"}
        sizes: dict[str, int] = {}
        for name, value in given.items():
            fits = value.dim() == len(forms[name]) and all(
                size == (int(axis) if axis.isdigit() else sizes.setdefault(axis, size))
                for axis, size in zip(forms[name], value.shape, strict=True)
            )
            if not fits:
                known = ", ".join(f"{axis} = {size}" for axis, size in sizes.items())
                raise AdapterError(f"ModelOutputs.{name} is [{', '.join(forms[name])}] ({known}), got {list(value.shape)}")


OutputsFunction = Callable[[Any], ModelOutputs]
"""From what a model's forward returns to what it means."""


def tensors_of(output: Any) -> dict[str, Tensor]:
    """Every tensor in nested mappings, sequences and dataclasses by its path, such as ``['depth'][0]``, as it is.

    The path of an output that is a tensor itself is "". What is neither is left out.
    """
    return dict(_walk(output, ""))


def _walk(output: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield path, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _walk(value, f"{path}[{key!r}]")
    elif isinstance(output, (list, tuple)):
        for i, value in enumerate(output):
            yield from _walk(value, f"{path}[{i}]")
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from _walk(getattr(output, field.name), f"{path}.{field.name}")
