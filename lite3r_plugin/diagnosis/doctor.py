"""`doctor`: runs a model as it comes, sees what happens, and leaves it as it was."""

from __future__ import annotations

import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapter.plugins import find_sites
from ..adapter.sites import AttentionSite
from ..apply.lookup import look_up
from ..config import Lite3RConfig, parse_amount
from ..errors import AlreadyAppliedError, InputError, UnknownModelError, short
from ..runtime.device import memory_of, peak, release_memory, synchronize, timed
from ..runtime.trace import Held, Trace, traced
from ..runtime.values import exchanged, tensors_in, views_in, with_views
from .report import Diagnosis, Leak, Site, Timing, Unread, ViewGrowth
from .steps import Facts, judge
from .untouched import parameter_versions, tensors_changed, untouched

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..config import Lite3RFields

HALF = (torch.bfloat16, torch.float16)
RUNS = 5
MOST_LEAKS = 12
SMALL = 4096  # bytes that an operator writes in all; what is below is no leak worth a line


def doctor(
    model: nn.Module,
    inputs: Any,
    *,
    config: Lite3RConfig | None = None,
    memory: int | str | None = None,
    **fields: Unpack[Lite3RFields],
) -> Diagnosis:
    """What `model` does as it comes, and which steps of Lite3R would pay here. Nothing changes.

    The forward runs some ten times without gradients, in evaluation mode, with the dtypes that it has and under the autocast that is on.

    Args:
        model: Any module without Lite3R, known to an adapter or not.
        inputs: The images, a tuple of arguments, a dict of keywords, or a function that runs the model that it is given. How many views
            fit is told of images ``[B, S, 3, H, W]`` or ``[S, 3, H, W]``, not of a function.
        config: What would be asked for, `Lite3RConfig()` by default; for the estimates.
        memory: Bytes that there are, or text such as ``"8GB"``; by default what the device has.
        **fields: Fields of `Lite3RConfig` to set on top of `config`.

    Returns:
        What was found; print it.

    Raises:
        ModelTypeError: `model` is no `torch.nn.Module`.
        AlreadyAppliedError: the model carries Lite3R; `describe` tells what runs there.
        InputError: the model does not run on `inputs`, or `memory` is no number of bytes.
        ConfigError: there is no such field, or it does not take the value.

    Examples:
        >>> diagnosis = doctor(model, images)  # print it
    """
    found = look_up(model)
    if found.attention:
        raise AlreadyAppliedError("doctor looks at a model as it comes: describe(model) tells what Lite3R runs, remove_lite3r takes it out")
    config = (config or Lite3RConfig()).replace(**fields)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    available = _memory(memory, device)
    notes: list[str] = []
    with untouched(model), torch.inference_mode(False), torch.no_grad():
        model.eval()
        versions = parameter_versions(model)
        adapter, sites = _sites(model, notes)
        run = _runner(model, inputs)
        try:
            run(None)
        except Exception as error:  # whatever the model raises
            raise InputError(f"{found.name} does not run on what it was given: {short(error)}") from error
        trace, peak_bytes = _trace(model, run, None, device)
        timing = _timing(run, device, trace)
        views, growth = _growth(model, run, inputs, device, trace, peak_bytes, available, notes)
        unread = _unread(trace)
        facts = Facts(found, sites, config, device, trace, timing, views, sum(item.size for item in unread))
        steps = judge(facts)
        if changed := tensors_changed(model, versions):
            notes.append(f"its own forward writes to its parameters, {changed[0]} and {len(changed) - 1} others")
    products = _products(trace)
    return Diagnosis(
        model=found.name,
        adapter=adapter,
        device=_name(device),
        images=() if callable(inputs) else tuple(tuple(x.shape) for x in tensors_in(inputs)),
        products=products,
        sites=tuple(_attends(trace, sites)),
        leaks=tuple(_leaks(trace, products)),
        unread=tuple(unread),
        timing=timing,
        weight_bytes=_weights(model),
        parts=_parts(model),
        activations=_activations(trace, device),
        activation_peak=trace.peak,
        peak_bytes=peak_bytes,
        views=growth,
        steps=tuple(steps),
        notes=tuple(notes),
    )


# Runs


def _runner(model: nn.Module, inputs: Any) -> Callable[[int | None], Any]:
    """Runs the model on copies of the inputs, of only so many views where a number is given."""

    def run(views: int | None) -> Any:
        if callable(inputs):
            return inputs(model)
        given = exchanged(inputs if views is None else with_views(inputs, views), Tensor.clone)
        if isinstance(given, dict):
            return model(**given)
        return model(*given) if isinstance(given, tuple) else model(given)

    return run


