"""CUDA graphs: a forward recorded once for each layout of its inputs, and replayed without launching its kernels one by one.

`Graphs` holds the recordings of one model. It may be called as one calls the model: inputs are copied in, outputs are the caller's own, a
recording of a model that has changed since is dropped, and what cannot be recorded runs as before and is said once.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import traceback
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from ..errors import InputError, short
from ..ops.dispatch import SlowPathWarning
from .device import timed
from .values import exchanged, layout_of, tensors_in
from .watch import Watch, watched_by_others

IN_TURN = threading.RLock()
"""Held by whoever records, or changes settings of the process for the time of a forward: one thread at a time."""

LONGEST_S = 0.5  # of runs of 0.4 s launches are 1 percent (benchmarks/results), of longer ones nothing; a graph would hold memory
MOST_REMEMBERED = 256  # layouts that were refused, or that were seen once

Run = Callable[..., Any]


@functools.cache
def stream_of(device: int) -> torch.cuda.Stream:
    """The stream that everything is warmed up and captured on. Graphs share the memory of a pool where they were captured on the same
    stream, and cuBLAS keeps 32 MiB and more for each stream that it ever ran on."""
    return torch.cuda.Stream(device)


def capture(call: Callable[[], Any], device: torch.device, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture a call into a CUDA graph. It must have run before, on a side stream too (`warm_up`).

    Args:
        call: Reads and writes the same tensors in every call, and never waits for the GPU.
        device: A CUDA device.
        pool: Of memory, from `torch.cuda.graph_pool_handle`; its own by default.

    Returns:
        The graph, and the outputs of `call`, which every ``graph.replay()`` writes.

    Raises:
        Exception: whatever `call` raises; a `RuntimeError` where something inside cannot be captured.
    """
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    graph = torch.cuda.CUDAGraph()
    with IN_TURN, torch.cuda.device(device):
        stream = stream_of(torch.cuda.current_device())  # torch's own is of the GPU that captured first
        try:
            # Other threads may allocate and synchronise meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                outputs = call()
        except BaseException:
            _recover(device, pool, stream)
            raise
    return graph, outputs


