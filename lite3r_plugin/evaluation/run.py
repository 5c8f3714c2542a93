"""Running a model: on which device, in which dtype, how long, with how much memory, how dense."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapter.models import ModelEntry
from ..apply.lookup import lite3r_modules
from ..attention.module import SparseLinearAttention
from ..attention.state import CallCounts
from ..config import Lite3RConfig
from ..errors import AdapterError, InputError, plural, short
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
        torch.zeros(1, device=device).item()  # a device may be known, but hold nothing
    except Exception as error:  # whatever a backend that is not there raises
        raise InputError(f"the device {name[:40]!r} is not available ({short(error)}); try --device auto") from error
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
        AdapterError: `entry` predicts something else than a `Prediction`.
    """
    sites = [site for site in lite3r_modules(model).values() if site.sparse and site.enabled]
    before = [dataclasses.replace(site.calls) for site in sites]
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
    if not isinstance(predictions[0], Prediction):
        raise AdapterError(f"predict of the model {entry.name!r} returned {type(predictions[0]).__name__}, not a Prediction")
    return Run(predictions[0], tuple(times), read_peak(images.device), _density(sites, before))


def why_dense(density: float | None, config: Lite3RConfig, device: torch.device) -> str | None:
    """Why nothing was sparse in a run with Lite3R, as half a sentence; None where something was, and without Lite3R.

    Args:
        density: Of the run.
        config: Of the model.
        device: Where it ran.
    """
    if density != 1:
        return None
    ratios = config.keep_ratio.values() if isinstance(config.keep_ratio, Mapping) else [config.keep_ratio]
    if all(ratio == 1 for ratio in ratios):
        return "keep_ratio is 1, which leaves nothing out"
    if config.dense_below is not None:
        return f"with so few tokens nothing is left out at dense_below={config.dense_below}"
    if device.type != "cuda":
        return "without a CUDA GPU sparse attention does not pay (dense_below=0 runs it anyway)"
    return "with so few tokens sparse attention does not pay (dense_below=0 runs it anyway)"


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


def _density(sites: Sequence[SparseLinearAttention], before: Sequence[CallCounts]) -> float | None:
    """Mean density of the last call of `sites`, whose calls were counted `before`; 1 for each that ran dense."""
    now = [site.calls for site in sites]
    densities = [
        call.density if call.sparse > earlier.sparse and call.density is not None else 1.0
        for call, earlier in zip(now, before, strict=True)
    ]
    return statistics.fmean(densities) if densities else None


@contextlib.contextmanager
def _explained_memory_errors(images: Tensor) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error):
            raise InputError(
                f"{plural(len(images), 'view does', 'views do')} not fit into the memory of {images.device}; use fewer"
            ) from error
        raise
