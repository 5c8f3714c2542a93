"""How far a student is from its teacher, or from labels: functions of tensors.

Each is the mean over the batch of what it is for each scene (each row of the first dimension), so that scenes weigh the same however
they are dealt out to batches and processes. All are computed in FP32 (FP64 where both sides are), outside of autocast, and keep nothing
for the backward pass but what they are given, if that is large: the rest is computed again there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ..adapter.outputs import ModelOutputs
from ..errors import AdapterError, InputError
from ..scene.geometry import relative_to_first, unproject
from .config import AttentionLoss

GEOMETRY = ("depth", "points", "world_to_camera", "intrinsics")
TINY = 1e-12
SMALL = 2**16  # numbers


def weight_at(start: float, end: float, progress: float) -> float:
    """A weight at a share `progress` of a run, in [0, 1]: it is led from `start` to `end` by half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


def feature_loss(student: Tensor, teacher: Tensor, kind: AttentionLoss = "normalized") -> Tensor:
    """How far features ``[B, ..., C]`` are from the teacher's of the same shape, a scalar.

    Args:
        student, teacher: The features; gradients go to the student's.
        kind: ``"normalized"``: |s - t|^2 / |t|^2 of each row; ``"mse"``: the mean square of s - t; ``"cosine"``: one minus the cosine of
            the two vectors of each token.

    Raises:
        AdapterError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise AdapterError(f"features of the student are {list(student.shape)} and of the teacher {list(teacher.shape)}")
    if kind == "normalized":
        return cast("Tensor", _Normalized.apply(student, teacher.detach()))
    return in_full(_mse if kind == "mse" else _cosine, student, teacher.detach())


def in_full(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``function(*tensors)`` in FP32 outside of autocast; for the backward pass only `tensors` are kept, and it is computed again.

    Of small tensors the rest is kept, which is faster than to compute it again.
    """

    def compute(*tensors: Tensor) -> Tensor:
        with torch.autocast(tensors[0].device.type, enabled=False):
            return function(*(x if x.dtype == torch.float64 else x.float() for x in tensors))

    small = max(x.numel() for x in tensors) <= SMALL
    if small or not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors):
        return compute(*tensors)
    return checkpoint(compute, *tensors, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]


def prediction_losses(student: ModelOutputs, teacher: ModelOutputs) -> dict[str, Tensor]:
    """Differences of what both have, by name. Both speak of one world, so nothing is aligned and a change of scale counts.

    Returns:
        Scalars: ``depth``, the mean of |log s - log t| over pixels; ``points``, the mean over points of the L1 norm of the difference
        of their signed logarithms; ``rotation``, the mean Frobenius norm of the difference of rotation matrices; ``translation``, the
        mean norm of the difference of translations; ``focal``, the mean of |log s - log t| of focal lengths; ``camera``, the mean
        absolute difference of raw encodings; ``other``, the mean of normalised squared errors. Lengths are in units of the teacher's
        scene: of its mean depth, or of the spread of its points or cameras. What the teacher does not know does not count; where it knows
        nothing at all, they are NaN.

    Raises:
        AdapterError: shapes differ, or the two have nothing in common.
    """
    losses = _geometry_losses(student, teacher, scene_scale(teacher))
    if losses:  # a teacher that gives nothing but NaN is no perfect one
        given = (teacher.depth, teacher.points, teacher.world_to_camera, teacher.intrinsics)
        sound = torch.stack([x.isfinite().any() for x in given if x is not None]).all()
        losses = {name: torch.where(sound, loss, torch.nan) for name, loss in losses.items()}
    if student.camera is not None and teacher.camera is not None:
        losses["camera"] = in_full(lambda s, t: (s - t).abs().mean(), student.camera, _same_shape("camera", student.camera, teacher.camera))
    if student.other or teacher.other:
        if len(student.other) != len(teacher.other):
            raise AdapterError(f"ModelOutputs.other holds {len(student.other)} tensors of the student, {len(teacher.other)} of the teacher")
        others = [feature_loss(s, t) for s, t in zip(student.other, teacher.other, strict=True) if s.numel() or t.numel()]
        if others:
            losses["other"] = torch.stack(others).mean()
    if not losses:
        raise AdapterError("the outputs of student and teacher have nothing in common that could be compared")
    return losses


