"""What a forward does, operator by operator: who runs, in which dtype, and which memory is held from when to when."""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .sdpa import BACKENDS

GRANULE = 512  # bytes: the caching allocator of CUDA gives memory in multiples of these
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique")


@dataclass(eq=False)
class Held:
    """Memory that a forward made.

    Attributes:
        size: Bytes.
        shape, dtype: Of the tensor that it was made for.
        part: Module that made it, by its fully qualified name.
        operator: What made it.
        made: When: the number of the operator.
        read: When it was last read by something that is no view; as `made` where it never was.
        freed: When it was freed; None where the forward left it behind.
    """

    size: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    part: str
    operator: str
    made: int
    read: int
    freed: int | None = None


@dataclass(frozen=True)
class Attention:
    """A call of `scaled_dot_product_attention`.

    Attributes:
        part: Module that called it.
        queries: Shape of the queries ``[..., N, D]``.
        keys: Their number.
        dtype: Of the output.
        kernel: What ran: a name of `lite3r_plugin.runtime.sdpa.BACKENDS`, ``"math"`` for products and a softmax, or the operator.
        masked: Whether there was a mask.
    """

    part: str
    queries: tuple[int, ...]
    keys: int
    dtype: torch.dtype
    kernel: str
    masked: bool


@dataclass
class Work:
    """What an operator did in a module, over all its calls, in one dtype: calls, bytes written, and FLOPs of products."""

    calls: int = 0
    size: int = 0
    flops: float = 0.0


@dataclass
class Trace:
    """One forward, as `traced` saw it.

    Attributes:
        operators: How many ran that compute something; on a GPU each is a launch or more.
        held: All memory that it made, in order.
        work: By module, operator and dtype of the output.
        attention: Calls of attention, in order.
        rows: Of each Linear by name, how many rows its input has, over all calls.
        waits: Operators that wait for the device, or would if it were a GPU, with their number, by module.
        peak: Most bytes that it held at once, weights and inputs not included.
        peak_at: When.
    """

    operators: int = 0
    held: list[Held] = field(default_factory=list)
    work: dict[tuple[str, str, torch.dtype], Work] = field(default_factory=dict)
    attention: list[Attention] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    waits: dict[str, int] = field(default_factory=dict)
    peak: int = 0
    peak_at: int = 0

    def at_peak(self) -> list[Held]:
        """What was held then."""
        return [item for item in self.held if item.made <= self.peak_at and (item.freed is None or item.freed > self.peak_at)]

    def unused_at_peak(self) -> list[Held]:
        """Of that, what nothing read any more, and which is no output."""
        return [item for item in self.at_peak() if item.read < self.peak_at and item.freed is not None and item.made < self.peak_at]


Transients = Callable[[Any, tuple[Any, ...], dict[str, Any]], int]


@contextlib.contextmanager
def traced(model: nn.Module, transients: Transients = lambda func, args, kwargs: 0) -> Iterator[Trace]:
    """See the forwards inside the context. Hooks are on the modules meanwhile; compiled code is not seen.

    Gradients must be off, and `torch.inference_mode` too: it hides what operators are made of.

    Args:
        model: The model.
        transients: ``(operator, args, kwargs)`` to the bytes that it holds only while it runs, beside its results.
    """
    trace, on = Trace(), next((x.device.type for x in model.parameters()), "cpu")
    calls = _Calls(model, trace)
    operators = _Operators(trace, calls.stack, transients, on)
    try:
        calls.attach()
        with _Attention(trace, calls.stack, operators), operators:
            yield trace
    finally:
        operators.done = True
        calls.detach()


class _Calls:
    """Knows which module runs. What looks for hooks that read results passes over these, so that everything runs as without them."""

    reads_arguments_only = True

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.trace = trace
        named = model.named_modules()
        self.names = {module: name for name, module in named if not isinstance(module, torch.jit.ScriptModule)}  # that has no hooks
        self.stack = [""]
        self._handles: list[Any] = []

    def attach(self) -> None:
        for module in self.names:
            self._handles.append(module.register_forward_pre_hook(self.enter))
            self._handles.append(module.register_forward_hook(self.leave, always_call=True))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        name = self.names[module]
        self.stack.append(name)
        if isinstance(module, nn.Linear) and args and isinstance(args[0], Tensor):
            self.trace.rows[name] = self.trace.rows.get(name, 0) + args[0].numel() // max(1, module.in_features)

    def leave(self, *_: Any) -> None:
        self.stack.pop()


