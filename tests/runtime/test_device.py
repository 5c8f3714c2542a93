"""Time and memory of a device."""

from __future__ import annotations

import time

import torch

from lite3r_plugin.runtime.device import peak, release_memory, synchronize, timed

CPU = torch.device("cpu")


def test_the_cpu_is_timed_and_tells_no_memory() -> None:
    synchronize(CPU)
    release_memory(CPU)
    assert peak(CPU) == (None, None)
    assert 0.01 <= timed(lambda: time.sleep(0.01), CPU) < 5  # seconds, not milliseconds
