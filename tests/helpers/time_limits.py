"""How long a damaged input may take, on a machine that others use, too."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator

import pytest

LONGEST = 10.0  # seconds of this process
LONGEST_ASLEEP = 60.0  # seconds in all, such as of waiting for what never comes


@contextlib.contextmanager
def bounded(what: object) -> Iterator[None]:
    """Fails when the block computes for longer than `LONGEST`, or takes longer than `LONGEST_ASLEEP`."""
    started, computed = time.monotonic(), time.process_time()

    def late(*_: object) -> None:
        if time.process_time() - computed > LONGEST or time.monotonic() - started > LONGEST_ASLEEP:
            pytest.fail(f"took more than {LONGEST} s: {what}")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LONGEST, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
