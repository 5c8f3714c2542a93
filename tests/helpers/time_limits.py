"""How long a damaged input may take."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import pytest

LONGEST = 10.0  # seconds


@contextlib.contextmanager
def bounded(what: object) -> Iterator[None]:
    """Fails when the block takes longer than `LONGEST`."""

    def late(*_: object) -> None:
        pytest.fail(f"took more than {LONGEST} s: {what}")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LONGEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