def warm_up(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Run `call` twice on a side stream, as `torch.cuda.graphs` asks for before a capture.

    Returns:
        The seconds and the outputs of the second time.
    """
    with torch.cuda.device(device):
        stream = stream_of(torch.cuda.current_device())
    current = torch.cuda.current_stream(device)
    stream.wait_stream(current)
    outputs: list[Any] = []
    with torch.cuda.stream(stream):
        call()
        seconds = timed(lambda: outputs.append(call()), device)
    current.wait_stream(stream)
    for x in tensors_in(outputs):
        if x.is_cuda:
            x.record_stream(current)  # of the caller, whose work may outlast the tensor
    torch.cuda.empty_cache()  # what is kept for the side stream serves no other: the next forward would take it anew
    return seconds, outputs.pop()


def _recover(device: torch.device, pool: Any, stream: torch.cuda.Stream) -> None:
    """After a capture that failed: let the allocator serve everybody again, and the generator of random numbers."""
    index = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):  # where the capture could be ended, this has been done
        torch._C._cuda_endAllocateToPool(index, pool)  # pyright: ignore[reportAttributeAccessIssue]
        torch._C._cuda_releasePool(index, pool)  # pyright: ignore[reportAttributeAccessIssue]
    # The GPU's generator of random numbers stays in a capture that failed, and refuses every later call; one that succeeds frees it.
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        torch.zeros(1, device=device)


class Recorder(Protocol):
    """What records forwards and replays them."""

    def why_not(self, device: torch.device) -> str | None:
        """Why nothing can be recorded for tensors on `device`; None where it can."""
        ...

    def warm_up(self, call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
        """Run `call` as often as is needed before it is recorded. Returns the seconds that it takes, and its outputs."""
        ...

    def record(self, call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], object], Any]:
        """Record `call`. Returns what replays it, and the outputs, which every replay writes. Raises where it cannot be recorded."""
        ...

    def in_turn(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Replays and what reads and writes their tensors come one after the other, from whatever stream."""
        ...

    def held_bytes(self) -> int:
        """Bytes of memory that the recordings hold."""
        ...

    def release(self) -> None:
        """Called when no recording is left."""
        ...


class CudaGraphs:
    """Records by `capture`, all into one pool of memory; after one that failed into another, since nobody knows what became of that."""

    def __init__(self) -> None:
        self._pools: list[Any] = []
        self._pool: Any = None
        self._done: torch.cuda.Event | None = None

    def why_not(self, device: torch.device) -> str | None:
        """They are of CUDA devices."""
        return None if device.type == "cuda" else f"the inputs are on {device}, and CUDA graphs are for CUDA devices"

    def warm_up(self, call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
        """See `warm_up`."""
        return warm_up(call, device)

    def record(self, call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], object], Any]:
        """See `capture`."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._pools.append(self._pool)
        try:
            graph, outputs = capture(call, device, self._pool)
        except BaseException:
            self._pool = None
            raise
        return graph.replay, outputs

    @contextlib.contextmanager
    def in_turn(self, device: torch.device) -> Iterator[None]:
        """All recordings share memory, so the current stream waits for the last use."""
        stream = torch.cuda.current_stream(device)
        if self._done is not None:
            stream.wait_event(self._done)
        try:
            yield
        finally:
            self._done = self._done or torch.cuda.Event()
            self._done.record(stream)

    def held_bytes(self) -> int:
        """What the allocator keeps for the pools."""
        pools = set(map(tuple, self._pools))
        segments = torch.cuda.memory_snapshot() if pools else ()
        return sum(segment["total_size"] for segment in segments if tuple(segment.get("segment_pool_id", ())) in pools)

    def release(self) -> None:
        """A pool that nobody uses cannot be used again. What comes may be on another GPU."""
        if self._done is not None:
            self._done.synchronize()
        self._pools = []
        self._pool = self._done = None


@dataclass
class Recording:
    """One forward.

    Attributes:
        replay: Runs it.
        inputs: The tensors that it reads its arguments from.
        outputs: What it returns, written by each replay.
        replays: How often it ran.
    """

    replay: Callable[[], object]
    inputs: list[Tensor]
    outputs: Any
    replays: int = 0


class Graphs:
    """The recorded forwards of one model, those used last, and what runs in their place where there are none.

    A layout of inputs is recorded when it first comes; once `most` are there, when it comes a second time, so that a model whose inputs
    never come twice does not record each of them. Which arguments were given, the settings of torch that choose kernels (autocast,
    gradients, backends) and the device belong to the layout. Copies of this, also pickled ones, start empty.

    Args:
        most: How many recordings are kept at most.
        recorder: What records; CUDA graphs by default.
    """

    def __init__(self, most: int, recorder: Callable[[], Recorder] = CudaGraphs) -> None:
        self.most, self._make = most, recorder
        self._recorder = recorder()
        self._lock = threading.RLock()
        self._recordings: OrderedDict[Hashable, Recording] = OrderedDict()
        self._watch: Watch | None = None
        self._refused: OrderedDict[Hashable, None] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._warned: set[str] = set()
        self.passed: Counter[str] = Counter()
        self.forgotten = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, (self.most, self._make)

    def __len__(self) -> int:
        return len(self._recordings)

    @property
    def replays(self) -> int:
        """How often the recordings that are there were replayed."""
        return sum(recording.replays for recording in self._recordings.values())

    @property
    def held_bytes(self) -> int:
        """Bytes of memory that the recordings hold, inputs included."""
        return self._recorder.held_bytes() + sum(x.nbytes for recording in self._recordings.values() for x in recording.inputs)

    def forget(self) -> None:
        """Drop all recordings and their memory."""
        with self._lock:
            if self._recordings:
                self._recorder.release()
            self._recordings.clear()
            self._refused.clear()
            self._seen.clear()
            self._watch = None

    def pass_by(self, reason: str, *, warn: bool = True) -> None:
        """Take note that a forward ran as before, and why; `warn` of it the first time."""
        self.passed[reason] += 1
        if warn and reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"Lite3R: no CUDA graph, so every kernel is launched by itself: {reason}", SlowPathWarning, stacklevel=2)

    def call(self, model: nn.Module, run: Run, own_hooks: Iterable[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``run(*args, **kwargs)`` returns, from a recording where there is one or can be one.

        Args:
            model: The model, which must be as it was when its forward was recorded, but for the values of its tensors.
            run: Its forward.
            own_hooks: Hooks inside of the model that need not run in a replay.
            args, kwargs: Its arguments.
        """
        given = tensors_in((args, kwargs))
        devices = {x.device for x in given}
        if len(devices) != 1:
            places = " and ".join(sorted(map(str, devices))) or "no device"
            self.pass_by(f"the arguments are on {places}: give them all on that of the model")
            return run(*args, **kwargs)
        (device,) = devices
        if (reason := self._recorder.why_not(device)) is not None:
            self.pass_by(reason, warn=False)
            return run(*args, **kwargs)
        try:
            key = layout_of((args, kwargs)), _settings(device)
            hash(key)
        except (InputError, TypeError) as error:
            self.pass_by(f"{error}, by which recordings cannot be told apart")
            return run(*args, **kwargs)
        with self._lock:
            if (outputs := self._replayed(key, given, device)) is not None:
                return outputs[0]
            if not self._is_wanted(key):
                return run(*args, **kwargs)
            if (reason := watched_by_others(model, own_hooks)) is not None:
                self.pass_by(reason)
                return run(*args, **kwargs)
            outputs = self._record(key, model, run, args, kwargs, device)
            if key in self._recordings:
                return self._replay(self._recordings[key], given, device)
            return run(*args, **kwargs) if outputs is None else outputs[0]

    def _replayed(self, key: Hashable, given: list[Tensor], device: torch.device) -> tuple[Any] | None:
        """The outputs of a recording that is there and holds; drops all of a model that has changed."""
        if self._watch is None:
            return None
        recording = self._recordings.get(key)
        # Whether the memory is there that the recording reads, is asked before; the rest while the GPU is at work.
        if self._watch.in_place():
            outputs = None if recording is None else (self._replay(recording, given, device),)
            if self._watch.unchanged():
                if recording is not None:
                    self._recordings.move_to_end(key)
                return outputs
        self.forget()
        self.forgotten += 1
        return None

    def _replay(self, recording: Recording, given: list[Tensor], device: torch.device) -> Any:
        own = {id(static): x for static, x in zip(recording.inputs, given, strict=True)}  # an output may be an input

        def copied(x: Tensor) -> Tensor:
            if id(x) not in own:
                own[id(x)] = x.clone()
            return own[id(x)]

        with self._recorder.in_turn(device):
            with torch.no_grad():
                for static, x in zip(recording.inputs, given, strict=True):
                    static.copy_(x, non_blocking=True)
            recording.replay()
            recording.replays += 1
            return exchanged(recording.outputs, copied)

    def _is_wanted(self, key: Hashable) -> bool:
        if key in self._refused:
            return False
        if len(self._recordings) < self.most or key in self._seen:
            return True
        _remember(self._seen, key)
        self.pass_by("another layout of inputs was new, and there is no room: it is recorded when it comes again", warn=False)
        return False

    def _record(
        self, key: Hashable, model: nn.Module, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
    ) -> tuple[Any] | None:
        """Record a forward, if that can be and has a point. Of a long one, which has none, there are the outputs already."""
        inputs: list[Tensor] = []
        given: dict[int, Tensor] = {}  # what the caller has, by what was made of it

        def take(x: Tensor) -> Tensor:
            inputs.append(torch.empty_like(x, requires_grad=False).copy_(x))
            given[id(inputs[-1])] = x
            return inputs[-1]

        with torch.inference_mode(False), torch.no_grad():
            own_args, own_kwargs = exchanged((args, kwargs), take)

        def call() -> Any:
            return run(*own_args, **own_kwargs)

        with IN_TURN, _no_autocast_cache(device):
            seconds, outputs = self._recorder.warm_up(call, device)
            if seconds > LONGEST_S:
                self._refuse(key, f"one forward takes {seconds:.2g} s, so launches do not matter", warn=False)
                return (exchanged(outputs, lambda x: given.get(id(x), x)),)
            del outputs
            while len(self._recordings) >= self.most:
                self._drop_oldest()
            try:
                replay, outputs = self._recorder.record(call, device)
                exchanged(outputs, lambda x: x, _refuse_opaque)
            except Exception as error:  # what the host does in a forward may be anything
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    self.forget()
                self._refuse(key, _why_not_recorded(error))
                return None
        self._watch = self._watch or Watch(model)
        self._recordings[key] = Recording(replay, inputs, outputs)
        self._seen.pop(key, None)
        return None

    def _refuse(self, key: Hashable, reason: str, *, warn: bool = True) -> None:
        _remember(self._refused, key)
        self.pass_by(reason, warn=warn)

    def _drop_oldest(self) -> None:
        if len(self._recordings) == 1:
            self._recorder.release()
        elif torch.cuda.is_available():  # a replay may still run
            torch.cuda.synchronize()
        self._recordings.popitem(last=False)


