"""Times without waiting for Python, the peaks of the GPU at hand, and what a time is bound by."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU: times without a roofline
    triton = None


@dataclass(frozen=True)
class Work:
    """What a method does at least: `flops` of matrix products (a multiply-add is two), exponentials, bytes of memory moved once."""

    flops: float
    exps: float
    bytes: float


@dataclass(frozen=True)
class Peaks:
    """Measured, sustained: FLOP/s of BF16 matrix products, exponentials/s, bytes/s of a copy."""

    flops: float
    exps: float
    bytes: float

    def least_ms(self, work: Work) -> dict[str, float]:
        """Milliseconds that each unit needs for its part of `work`, were nothing else in its way."""
        return {
            "matmul": work.flops / self.flops * 1e3,
            "exp": work.exps / self.exps * 1e3,
            "memory": work.bytes / self.bytes * 1e3,
        }

    def bound(self, work: Work, ms: float, eager_ms: float) -> str:
        """The unit that needs longest, its share of the time; and `launches` where eager calls take a fifth longer."""
        unit, least = max(self.least_ms(work).items(), key=lambda item: item[1])
        return f"{unit} {100 * least / ms:.0f}%" + (", launches" if eager_ms > 1.2 * ms else "")


def queued_ms(call: Callable[[], object], device: torch.device, budget_ms: float = 150) -> float:
    """Median milliseconds of `call` in a queue, so that the GPU does not wait for Python unless Python is slower."""
    if device.type != "cuda":
        call()
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    call()
    once = _intervals(call, 1, device)[0]
    return statistics.median(_intervals(call, _repeats(once, budget_ms), device))


def in_turn_ms(
    first: Callable[[], Any], second: Callable[[Any], object], device: torch.device, budget_ms: float = 300
) -> tuple[float, float]:
    """Median milliseconds of `first`, and of `second` on its result, called in turn: both at the clock that the GPU then keeps."""
    if device.type != "cuda":
        second(first())
        start = time.perf_counter()
        result = first()
        middle = time.perf_counter()
        second(result)
        return (middle - start) * 1e3, (time.perf_counter() - middle) * 1e3
    results: list[Any] = []
    calls = itertools.cycle((lambda: results.append(first()), lambda: second(results.pop())))

    def call() -> None:
        next(calls)()

    once = sum(_intervals(call, 4, device)[2:])
    times = _intervals(call, 2 * _repeats(once, budget_ms), device)
    return statistics.median(times[::2]), statistics.median(times[1::2])


def _repeats(once_ms: float, budget_ms: float) -> int:
    return max(2, min(50, int(budget_ms / max(once_ms, 1e-3))))


def _intervals(call: Callable[[], object], count: int, device: torch.device) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    for event in events[:-1]:
        event.record()
        call()
    events[-1].record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def measure_peaks(device: torch.device) -> Peaks:
    """The peaks of a GPU, in about a tenth of a second."""
    size = 8192
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16).unbind(0)
    product = torch.empty_like(a)
    matmul_ms = queued_ms(lambda: torch.matmul(a, b, out=product), device, 40)
    source = torch.empty(1 << 30, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy_ms = queued_ms(lambda: target.copy_(source), device, 40)
    programs, rounds, block = 4096, 512, 1024
    out = torch.empty(programs * block, device=device)
    exp_ms = queued_ms(lambda: _exp_kernel[(programs,)](out, ROUNDS=rounds, BLOCK=block), device, 40)
    return Peaks(2 * size**3 / matmul_ms * 1e3, programs * rounds * block / exp_ms * 1e3, 2 * source.numel() / copy_ms * 1e3)


if triton is not None:

    @triton.jit
    def _exp_kernel(Out, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
        """Exponentials in registers, each of the one before."""
        lane = tl.arange(0, BLOCK)
        x = lane.to(tl.float32) / BLOCK
        for _ in range(ROUNDS):
            x = tl.exp2(-x)
        tl.store(Out + tl.program_id(0) * BLOCK + lane, x)