def _trace(model: nn.Module, run: Callable[[int | None], Any], views: int | None, device: torch.device) -> tuple[Trace, int | None]:
    """A forward as it is seen, and on a GPU the peak of one that nobody sees."""
    with traced(model) as trace:
        outputs = run(views)
    del outputs
    if device.type != "cuda":
        return trace, None
    release_memory(device)
    outputs = run(views)
    synchronize(device)
    del outputs
    return trace, peak(device)[0]


def _timing(run: Callable[[int | None], Any], device: torch.device, trace: Trace) -> Timing:
    seconds = [timed(lambda: run(None), device) for _ in range(RUNS)]
    whole = statistics.median(seconds) * 1e3
    host_ms = gpu_ms = None
    if device.type == "cuda":
        times = [_apart(run, device, whole) for _ in range(RUNS)]
        host_ms = statistics.median(host for host, _ in times)
        gpu_ms = None if trace.waits else statistics.median(gpu for _, gpu in times)
    return Timing(whole, RUNS, host_ms, gpu_ms, trace.operators, trace.waits)


def _apart(run: Callable[[int | None], Any], device: torch.device, whole_ms: float) -> tuple[float, float]:
    """Milliseconds of Python until all is launched, and of the GPU, which is kept busy until Python is done, so never waits for it."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        synchronize(device)
        torch.cuda._sleep(int(2e6 * (2 * whole_ms + 5)))  # cycles of a clock of about 2 GHz
        begin.record()
        start = time.perf_counter()
        run(None)
        host = (time.perf_counter() - start) * 1e3
        end.record()
        end.synchronize()
    return host, begin.elapsed_time(end)


def _growth(
    model: nn.Module, run: Callable[[int | None], Any], inputs: Any, device: torch.device, trace: Trace, peak_bytes: int | None,
    memory: int | None, notes: list[str],
) -> tuple[int | None, ViewGrowth | None]:  # fmt: skip
    """How many views the inputs have, and how many would fit."""
    views = None if callable(inputs) else views_in(inputs)
    if views is None:
        notes.append("how many views fit is told of images [B, S, 3, H, W] or [S, 3, H, W], and of lists of views, only")
        return None, None
    weights = sum(_weights(model).values())

    def total(trace: Trace, peak_bytes: int | None, share: float) -> int:
        given = sum(x.nbytes for x in tensors_in(inputs))
        return peak_bytes if peak_bytes is not None else weights + trace.peak + int(given * share)

    measured = {views: total(trace, peak_bytes, 1.0)}
    for fewer in sorted({-(-views // 4), -(-views // 2)} - {views}):
        try:
            measured[fewer] = total(*_trace(model, run, fewer, device), fewer / views)
        except Exception as error:  # a model that takes no fewer views
            notes.append(f"it does not run on {fewer} views: {short(error, 120)}")
    measured = dict(sorted(measured.items()))
    if len(measured) < 2:
        notes.append("how many views fit is told from forwards of several numbers of views: give more views")
        return views, None
    if memory is None:
        notes.append("how much memory there is is not known here: give memory=")
        return views, None
    return views, ViewGrowth(measured, memory, most_views(measured, memory))


def most_views(measured: dict[int, int], memory: int) -> int:
    """The largest number of views whose peak is at most `memory`, by a line or, through three points, a parabola that opens upwards.

    Args:
        measured: Peak bytes by numbers of views, two or three of them.
        memory: Bytes.
    """
    points = sorted(measured.items())[-3:]
    (middle, at_middle), (high, at_high) = points[-2:]
    slope, bend = (at_high - at_middle) / (high - middle), 0.0
    if len(points) > 2:
        low, at_low = points[0]
        bend = max(0.0, (slope - (at_middle - at_low) / (middle - low)) / (high - low))
    most, step = 0, 1 << 24
    while step:  # bit by bit
        views = most + step
        if at_high + slope * (views - high) + bend * (views - high) * (views - middle) <= memory:
            most = views
        step >>= 1
    return most


# What was seen


def _sites(model: nn.Module, notes: list[str]) -> tuple[str | None, tuple[AttentionSite, ...]]:
    try:
        adapter, sites = find_sites(model)
    except UnknownModelError:
        notes.append("no installed adapter knows this model: `lite3r adapters inspect` writes one to start from")
        return None, ()
    return adapter, tuple(sites)


def _attends(trace: Trace, sites: tuple[AttentionSite, ...]) -> list[Site]:
    scopes = {site.fqn: site.scope for site in sites}

    def scope_of(part: str) -> str | None:
        return next((scope for fqn, scope in scopes.items() if part == fqn or part.startswith(f"{fqn}.")), None)

    alike: Counter[tuple[Any, ...]] = Counter()
    for call in trace.attention:
        dtype = _dtype(call.dtype)
        alike[pattern(call.part), scope_of(call.part), call.queries, call.keys, call.kernel, dtype, call.masked] += 1
    seen = {call.part for call in trace.attention}
    found = [Site(name, count, *rest) for (name, *rest), count in alike.items()]
    silent = [fqn for fqn in scopes if not any(part == fqn or part.startswith(f"{fqn}.") for part in seen)]
    for (name, scope), count in Counter((pattern(fqn), scopes[fqn]) for fqn in silent).items():
        found.append(Site(name, count, scope, (), 0, "its own code, or it did not run", "", False))
    return found


def _products(trace: Trace) -> dict[str, float]:
    """FLOPs of products by dtype, the most first."""
    flops: Counter[str] = Counter()
    for (_, _, dtype), work in trace.work.items():
        if work.flops:
            flops[_dtype(dtype)] += work.flops  # pyright: ignore[reportArgumentType]
    return {name: float(value) for name, value in flops.most_common()}


def _leaks(trace: Trace, products: dict[str, float]) -> list[Leak]:
    """What runs in FP32 where most products do not."""
    if not products or next(iter(products)) not in [_dtype(dtype) for dtype in HALF]:
        return []
    found: dict[tuple[str, str], Leak] = {}
    for (part, operator, dtype), work in trace.work.items():
        if dtype != torch.float32:
            continue
        key = pattern(part) or "the model", operator.partition(".")[0]
        before = found.get(key, Leak(*key, 0, 0, 0.0))
        found[key] = Leak(*key, before.calls + work.calls, before.size + work.size, before.flops + work.flops)
    ordered = sorted((leak for leak in found.values() if leak.size >= SMALL), key=lambda leak: -leak.size)
    return ordered[:MOST_LEAKS]


def _unread(trace: Trace) -> list[Unread]:
    """What was held at the peak and is read by nothing at all."""
    alike: dict[tuple[str, tuple[int, ...]], list[Held]] = {}
    for item in trace.unused_at_peak():
        if item.read == item.made:
            alike.setdefault((pattern(item.part) or "the model", item.shape), []).append(item)
    found = [Unread(*key, len(items), sum(item.size for item in items)) for key, items in alike.items()]
    return sorted((item for item in found if item.size >= SMALL), key=lambda item: -item.size)


def _activations(trace: Trace, device: torch.device) -> dict[str, int]:
    """Bytes at the peak by what made them."""
    found: Counter[str] = Counter()
    unread = {id(item) for item in trace.unused_at_peak() if item.read == item.made}
    for item in trace.at_peak():
        name = ".".join(pattern(item.part).split(".")[:4])
        found["kept for nobody" if id(item) in unread else "outputs" if item.freed is None else name] += item.size
    return dict(found.most_common())


def _weights(model: nn.Module) -> dict[str, int]:
    found: Counter[str] = Counter()
    for x in {id(x): x for x in (*model.parameters(), *model.buffers())}.values():
        found[_dtype(x.dtype)] += x.nbytes
    return dict(found.most_common())


def _parts(model: nn.Module) -> dict[str, int]:
    """Bytes of weights by the first parts of their names, two where all begin alike."""
    sizes = [(name.split("."), x.nbytes) for name, x in (*model.named_parameters(), *model.named_buffers())]
    found: Counter[str] = Counter()
    depth = 1 if len({names[0] for names, _ in sizes}) > 1 else 2
    for names, size in sizes:
        found[".".join(names[:-1][:depth])] += size
    return dict(found.most_common())


def pattern(name: str) -> str:
    """A name with its numbers left open."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "{i}", name)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _memory(memory: int | str | None, device: torch.device) -> int | None:
    """Bytes that there are."""
    if memory is not None:
        given = parse_amount(memory)
        if given is None:
            raise InputError(f"memory is a number of bytes above 0, or text such as 8GB or 7.5GiB, got {str(memory)[:80]!r}")
        return given
    return memory_of(device)