def _remember(keys: OrderedDict[Hashable, None], key: Hashable) -> None:
    keys[key] = None
    if len(keys) > MOST_REMEMBERED:
        keys.popitem(last=False)


def _settings(device: torch.device) -> Hashable:
    """The settings of torch that choose kernels."""
    cuda = torch.backends.cuda
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), torch.get_float32_matmul_precision(),
        torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type), torch.are_deterministic_algorithms_enabled(),
        cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled(),
    )  # fmt: skip


@contextlib.contextmanager
def _no_autocast_cache(device: torch.device) -> Iterator[None]:
    """Weights are cast inside of a recording: those that autocast keeps are gone when the caller leaves it."""
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, torch.get_autocast_dtype(device.type), cache_enabled=False):
        yield


def _refuse_opaque(value: Any) -> NoReturn:
    raise InputError(f"the model returns a {type(value).__name__}, in which tensors cannot be told from the rest")


def _why_not_recorded(error: Exception) -> str:
    """The reason in words, with the line of the model that it came from."""
    first: BaseException = error
    while first.__context__ is not None and isinstance(first.__context__, Exception):
        first = first.__context__
    own = str(Path(torch.__file__).parent)
    frames = [frame for frame in traceback.extract_tb(first.__traceback__) if not frame.filename.startswith(own)]
    where = f" (at {Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    what = str(first) if isinstance(first, InputError) else short(first, 160)
    waits = "capturing" in str(first) or "capture" in str(first)
    return f"{'the forward waits for the GPU, or does what else cannot be recorded: ' if waits else ''}{what}{where}"
