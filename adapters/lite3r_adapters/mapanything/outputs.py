"""What MapAnything returns, by what it means; the models that its factory wraps return the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lite3r_plugin.adapter import ModelOutputs, OutputsFunction, forward_parameters

from .sites import is_transformer


def outputs_of(model: nn.Module) -> OutputsFunction | None:
    """For a MapAnything with its heads, or a wrapper of its factory; by structure, so that forks under any module path are known too."""
    takes_views = list(forward_parameters(model) or ())[:1] == ["views"]
    heads = is_transformer(getattr(model, "info_sharing", None)) and isinstance(getattr(model, "dense_head", None), nn.Module)
    wraps = [name for name, _ in model.named_children()] == ["model"] and hasattr(model, "torch_hub_force_reload")
    return to_outputs if takes_views and (heads or wraps) else None


def to_outputs(output: Sequence[Mapping[str, Any]]) -> ModelOutputs:
    """From what its forward returns: of each view what the head of that model predicts, of which points in the world are always there."""

    def stacked(name: str) -> Tensor | None:
        return torch.stack([view[name] for view in output], 1) if name in output[0] else None

    points, local, quaternion, centre = (stacked(name) for name in ("pts3d", "pts3d_cam", "cam_quats", "cam_trans"))
    confidence, logits = stacked("conf"), stacked("non_ambiguous_mask_logits")
    scale = output[0].get("metric_scaling_factor")  # of the scene
    others = (None if confidence is None else confidence.log(), logits, None if scale is None else scale.log())
    return ModelOutputs(
        depth=None if local is None else local[..., 2],
        points=points,
        world_to_camera=None if quaternion is None or centre is None else world_to_camera(quaternion, centre),
        other=tuple(x for x in others if x is not None),
    )


def world_to_camera(quaternion: Tensor, centre: Tensor) -> Tensor:
    """``[..., 3, 4]`` of camera to world, as quaternions ``[..., 4]`` (x, y, z, w), of any length, and centres ``[..., 3]``."""
    vector, w = torch.nn.functional.normalize(quaternion, dim=-1).split((3, 1), -1)
    w, square = w[..., None], vector.square().sum(-1)[..., None, None]
    zero = torch.zeros_like(vector[..., 0])
    x, y, z = vector.unbind(-1)
    cross = torch.stack((zero, -z, y, z, zero, -x, -y, x, zero), -1).unflatten(-1, (3, 3))
    identity = torch.eye(3, dtype=vector.dtype, device=vector.device)
    turned = (w.square() - square) * identity + 2 * vector[..., :, None] * vector[..., None, :] - 2 * w * cross  # world to camera
    return torch.cat((turned, -(turned @ centre[..., None])), -1)