class _Operators(TorchDispatchMode):
    """Notes every operator."""

    def __init__(self, trace: Trace, stack: list[str], transients: Transients, on: str) -> None:
        super().__init__()
        self.on = on
        self.trace, self.stack, self.transients = trace, stack, transients
        self.kernel: str | None = None
        self.done = False
        self._held: dict[int, tuple[Any, Held]] = {}  # by the address of the storage: a weak reference to it, and what it is
        self._now = 0
        self._live = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name, part = func.name(), self.stack[-1]
        if "_scaled_dot_product_" in name:  # aten::_scaled_dot_product_flash_attention_for_cpu and others
            self.kernel = next((key for key in BACKENDS if f"_{key}_" in name), name.removeprefix("aten::"))
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_iter(out) if isinstance(x, Tensor)]
        reads = name in WAITS and any(x.device.type == self.on for x in given)  # of a model on a GPU, what is on the CPU need not wait
        if reads or (name in ("aten::_to_copy", "aten::copy_") and _leaves_gpu(given, made)):
            self.trace.waits[part] = self.trace.waits.get(part, 0) + 1
        if _is_view(func):
            return out
        self._now += 1
        self.trace.operators += 1
        for x in given:
            if (found := self._held.get(_address(x))) is not None:
                found[1].read = self._now
        before = {_address(x) for x in given}
        for x in made:
            if _address(x) not in before:
                self._make(x, part, name)
        if made and made[0].is_floating_point():
            self._count(self.transients(func, args, kwargs))
            work = self.trace.work.setdefault((part, name.removeprefix("aten::"), made[0].dtype), Work())
            work.calls += 1
            work.size += sum(x.nbytes for x in made)
            work.flops += _flops(func, args, kwargs, out)
        return out

    def _make(self, x: Tensor, part: str, operator: str) -> None:
        storage, address = x.untyped_storage(), _address(x)
        if address in self._held or not storage.nbytes():
            return
        size = -(-storage.nbytes() // GRANULE) * GRANULE
        held = Held(size, tuple(x.shape), x.dtype, part, operator.removeprefix("aten::"), self._now, self._now)

        def freed(_: Any) -> None:
            if not self.done:
                held.freed = self._now + 1
                self._live -= size
            del self._held[address]

        self._held[address] = weakref.ref(storage, freed), held
        self.trace.held.append(held)
        self._live += size
        self._count(0)

    def _count(self, transient: int) -> None:
        """Look whether this is the peak."""
        if self._live + transient > self.trace.peak:
            self.trace.peak, self.trace.peak_at = self._live + transient, self._now


class _Attention(TorchFunctionMode):
    """Notes calls of attention, and which operator they become."""

    def __init__(self, trace: Trace, stack: list[str], operators: _Operators) -> None:
        super().__init__()
        self.trace, self.stack, self.operators = trace, stack, operators

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.operators.kernel = None
        out = func(*args, **kwargs)
        q, k = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key")))
        masked = kwargs.get("attn_mask", args[3] if len(args) > 3 else None) is not None
        seen = Attention(self.stack[-1], tuple(q.shape), k.shape[-2], out.dtype, self.operators.kernel or "math", masked)
        self.trace.attention.append(seen)
        return out


def _address(x: Tensor) -> int:
    return x.untyped_storage()._cdata


@functools.cache
def _is_view(func: Any) -> bool:
    """Whether what it gives is what it was given, looked at in another way."""
    if func.name() in ("aten::_unsafe_view", "aten::lift_fresh"):
        return True
    returned = [value.alias_info for value in func._schema.returns]
    return bool(returned) and all(alias is not None and not alias.is_write for alias in returned)


def _leaves_gpu(given: list[Tensor], made: list[Tensor]) -> bool:
    return bool(made) and made[0].device.type == "cpu" and any(x.is_cuda for x in given)


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
    """FLOPs of a product or of attention; 0 of everything else."""
    if "_scaled_dot_product_" in func.name():
        q, k = args[:2]
        return 4.0 * q.numel() * k.shape[-2]
    count = _counters().get(func.overloadpacket)
    if count is None:
        return 0.0
    found = float(count(*args, **kwargs, out_val=out))
    return found if math.isfinite(found) else 0.0


@functools.cache
def _counters() -> dict[Any, Callable[..., Any]]:
    from torch.utils.flop_counter import flop_registry

    return flop_registry
