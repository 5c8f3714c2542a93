"""Timing, memory, CUDA graphs, the choice of the dense attention backend."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .records import Candidate

SLOW_S = 2.0  # from here on a run is repeated 3 times instead of 5 or more
GRAPH_LIMIT_S = 0.5  # of runs of 0.4 s launches are 1 percent (benchmarks/results), of longer ones nothing; a graph would hold memory
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
CLEARLY_FASTER = 0.95


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory(device: torch.device) -> None:
    """Free what is not referenced any more, and start counting the peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> tuple[int | None, int | None]:
    """Most bytes allocated and reserved since `release_memory`; None on the CPU."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, started on an idle device."""
    synchronize(device)
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure(call: Callable[[], Any], device: torch.device, min_runs: int = 5, quick: bool = False) -> Candidate:
    """Time `call` and take its peak memory. It must have run once before. `quick`: one run is enough if it is slow."""
    release_memory(device)
    warm = timed(call, device)
    peak_bytes, reserved_bytes = peak(device)
    if quick and warm > GRAPH_LIMIT_S:
        return Candidate(warm * 1e3, warm * 1e3, warm * 1e3, 1, peak_bytes, reserved_bytes)
    if warm < SLOW_S / 4:
        timed(call, device)
    runs = min(3, min_runs) if warm > SLOW_S else max(min_runs, min(20, int(0.5 / max(warm, 1e-4))))
    times = [timed(call, device) * 1e3 for _ in range(runs)]
    return Candidate(statistics.median(times), min(times), max(times), runs, peak_bytes, reserved_bytes)


def capture(call: Callable[[], Any], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture `call`, which reads and writes the same tensors in every call, into a CUDA graph. Returns its outputs too."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    release_memory(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph, outputs


def fastest_sdpa(q: Tensor, min_gain: float = CLEARLY_FASTER) -> tuple[str, dict[str, float | str]]:
    """The fastest dense attention backend for queries like `q [B, H, N, D]`, and the milliseconds of each.

    cuDNN wins unless another one is faster by more than 5 percent, so that noise does not change the choice.
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
    """Prefer the backend `name` for dense attention; where it cannot run, the others do."""
    if name == "default":
        yield
        return
    others = [backend for key, backend in BACKENDS.items() if key != name]
    with sdpa_kernel([BACKENDS[name], *others, SDPBackend.MATH], set_priority=True):
        yield


def short(error: BaseException, limit: int = 300) -> str:
    """The type and the beginning of the message of `error`."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:limit]}{'...' if len(text) > limit else ''}"