def label_losses(predicted: ModelOutputs, labels: ModelOutputs) -> dict[str, Tensor]:
    """The same against labels: the part of the loss that distillation calls the task.

    Poses and points of both are made relative to their first view (those without poses are in that frame already), and the labels of a
    scene are divided by one scale, which brings their depth nearest to the predicted one (points or baselines, where there is no depth).
    No gradient goes through it. Where labels have depth and cameras but no points, points are made from these.

    Returns:
        Scalars, as `prediction_losses` without ``camera`` and ``other``; what is not labelled or not predicted has none.

    Raises:
        InputError: nothing is labelled that the model predicts, or no label is valid.
        AdapterError: shapes differ.
    """
    both = [name for name in GEOMETRY if getattr(predicted, name) is not None and getattr(labels, name) is not None]
    if not {"depth", "points", "world_to_camera"} & set(both):
        raise InputError("the labels have nothing that the model predicts: give depth, points or world_to_camera")
    for name in both:
        _same_shape(name, getattr(predicted, name), getattr(labels, name))
    with torch.no_grad():
        target = _in_first_frame(labels)
        if target.points is None and target.depth is not None and target.world_to_camera is not None and target.intrinsics is not None:
            points = unproject(target.depth, target.world_to_camera, target.intrinsics)
            points = torch.where((target.depth > 0)[..., None] & points.isfinite(), points, torch.nan)
            target = dataclasses.replace(target, points=points)
    mine = _in_first_frame(predicted)
    with torch.no_grad():
        target = _divided(target, _relative_scale(target, mine))
    return _geometry_losses(mine, target, scene_scale(target))


