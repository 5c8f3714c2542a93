"""What Fast3R returns, by what it means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lite3r_plugin.adapter import ModelOutputs, OutputsFunction

from .sites import is_decoder


def outputs_of(model: nn.Module) -> OutputsFunction | None:
    """For a Fast3R with its heads; by structure, so that forks under any module path are known too."""
    known = is_decoder(getattr(model, "decoder", None)) and isinstance(getattr(model, "downstream_head", None), nn.Module)
    return to_outputs if known else None


def to_outputs(output: Sequence[Mapping[str, Tensor]] | tuple[Any, Any]) -> ModelOutputs:
    """From what its forward returns: of each view its points in the frame of the first and, where it has a second head, in its own.

    Confidences are above 1. Of views of different sizes all count alike, since they fit into no tensor.
    """
    views: Any = output[0] if isinstance(output, tuple) else output  # with notes of what took how long
    confidences = [[view[name].log() for view in views] for name in ("conf", "conf_local") if name in views[0]]
    points = [view["pts3d_in_other_view"] for view in views]
    local = [view["pts3d_local"] for view in views if "pts3d_local" in view]
    if any(x.shape != points[0].shape for x in points):
        return ModelOutputs(other=(*points, *local, *(x for of_head in confidences for x in of_head)))
    return ModelOutputs(
        depth=torch.stack(local, 1)[..., 2] if local else None,
        points=torch.stack(points, 1),
        other=tuple(torch.stack(of_head, 1) for of_head in confidences),
    )
