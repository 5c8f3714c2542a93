"""A limit for the memory of a model's forwards: each layout of inputs is planned before it runs, and runs in chunks where it must.

The plan follows from a forward on tensors without data, of which every allocation is seen, so it is as exact as they are. What kernels
take for themselves meanwhile (cuDNN, cuBLAS) is not seen.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.layouts import LayoutFunction
from ..attention.module import REPLACED, SparseLinearAttention
from ..attention.state import ModelState
from ..costs.attention import TABLE
from ..errors import InputError, MemoryLimitError, short
from ..fp8.block import Fp8Block
from ..ops.dispatch import SlowPathWarning
from ..wrapper import Changes, RewrittenMethod, calls_are_seen
from .chunks import Chunks, Places, finding_places, in_chunks
from .device import memory_of
from .trace import Trace, traced
from .values import exchanged, images_in, layout_of, tensors_in, with_views

STEPS = (
    Chunks(),
    Chunks(heads=4),
    Chunks(heads=2),
    Chunks(heads=2, views=32, rows=65536, attention=8),
    Chunks(heads=2, views=8, rows=32768, attention=4),
    Chunks(heads=1, views=2, rows=8192, attention=2),
    Chunks(heads=1, views=1, rows=2048, attention=1),
)
"""What is tried, in this order: the first that fits costs least time."""

MOST_PLANS = 64
RESERVE = 0.06  # of what a device has: for what kernels and the allocator take besides
GIB = 2**30
ONE_AT_A_TIME = threading.RLock()
"""Held while something is planned, or runs in chunks, for which modules are called in another way."""


@dataclass(frozen=True)
class MemoryPlan:
    """What a forward with one layout of inputs is going to hold; print it.

    Attributes:
        shapes: Of the tensors among the inputs.
        limit: Bytes that may be held.
        standing: Bytes of weights, buffers and inputs; on a GPU, all that is allocated there before the forward.
        whole: Predicted peak with everything at once, what stands included.
        peak: Predicted peak of what is going to run.
        chunks: What runs at once.
        held: Bytes at that peak by what made them, the largest first, beside what stands.
    """

    shapes: tuple[tuple[int, ...], ...]
    limit: int
    standing: int
    whole: int
    peak: int
    chunks: Chunks
    held: dict[str, int]

    @property
    def fits(self) -> bool:
        """Whether it may run."""
        return self.peak <= self.limit

    def __str__(self) -> str:
        shapes = ", ".join(str(list(shape)) for shape in self.shapes)
        held = ", ".join(f"{name or 'the model'} {size / GIB:.3f}" for name, size in list(self.held.items())[:5])
        whole = "" if self.whole == self.peak else f" instead of {self.whole / GIB:.3f}"
        return (
            f"memory for {shapes}: predicted peak {self.peak / GIB:.3f} GiB{whole}, of {self.limit / GIB:.3f}; {self.chunks}; on the "
            f"device stand {self.standing / GIB:.3f} GiB of weights and inputs, and at the peak {held or 'nothing else'}"
        )


class MemoryPlanner(RewrittenMethod):
    """Lies over the forward of a model and keeps it within a limit. Forwards with gradients and in training are not planned.

    Args:
        module: The model, with everything else of Lite3R in it.
        state: What its sites share.
        sites: They themselves.
        limit: Bytes; None: what the device has, but for `RESERVE`.

    Attributes:
        plans: By layout of the inputs, and by what is seen whole, those made last.
        places: What can run in chunks; None before the first plan.
        unplanned: Why forwards ran without a plan.
    """

    def __init__(self, module: nn.Module, state: ModelState, sites: Iterable[SparseLinearAttention], limit: int | None) -> None:
        super().__init__(module, "forward")
        self.state, self.sites, self.limit = state, tuple(sites), limit
        self.plans: dict[Any, MemoryPlan] = {}
        self.places: Places | None = None
        self.unplanned: dict[str, int] = {}
        self._planning = False
        self._below: Any = None

    def put_in(self, changes: Changes) -> None:
        """Lie on the model, over what lies there."""
        self._below = vars(self.module).get(self.name)
        super().put_in(changes)

    def take_out(self, changes: Changes) -> None:
        """Let what lay there be seen again."""
        if self._below is not None and vars(self.module).get(self.name) is self:
            changes.put(vars(self.module), self.name, self._below)
        else:
            super().take_out(changes)

    def run_host(self, *args: Any, **kwargs: Any) -> Any:
        """What lay on the model before."""
        return super().run_host(*args, **kwargs) if self._below is None else self._below(*args, **kwargs)

    def rewritten(self, *args: Any, **kwargs: Any) -> Any:
        """As the host's forward. Raises `MemoryLimitError` before it runs where it cannot be kept within the limit."""
        if torch.compiler.is_compiling() or self._planning or torch._C._len_torch_dispatch_stack():
            return self.run_host(*args, **kwargs)
        reason = None
        if self.module.training:
            reason = "the model is in training mode"
        elif torch.is_grad_enabled() and any(x.requires_grad for x in (*self.module.parameters(), *tensors_in((args, kwargs)))):
            reason = "gradients are wanted: call the model under torch.inference_mode() or torch.no_grad()"
        elif torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            reason = "the caller captures a graph himself"
        elif any(site.is_replaced for site in self.sites):
            reason = REPLACED
        if reason is not None:
            if not self.module.training and reason not in self.unplanned:
                warnings.warn(f"Lite3R: max_memory is not kept: {reason}", SlowPathWarning, stacklevel=2)
            self.unplanned[reason] = self.unplanned.get(reason, 0) + 1
            return self.run_host(*args, **kwargs)
        plan = self.plan(args, kwargs)
        if not plan.fits:
            raise MemoryLimitError(self._refusal(plan))
        if plan.chunks == Chunks():
            return self.run_host(*args, **kwargs)
        assert self.places is not None
        with ONE_AT_A_TIME, in_chunks(self.module, self.places, plan.chunks):
            return self.run_host(*args, **kwargs)

    def plan(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MemoryPlan:
        """What a forward with these arguments is going to hold; made once for each layout of them. Nothing of that size runs.

        Raises:
            InputError: the arguments cannot be told from others, or the forward cannot run on tensors without data.
        """
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        key = layout_of((args, kwargs)), autocast, calls_are_seen(), tuple(site.is_seen_whole for site in self.sites)  # which are not cut
        with ONE_AT_A_TIME:
            known = self.plans.get(key)
            on_gpu = device.type == "cuda"  # where others may have come since
            if known is not None and on_gpu and torch.cuda.memory_allocated(device) - known.standing + known.peak > known.limit:
                del self.plans[key]
            if key not in self.plans:
                if len(self.plans) >= MOST_PLANS:
                    del self.plans[next(iter(self.plans))]
                with torch.inference_mode(False), torch.no_grad(), self._aside(), _operator_by_operator(self.module):
                    self.plans[key] = self._made(args, kwargs, device)
            return self.plans[key]

    def report(self) -> list[str]:
        """The plans, in lines."""
        most = "what the device has" if self.limit is None else f"{self.limit / GIB:.3f} GiB"
        lines = [f"memory at most {most}; planned in the first forward of each layout of inputs"]
        lines += [str(plan) for plan in self.plans.values()]
        return lines + [f"memory not planned in {count} forwards: {reason}" for reason, count in self.unplanned.items()]

    # Planning

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Forwards inside are no calls of the user's: sites do not count them, and who observes sites does not see them."""
        counts = {site: dataclasses.replace(site.calls) for site in self.module.modules() if isinstance(site, SparseLinearAttention)}
        self._planning = True
        try:
            with contextlib.ExitStack() as unseen:
                for site in self.sites:
                    unseen.enter_context(site.unseen())
                yield
        finally:
            self._planning = False
            for site, count in counts.items():
                site.calls = count

    def _made(self, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> MemoryPlan:
        given = (args, kwargs)
        TABLE.of(device)  # when sparse attention pays is measured before anything is watched
        if self.places is None:
            self.places = self._find_places(given)
        tensors, limit = tensors_in(given), self._limit(device)
        if device.type == "cuda":
            standing = torch.cuda.memory_allocated(device)
        else:
            own = {id(x): x for x in (*self.module.parameters(), *self.module.buffers())}
            standing = sum(x.nbytes for x in (*own.values(), *tensors))
        steps, traces = self._steps(), dict[int, Trace]()

        def fits(step: int) -> bool:
            if step not in traces:
                traces[step] = self._imagined(given, steps[step])
            return standing + traces[step].peak <= limit

        low, high = 0, len(steps) - 1
        if fits(0) or not fits(high):
            low = high = 0 if fits(0) else high
        while high - low > 1:  # `low` does not fit, `high` does
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        trace, chunks, whole = traces[high], steps[high], traces[0].peak
        held: dict[str, int] = {}
        for item in trace.at_peak():
            held[item.part] = held.get(item.part, 0) + item.size
        held = dict(sorted(held.items(), key=lambda item: -item[1]))
        shapes = tuple(tuple(x.shape) for x in tensors)
        return MemoryPlan(shapes, limit, standing, standing + whole, standing + trace.peak, chunks, held)

    def _limit(self, device: torch.device) -> int:
        if self.limit is not None:
            return self.limit
        size = memory_of(device)
        if size is None:
            raise InputError(f"how much memory {device} has is not known: say max_memory")
        return int((1 - RESERVE) * size)

    def _steps(self) -> list[Chunks]:
        """`STEPS`, as far as there is something to cut."""
        assert self.places is not None
        has = {
            "heads": bool(self.places.heads), "views": bool(self.places.views),
            "rows": bool(self.places.rows) or any(isinstance(module, Fp8Block) for module in self.module.modules()),
            "attention": any(isinstance(module, SparseLinearAttention) and module.sparse for module in self.module.modules()),
        }  # fmt: skip
        cut = [Chunks(**{name: size if has[name] else None for name, size in dataclasses.asdict(step).items()}) for step in STEPS]
        return list(dict.fromkeys(cut))

    def _find_places(self, given: Any) -> Places:
        """What can run in chunks, by a forward on two views."""
        images = images_in(given)
        if images is None:
            return Places()
        place = images.dim() - 4
        args, kwargs = with_views(given, min(2, images.shape[place]))
        if images.dim() == 5:
            count = images.shape[0]
            args, kwargs = exchanged((args, kwargs), lambda x: x[:1] if x.dim() > 1 and x.shape[0] == count else x)
        whole = {tracker.module for tracker in self.state.trackers.values() if isinstance(tracker.source, LayoutFunction)}
        with finding_places(self.module, min(2, images.shape[place]), whole) as places, traced(self.module):  # watched: as without a preset
            self.run_host(*args, **kwargs)
        return places()

    def _imagined(self, given: Any, chunks: Chunks) -> Trace:
        """The forward on tensors without data, in a copy of the model that shares its weights."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        assert self.places is not None
        memo: dict[int, Any] = {id(x): _no_view(x) for x in _all_tensors(self.module)}
        try:
            twin = copy.deepcopy(self.module, memo)
        except Exception as error:  # whatever an attribute raises
            raise InputError(
                f"max_memory cannot plan this {type(self.module).__name__}: it cannot be copied ({short(error, 200)}). Leave max_memory out"
            ) from error
        planner: MemoryPlanner = memo[id(self)]
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as fake:
                args, kwargs = exchanged(given, fake.from_tensor)
                with in_chunks(twin, self.places, chunks), traced(twin, _Transients()) as trace:
                    planner.run_host(*args, **kwargs)
        except Exception as error:
            raise InputError(
                f"max_memory cannot plan this {type(self.module).__name__}: its forward does not run on tensors without data "
                f"({short(error, 200)}). Leave max_memory out"
                + ("" if self.state.config.exact_rewrites else "; or let exact_rewrites=True take such waits out of known models")
            ) from error
        return trace

    def _refusal(self, plan: MemoryPlan) -> str:
        config = self.state.config
        helps = []
        if config.whole_model.weights == "host":
            helps.append('weights="bf16" (or preset="fast"), which halves FP32 weights and activations')
        if config.precision == "full":
            helps.append('precision="fp8", which halves the weights of the transformer blocks again')
        return f"{plan}. No smaller chunks are left: give fewer views or smaller images, a larger max_memory" + "".join(
            f", or {item}" for item in helps
        )


def _all_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that can be reached from a model: weights, what its modules and their caches keep, originals of weights."""
    seen: set[int] = set()
    todo: list[Any] = [model]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            todo += value.values()
        elif isinstance(value, (list, tuple, set)):
            todo += value
        elif not isinstance(value, (type, FunctionType, ModuleType)):
            todo += getattr(value, "__dict__", {}).values()


def _no_view(x: Tensor) -> Tensor:
    """The same memory: a view of what had another dtype when it was made has no form without data."""
    if not x._is_view():
        return x
    return nn.Parameter(x.data, requires_grad=False) if isinstance(x, nn.Parameter) else x.data


@contextlib.contextmanager
def _operator_by_operator(model: nn.Module) -> Iterator[None]:
    """TorchScript of the model, and in the packages that its modules are from, runs unfused on this thread.

    After two calls on a GPU it becomes kernels, which would read where tensors without data have none.
    """
    packages = {type(module).__module__.partition(".")[0] for module in model.modules()} - {"torch", "lite3r_plugin"}
    for name, package in list(sys.modules.items()):
        if name.partition(".")[0] in packages:
            for value in list(vars(package).values()):
                if isinstance(value, torch.jit.ScriptFunction):
                    value._debug_flush_compilation_cache()  # pyright: ignore[reportAttributeAccessIssue]
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            for name in module._c._method_names():
                module._c._get_method(name)._debug_flush_compilation_cache()
    with torch.jit.optimized_execution(False):  # pyright: ignore[reportPrivateImportUsage]
        yield


class _Transients:
    """Bytes that operators of this package hold only while they run, measured on a GPU with tensors of the same kind, once for each."""

    def __init__(self) -> None:
        self._known: dict[Any, int] = {}

    def __call__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        if not str(func).startswith("lite3r.") or not any(x.is_cuda for x in tensors_in((args, kwargs))):
            return 0
        key = str(func), layout_of(exchanged((args, kwargs), lambda x: (tuple(x.shape), x.dtype, str(x.device))))
        if key not in self._known:
            self._known[key] = self._measured(func, args, kwargs)
        return self._known[key]

    def _measured(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        from torch.utils._python_dispatch import _disable_current_modes

        with _disable_current_modes():
            real_args, real_kwargs = exchanged((args, kwargs), _like)
            device = next(x.device for x in tensors_in((real_args, real_kwargs)) if x.is_cuda)
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            try:
                out = func(*real_args, **real_kwargs)
            except torch.cuda.OutOfMemoryError:  # so much that nothing fits
                return torch.cuda.get_device_properties(device).total_memory
            torch.cuda.synchronize(device)
            return max(0, torch.cuda.max_memory_allocated(device) - before - sum(x.nbytes for x in tensors_in(out)))


def _like(x: Tensor) -> Tensor:
    """A tensor with data of the same kind, and laid out so where no entry is another's: an order of tokens where it is of integers."""
    if x.is_floating_point():
        values = torch.randn(x.shape, device=x.device).to(x.dtype)
    else:
        values = torch.arange(x.numel(), device=x.device, dtype=x.dtype).view(x.shape)
    if values.stride() == x.stride() or 0 in x.stride():
        return values
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(values)
