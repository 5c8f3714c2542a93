"""Which of PyTorch's backends runs dense attention: the fastest for the shape at hand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import short
from .device import timed

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
CLEARLY_FASTER = 0.95


def fastest_sdpa(q: Tensor, min_gain: float = CLEARLY_FASTER) -> tuple[str, dict[str, float | str]]:
    """The fastest dense attention backend.

    cuDNN wins unless another one is faster by more than 5 percent, so that noise does not change the choice.

    Args:
        q: Queries ``[B, H, N, D]`` of the shape, dtype and device at hand; they serve as keys and values too.
        min_gain: Share of cuDNN's time below which another backend is chosen.

    Returns:
        A name of `BACKENDS`, or ``"default"`` off the GPU and where none runs; and of each that was tried the milliseconds,
        or why it did not run.
    """
    if not q.is_cuda:
        return "default", {}
    times: dict[str, float | str] = {}
    for name, backend in BACKENDS.items():
        if name == "efficient" and any(isinstance(t, float) for t in times.values()):
            break  # never the fastest where one of the others runs
        try:
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(q, q, q)
                times[name] = min(timed(lambda: F.scaled_dot_product_attention(q, q, q), q.device) * 1e3 for _ in range(3))
        except RuntimeError as error:
            times[name] = short(error)
    ran = {name: t for name, t in times.items() if isinstance(t, float)}
    if not ran:
        return "default", times
    best = min(ran, key=ran.__getitem__)
    if "cudnn" in ran and ran[best] > min_gain * ran["cudnn"]:
        best = "cudnn"
    return best, times


@contextlib.contextmanager
def sdpa_backend(name: str) -> Iterator[None]:
    """Prefer the backend `name` of `BACKENDS` for dense attention inside the context; where it cannot run, the others do.

    ``"default"`` changes nothing.
    """
    if name == "default":
        yield
        return
    others = [backend for key, backend in BACKENDS.items() if key != name]
    with sdpa_kernel([BACKENDS[name], *others, SDPBackend.MATH], set_priority=True):
        yield
