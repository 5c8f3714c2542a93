"""Running a model: on which device, in which dtype, how long, with how much memory, how dense."""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapter.models import ModelEntry
from ..apply.lookup import lite3r_modules
from ..errors import InputError
from ..runtime.device import synchronize
from ..scene.prediction import Prediction

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Run:
    """A timed run of a model.

    Attributes:
        prediction: What it predicted in the last run.
        times: Seconds of each timed run.
        peak_bytes: Most memory in use meanwhile, weights included: on the CPU of the process, on a GPU of its tensors;
            None where the system does not tell.
        density: Share of the score blocks computed exactly at the sites that may be sparse; None without Lite3R.
    """

    prediction: Prediction
    times: tuple[float, ...]
    peak_bytes: int | None
    density: float | None

    @property
    def seconds(self) -> float:
        """Median time of a run."""
        return statistics.median(self.times)


def choose_device(name: str) -> torch.device:
    """The device called `name` (``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...); ``"auto"`` is the GPU if there is one.

    Raises:
        InputError: it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"the device {name!r} is not available ({str(error).splitlines()[0]}); try --device auto") from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of `DTYPES` called `name`; ``"auto"`` is bfloat16 on a GPU, else float32.

    Raises:
        InputError: there is none of that name.
    """
    if name not in DTYPES:
        raise InputError(f"unknown dtype {name!r}; choose one of {', '.join(DTYPES)}")
    return DTYPES[name] or (torch.bfloat16 if device.type == "cuda" else torch.float32)


def run_model(entry: ModelEntry, model: nn.Module, images: Tensor, dtype: torch.dtype, repeats: int = 1, warm_up: bool = False) -> Run:
    """Predict from `images` ``[S, 3, H, W]`` under autocast to `dtype` (weights stay FP32), timed.

    Args:
        entry, model: The model and how to run it.
        images: As ``entry.inputs`` makes them, on the model's device.
        dtype: Of the computation; FP32 means no autocast.
        repeats: Timed runs, of which the median counts.
        warm_up: Run once more before, untimed.

    Raises:
        InputError: the memory does not suffice.
    """
    autocast = torch.autocast(images.device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
    predictions, times = [], []
    with quiet(), torch.no_grad(), autocast, _explained_memory_errors(images):
        if warm_up:
            entry.predict(model, images)
        start_peak(images.device)
        for _ in range(repeats):
            synchronize(images.device)
            start = time.perf_counter()
            predictions[:] = [entry.predict(model, images)]
            synchronize(images.device)
            times.append(time.perf_counter() - start)
    return Run(predictions[0], tuple(times), read_peak(images.device), _density(model))


def merge(runs: Sequence[Run]) -> Run:
    """Several runs of the same thing as one: all times, the highest peak, the last prediction."""
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    times = tuple(t for run in runs for t in run.times)
    return Run(runs[-1].prediction, times, max(peaks, default=None), runs[-1].density)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what model libraries print on standard output off the screen."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def start_peak(device: torch.device) -> None:
    """Start counting the peak memory anew."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def read_peak(device: torch.device) -> int | None:
    """Peak memory in bytes since `start_peak`; None where the system does not tell (only Linux does on the CPU)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    status = Path("/proc/self/status").read_text()
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), None)


def _density(model: nn.Module) -> float | None:
    calls = [site.calls for site in lite3r_modules(model).values() if site.sparse and site.enabled]
    densities = [call.density if call.sparse and call.density is not None else 1.0 for call in calls]
    return statistics.fmean(densities) if densities else None


@contextlib.contextmanager
def _explained_memory_errors(images: Tensor) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error):
            raise InputError(f"{len(images)} views do not fit into the memory of {images.device}; use fewer") from error
        raise
