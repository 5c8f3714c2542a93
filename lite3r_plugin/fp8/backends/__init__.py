"""What runs an FP8 Linear: one module for each backend, and which of them a machine has."""

from __future__ import annotations

from typing import get_args

import torch

from ...config import Fp8Backend
from ...errors import BackendError
from .base import Backend
from .emulated import Emulated
from .scaled_mm import ScaledMM
from .te import TransformerEngine
from .weight_only import WeightOnly

BACKENDS: dict[str, type[Backend]] = {backend.name: backend for backend in (ScaledMM, TransformerEngine, WeightOnly, Emulated)}
# The fastest first. TransformerEngine was slower than torch at every size measured (benchmarks/results): only an explicit wish gets it.
AUTO: tuple[Fp8Backend, ...] = ("scaled_mm", "weight_only", "emulated")


def why_not(backend: Fp8Backend, device: torch.device, inputs: int, outputs: int) -> str | None:
    """The reason why `backend` cannot run a Linear of this size on `device`, or None when it can. ``"auto"`` always can."""
    return None if backend == "auto" else BACKENDS[backend].why_not(device, inputs, outputs)


def choose(requested: Fp8Backend, device: torch.device, inputs: int, outputs: int) -> Fp8Backend:
    """`requested`, or for ``"auto"`` the fastest backend that can run a Linear ``inputs -> outputs`` on `device`.

    Raises:
        BackendError: the requested backend cannot run; it says why.
    """
    if requested == "auto":
        return next(backend for backend in AUTO if why_not(backend, device, inputs, outputs) is None)
    if (reason := why_not(requested, device, inputs, outputs)) is not None:
        raise BackendError(
            f'fp8_backend="{requested}" cannot run a Linear {inputs} -> {outputs} here: {reason}. Use fp8_backend="auto", which '
            f"chooses for each Linear, or one of {get_args(Fp8Backend)[1:]}"
        )
    return requested
