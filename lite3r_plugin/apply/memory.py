"""`plan_memory`: what a forward is going to hold, before it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import NotAppliedError
from ..runtime.memory import MemoryPlan
from .lookup import look_up
from .swap import planner_of


def plan_memory(model: nn.Module, *args: Any, **kwargs: Any) -> MemoryPlan:
    """What ``model(*args, **kwargs)`` is going to hold, and in which chunks it is going to run; that forward uses the same plan.

    Nothing of that size runs: a forward of two views, where none was planned before, and others on tensors without data. Call it under
    the autocast of the forward.

    Args:
        model: A model with Lite3R and `max_memory`.
        *args, **kwargs: As of the forward.

    Returns:
        The plan; print it. Where `MemoryPlan.fits` is False the forward will raise `MemoryLimitError`.

    Raises:
        ModelTypeError: `model` is no `torch.nn.Module`.
        NotAppliedError: the model carries no Lite3R, or has no `max_memory`.
        InputError: the forward does not run on tensors without data, or an argument cannot be told from another by its value.

    Examples:
        >>> model = apply_lite3r(model, max_memory="8GB")
        >>> plan_memory(model, images).fits
        True
    """
    found = look_up(model)
    planner = planner_of(found.require_one_state("plan_memory"))
    if planner is None:
        raise NotAppliedError('this model has no limit to plan for: apply_lite3r(model, max_memory="8GB")')
    with torch.no_grad():
        return planner.plan(args, kwargs)
