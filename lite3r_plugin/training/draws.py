"""Random numbers that several forwards of a model draw alike, so that nothing but what is compared differs between them."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator

import torch

SEEDS = 2**32  # as many as NumPy takes


def new_seed() -> int:
    """A seed for `drawing`, drawn from torch's own numbers."""
    return int(torch.randint(SEEDS, (), device="cpu"))


@contextlib.contextmanager
def drawing(seed: int, device: torch.device) -> Iterator[None]:
    """Let the random numbers inside the context be those of `seed`; outside they go on as if nobody had drawn any.

    These are the global ones: torch's on the CPU and on `device`, Python's and NumPy's. What has a generator of its own is not reached.
    """
    cuda = device.type == "cuda"
    python, numpy = random.getstate(), sys.modules.get("numpy")
    others = None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng(devices=[device] if cuda else []):
        try:
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            if numpy is not None:
                numpy.random.seed(seed)
            if cuda:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(others)
