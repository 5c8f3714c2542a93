"""Timing a call often enough, and its memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from ..runtime.device import peak, release_memory, timed
from .records import Candidate

SLOW_S = 2.0  # from here on a run is repeated 3 times instead of 5 or more


def measure(call: Callable[[], Any], device: torch.device, repeats: int = 5) -> Candidate:
    """Time `call` and take its peak memory. It must have run once before.

    Args:
        call: What is measured, on `device`.
        device: A CUDA device or the CPU, of which no memory is told.
        repeats: Timed runs at least; 3 at most where one takes longer than `SLOW_S` seconds.
    """
    release_memory(device)
    warm = timed(call, device)
    peak_bytes, reserved_bytes = peak(device)
    if warm < SLOW_S / 4:
        timed(call, device)
    runs = min(3, repeats) if warm > SLOW_S else max(repeats, min(20, int(0.5 / max(warm, 1e-4))))
    times = [timed(call, device) * 1e3 for _ in range(runs)]
    return Candidate(statistics.median(times), min(times), max(times), runs, peak_bytes, reserved_bytes)