def tensor_losses(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For outputs of which nobody says what they mean: ``other``, the mean of the normalised errors of all floating-point tensors.

    Tensors whose shape depends on what was found, such as lists of matches, are left out where the two found different things, and
    those in which nothing is, such as tracks of no points.

    Args:
        student, teacher: Tensors by path (`lite3r_plugin.adapter.outputs.tensors_of`).

    Raises:
        AdapterError: the two are not made alike, or have no tensor to compare.
    """
    if student.keys() != teacher.keys():
        raise AdapterError(
            f"the outputs of student and teacher are not made alike: {sorted(student.keys() ^ teacher.keys())[:3]} are in one of the two "
            "only; pass outputs=, a function from the output to ModelOutputs"
        )
    same = [path for path, tensor in student.items() if tensor.shape == teacher[path].shape and tensor.numel()]
    if not same:
        raise AdapterError(
            "the model returns no floating-point tensor that could be compared; pass outputs=, a function from its output to ModelOutputs"
        )
    return {"other": torch.stack([feature_loss(student[path], teacher[path]) for path in same]).mean()}


@torch.no_grad()
def scene_scale(outputs: ModelOutputs) -> Tensor:
    """The size of each scene ``[B]``: its mean known depth, or the spread of its points or cameras, or 1 where there are none."""
    if outputs.depth is not None:
        scale = _mean(outputs.depth.float(), outputs.depth.isfinite() & (outputs.depth > 0))
    elif outputs.points is not None:
        scale = _spread(outputs.points.float().flatten(1, -2))
    elif outputs.world_to_camera is not None:
        rotation, translation = outputs.world_to_camera.float().split((3, 1), -1)
        scale = _spread((-rotation.mT @ translation)[..., 0])
    else:  # nothing that has a size
        scale = torch.zeros((), device=next(x.device for x in (outputs.intrinsics, outputs.camera, *outputs.other) if x is not None))
    return torch.where(scale > 0, scale, 1)


class _Normalized(torch.autograd.Function):
    """|s - t|^2 / |t|^2 of each row of ``[B, ...]``, its mean, where t is finite; NaN where it is so nowhere in a row.

    With its gradient written out: it is asked of each block in each step, where one operator counts less on a GPU than the many calls
    of what records and recomputes its parts.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        difference, known = _difference(student, teacher)
        rows = _rows(difference)
        power = torch.linalg.vector_norm(torch.where(known, teacher, 0).to(difference.dtype), dim=rows).square().clamp(min=TINY)
        error = torch.linalg.vector_norm(difference, dim=rows).square()
        ctx.save_for_backward(student, teacher, power)
        return torch.where(known.any(rows) if rows else known, error / power, torch.nan).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        student, teacher, power = ctx.saved_tensors
        difference, _ = _difference(student, teacher)
        scale = 2 * gradient / (power * power.numel())
        return (difference * scale[(..., *[None] * (difference.dim() - power.dim()))]).to(student.dtype), None


def _difference(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """s - t in FP32, or FP64 where one of them is, 0 where t is not finite; and where it is."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    known = teacher.isfinite()
    return torch.where(known, student.to(dtype) - teacher, 0), known


def _rows(x: Tensor) -> tuple[int, ...]:
    """The dimensions of a row: all but the first, or the only one."""
    return tuple(range(min(1, x.dim() - 1), x.dim()))


def _mse(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().mean()


def _cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return (1 - torch.nn.functional.cosine_similarity(student, teacher, dim=-1)).mean()


def _geometry_losses(student: ModelOutputs, teacher: ModelOutputs, scale: Tensor) -> dict[str, Tensor]:
    """Losses of depth, points and cameras; lengths in units of `scale` ``[B]``."""
    losses: dict[str, Tensor] = {}
    if student.depth is not None and teacher.depth is not None:
        losses["depth"] = in_full(_depth, student.depth, _same_shape("depth", student.depth, teacher.depth))
    if student.points is not None and teacher.points is not None:
        losses["points"] = in_full(_points, student.points, _same_shape("points", student.points, teacher.points), scale)
    if student.world_to_camera is not None and teacher.world_to_camera is not None:
        pair = student.world_to_camera, _same_shape("world_to_camera", student.world_to_camera, teacher.world_to_camera)
        losses["rotation"] = in_full(_rotation, *pair)
        losses["translation"] = in_full(_translation, *pair, scale)
    if student.intrinsics is not None and teacher.intrinsics is not None:
        losses["focal"] = in_full(_focal, student.intrinsics, _same_shape("intrinsics", student.intrinsics, teacher.intrinsics))
    return losses


def _same_shape(name: str, student: Tensor, teacher: Tensor) -> Tensor:
    """`teacher`, detached. Raises `AdapterError` unless it is of the shape of `student`."""
    if student.shape != teacher.shape:
        raise AdapterError(f"{name} of the model is {list(student.shape)}, and what it is compared with is {list(teacher.shape)}")
    return teacher.detach()


def _depth(student: Tensor, teacher: Tensor) -> Tensor:
    known = teacher.isfinite() & (teacher > 0)
    error = student.clamp(min=TINY).log() - torch.where(known, teacher, 1).log()
    return _mean(error.abs(), known).mean()


def _points(student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
    known = teacher.isfinite().all(-1)
    scale = scale[:, None, None, None, None]
    error = _signed_log(student / scale) - _signed_log(torch.where(known[..., None], teacher, 0) / scale)
    return _mean(error.abs().sum(-1), known).mean()


def _rotation(student: Tensor, teacher: Tensor) -> Tensor:
    known = teacher.isfinite().all((-1, -2))
    return _mean(_norm((student - _filled(teacher, known))[..., :3].flatten(-2)), known).mean()


def _translation(student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
    known = teacher.isfinite().all((-1, -2))
    return _mean(_norm((student - _filled(teacher, known))[..., 3] / scale[:, None, None]), known).mean()


def _focal(student: Tensor, teacher: Tensor) -> Tensor:
    known = teacher.isfinite().all((-1, -2))
    mine, true = (x.diagonal(dim1=-2, dim2=-1)[..., :2].clamp(min=TINY).log() for x in (student, _filled(teacher, known, 1.0)))
    return _mean((mine - true).abs().mean(-1), known).mean()


def _filled(x: Tensor, known: Tensor, value: float = 0.0) -> Tensor:
    """Matrices `x` ``[B, S, ., .]`` with `value` where they are not `known` ``[B, S]``."""
    return torch.where(known[..., None, None], x, value)


def _mean(value: Tensor, mask: Tensor) -> Tensor:
    """Means ``[B]`` of `value` ``[B, ...]`` where `mask`; 0 where nothing is."""
    value, mask = value.flatten(1), mask.flatten(1)
    return torch.where(mask, value, 0).sum(1) / mask.sum(1).clamp(min=1)


def _norm(x: Tensor) -> Tensor:
    """The Euclidean norm over the last dimension, with a gradient, zero, where it is zero."""
    return (x.square().sum(-1) + TINY).sqrt() - TINY**0.5


def _signed_log(x: Tensor) -> Tensor:
    return x.sign() * x.abs().log1p()


def _spread(points: Tensor) -> Tensor:
    """Mean distance ``[B]`` of points ``[B, N, 3]`` from their mean, of the finite ones."""
    known = points.isfinite().all(-1)
    points = torch.where(known[..., None], points, 0)
    centre = points.sum(1, keepdim=True) / known.sum(1)[:, None, None].clamp(min=1)
    return _mean((points - centre).norm(dim=-1), known)


def _geometry(outputs: ModelOutputs) -> ModelOutputs:
    """The geometry of `outputs` alone, in FP32."""
    depth, points, pose, intrinsics = (None if x is None else x.float() for x in (getattr(outputs, name) for name in GEOMETRY))
    return ModelOutputs(depth, points, pose, intrinsics)


def _in_first_frame(outputs: ModelOutputs) -> ModelOutputs:
    """The geometry of `outputs` in FP32, in the frame of each scene's first camera."""
    outputs = _geometry(outputs)
    pose, points = outputs.world_to_camera, outputs.points
    if pose is None:
        return outputs
    if points is not None:
        first = pose[:, 0, None, None, None]  # [B, 1, 1, 1, 3, 4]
        points = points[..., None, 0] * first[..., 0] + points[..., None, 1] * first[..., 1] + points[..., None, 2] * first[..., 2]
        points = points + first[..., 3]
    return dataclasses.replace(outputs, points=points, world_to_camera=relative_to_first(pose))


def _relative_scale(labels: ModelOutputs, predicted: ModelOutputs) -> Tensor:
    """By what the labels of each scene are larger than what is predicted, ``[B]``: the median over pixels, or over baselines."""
    ratios = []
    if labels.depth is not None and predicted.depth is not None:
        ratios.append(labels.depth / predicted.depth)
    if labels.points is not None and predicted.points is not None:
        ratios.append(labels.points.norm(dim=-1) / predicted.points.norm(dim=-1))
    if labels.world_to_camera is not None and predicted.world_to_camera is not None:
        ratios.append(labels.world_to_camera[:, 1:, :, 3].norm(dim=-1) / predicted.world_to_camera[:, 1:, :, 3].norm(dim=-1))
    ratio = next((x for x in ratios if (x.isfinite() & (x > 0)).any()), None)
    if ratio is None:
        raise InputError("no label is valid: depth is not positive, or poses or points are not finite, everywhere in these scenes")
    ratio = ratio.flatten(1)
    known = ratio.isfinite() & (ratio > 0)
    ordered, count = torch.where(known, ratio, torch.inf).sort(1).values, known.sum(1, keepdim=True)
    return torch.where(count > 0, ordered.gather(1, (count - 1).clamp(min=0) // 2), 1)[:, 0]


def _divided(labels: ModelOutputs, scale: Tensor) -> ModelOutputs:
    """`labels` with all lengths divided by `scale` ``[B]``."""
    depth = None if labels.depth is None else labels.depth / scale[:, None, None, None]
    points = None if labels.points is None else labels.points / scale[:, None, None, None, None]
    pose = labels.world_to_camera
    if pose is not None:
        pose = torch.cat((pose[..., :3], pose[..., 3:] / scale[:, None, None, None]), -1)
    return dataclasses.replace(labels, depth=depth, points=points, world_to_camera=pose)
