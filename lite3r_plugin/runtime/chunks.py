"""Running parts of a model on a few views or rows at a time: the same numbers up to rounding, less memory at once."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.module import SparseLinearAttention
from ..fp8.block import Fp8Block
from ..wrapper import forward_parameters
from .values import exchanged, tensors_in

HEAD_ARGUMENTS = ("frames_chunk_size", "chunk_size")
"""What the dense heads of VGGT and Depth Anything 3 call the number of views that they take at once."""

ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Of the largest number of an output: sums in another order. The coarsest dtype that has a part in it counts."""


@dataclass(frozen=True)
class Chunks:
    """How much runs at once; None: all.

    Attributes:
        heads: Views, in heads that say themselves how many they take.
        views: Views, in modules that treat each by itself.
        rows: Tokens, in modules that treat each by itself.
        attention: Heads of attention, at sites that may be sparse; others see single views.
    """

    heads: int | None = None
    views: int | None = None
    rows: int | None = None
    attention: int | None = None

    def __str__(self) -> str:
        parts = (
            ("dense heads", self.heads, "view"),
            ("modules of single views", self.views, "view"),
            ("MLPs", self.rows, "token"),
            ("attention", self.attention, "head"),
        )
        said = [f"{name} {size} {unit}{'s' if size > 1 else ''} at a time" for name, size, unit in parts if size is not None]
        return ", ".join(said) or "everything at once"


@dataclass(frozen=True)
class Places:
    """What can run in chunks, by names in the model.

    Attributes:
        heads: Modules whose forward has an argument for it, with its name.
        views: Modules whose tensors have one entry for each view, of which none sees another.
        rows: Modules from ``[B, N, C]`` to ``[B, N, C']`` that treat each token by itself.
    """

    heads: Mapping[str, str] = field(default_factory=dict)
    views: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()


@contextlib.contextmanager
def finding_places(model: nn.Module, views: int, whole: Collection[nn.Module | None] = ()) -> Iterator[Callable[[], Places]]:
    """Find what can run in chunks in the forward inside the context, of `views` views, at least two.

    Whether views and tokens are independent is tried: the module runs once more with all but the first of them exchanged, which must not
    change the first by one bit, and in chunks, which must give the same up to rounding.

    Args:
        model: The model.
        views: How many there are in the forward.
        whole: Modules that must be given all views.

    Yields:
        What gives the places when the forward is over.
    """
    search = _Search(model, views, whole)
    try:
        search.attach()
        yield search.places
    finally:
        search.detach()


class _Search:
    """Tries modules when they are called. What looks for hooks that read results passes over these, so that everything runs as without."""

    reads_arguments_only = True

    def __init__(self, model: nn.Module, views: int, whole: Collection[nn.Module | None]) -> None:
        self.views, self.whole = views, whole
        hooked = ((module, name) for name, module in model.named_modules() if not isinstance(module, torch.jit.ScriptModule))
        self.names = {module: name for module, name in hooked if name}  # the model itself is what is planned; TorchScript has no hooks
        self.heads = {name: argument for module, name in self.names.items() if (argument := _head_argument(module)) is not None}
        self.found: dict[str, str] = {}
        self._stack: list[str] = []
        self._handles: list[Any] = []
        self._trying = False

    def attach(self) -> None:
        for module in self.names:
            self._handles.append(module.register_forward_pre_hook(self.enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self.leave, always_call=True))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def places(self) -> Places:
        """What was found."""
        return Places(self.heads, *(tuple(name for name, kind in self.found.items() if kind == which) for which in ("views", "rows")))

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = self.names[module]
        self._stack.append(name)
        inside = any(outer in self.found or outer in self.heads for outer in self._stack)
        if self._trying or inside or next(module.parameters(), None) is None or any(part in self.whole for part in module.modules()):
            return
        self._trying = True
        try:
            if _counts_views(args, kwargs, self.views) and _is_viewwise(module, args, kwargs, self.views):
                self.found[name] = "views"
            elif _is_rowwise(module, args, kwargs):
                self.found[name] = "rows"
        finally:
            self._trying = False

    def leave(self, *_: Any) -> None:
        self._stack.pop()


@contextlib.contextmanager
def in_chunks(model: nn.Module, places: Places, chunks: Chunks) -> Iterator[None]:
    """Run what stands at `places` in `chunks` inside the context, compiled code too. For one thread at a time."""
    modules = dict(model.named_modules(remove_duplicate=False))
    before: dict[nn.Module, Any] = {}
    fused: list[Fp8Block] = []
    sites: list[SparseLinearAttention] = []
    wanted: dict[nn.Module, Callable[..., Any]] = {}
    if chunks.heads is not None:
        wanted |= {modules[name]: functools.partial(_with_argument, argument, chunks.heads) for name, argument in places.heads.items()}
    if chunks.views is not None:
        wanted |= {modules[name]: functools.partial(by_views, chunks.views) for name in places.views}
    if chunks.rows is not None:
        wanted |= {modules[name]: functools.partial(_by_rows, chunks.rows) for name in places.rows}
        fused = [module for module in modules.values() if isinstance(module, Fp8Block)]
    if chunks.attention is not None:
        sites = [module for module in modules.values() if isinstance(module, SparseLinearAttention) and module.sparse]
    try:
        for module, run in wanted.items():
            before[module] = module._compiled_call_impl
            module._compiled_call_impl = functools.partial(run, module._compiled_call_impl or module._call_impl)
        for block in fused:
            block.rows_at_once = chunks.rows
        for site in sites:
            site.heads_at_once = chunks.attention
        yield
    finally:
        for module, call in before.items():
            module._compiled_call_impl = call
        for block in fused:
            vars(block).pop("rows_at_once", None)
        for site in sites:
            vars(site).pop("heads_at_once", None)


# Running


def _with_argument(name: str, size: int, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return call(*args, **{**kwargs, name: size})


def by_views(size: int, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`call` on `size` entries of the first dimension at a time.

    Args:
        size: So many.
        call: From tensors with one entry for each view, and whatever else, to tensors with one entry for each view.
        args, kwargs: For `call`. Tensors that have as many entries as the first one are cut.

    Returns:
        What `call` gives, its tensors for all views, in the memory format of those of a part. Each is written into one result.
    """
    count = next((x.shape[0] for x in tensors_in((args, kwargs)) if x.dim()), 0)
    if count <= size:
        return call(*args, **kwargs)
    out: list[Tensor] = []
    whole: Any = None
    for start in _starts(count, size, out):
        given, named = exchanged((args, kwargs), lambda x, at=start: x[at : at + size] if x.dim() and x.shape[0] == count else x)
        part = call(*given, **named)
        if whole is None:
            out += [torch.empty_like(x[:1].expand(count, *x.shape[1:])) for x in tensors_in(part)]
            places = iter(out)
            whole = exchanged(part, lambda _, places=places: next(places))
        for target, x in zip(out, tensors_in(part), strict=True):
            target[start : start + size] = x
        x = part = given = named = None  # before the next one runs
    return whole


def _by_rows(size: int, call: Callable[..., Any], x: Tensor, **kwargs: Any) -> Any:
    """`call` on `size` rows of ``[..., C]`` at a time."""
    rows = x.reshape(1, -1, x.shape[-1])
    count = rows.shape[1]
    if count <= size:
        return call(x, **kwargs)
    out: list[Tensor] = []
    for start in _starts(count, size, out):
        part = call(rows[:, start : start + size], **kwargs)
        if not out:
            out.append(part.new_empty(1, count, part.shape[-1]))
        out[0][:, start : start + size] = part
        part = None  # before the next one runs
    return out[0].view(*x.shape[:-1], out[0].shape[-1])


def _starts(count: int, size: int, out: list[Tensor]) -> Iterator[int]:
    """Where chunks start. Of tensors without data, whose chunks are alike, the first two and the last do."""
    from torch._subclasses.fake_tensor import FakeTensor

    starts = range(0, count, size)
    for i, start in enumerate(starts):
        if i < 2 or i == len(starts) - 1 or not any(isinstance(x, FakeTensor) for x in out):
            yield start


# Finding


def _head_argument(module: nn.Module) -> str | None:
    """The argument of its forward that says how many views it takes at once."""
    parameters = forward_parameters(module) or {}
    return next((name for name in HEAD_ARGUMENTS if name in parameters and isinstance(parameters[name].default, int)), None)


def _counts_views(args: tuple[Any, ...], kwargs: dict[str, Any], views: int) -> bool:
    """Whether every tensor has one entry for each view."""
    tensors = tensors_in((args, kwargs))
    return bool(tensors) and all(x.dim() > 1 and x.shape[0] == views for x in tensors)


def _is_viewwise(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], views: int) -> bool:
    def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return module(*exchanged(args, Tensor.clone), **exchanged(kwargs, Tensor.clone))

    def others(x: Tensor) -> Tensor:
        return torch.cat((x[:1], _other(x[1:])))

    try:
        whole = call(args, kwargs)
        if not all(x.dim() and x.shape[0] == views for x in tensors_in(whole)) or not tensors_in(whole):
            return False
        changed = call(*exchanged((args, kwargs), others))
        if not _same_bits(exchanged(whole, lambda x: x[:1]), exchanged(changed, lambda x: x[:1])):
            return False
        chunked = by_views(1, lambda *args, **kwargs: call(args, kwargs), *args, **kwargs)
        return _close(whole, chunked, _tolerance(module, (args, kwargs, whole)))
    except Exception:  # whatever a module raises that is called in another way than its model does
        return False


def _is_rowwise(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether it is more than one Linear and treats each row of its one tensor by itself."""
    linears = sum(isinstance(inside, nn.Module) and "Linear" in type(inside).__name__ for inside in module.modules())
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or args[0].dim() < 3 or linears < 2:
        return False
    x = args[0]
    half = x.shape[-2] // 2
    if not half or not x.is_floating_point():
        return False
    try:
        whole = module(x.clone())
        if not isinstance(whole, Tensor) or whole.shape[:-1] != x.shape[:-1]:
            return False
        changed = module(torch.cat((x[..., :half, :], _other(x[..., half:, :])), -2))
        return torch.equal(whole[..., :half, :], changed[..., :half, :]) and _close(
            whole, _by_rows(half, module, x.clone()), _tolerance(module, (x, whole))
        )
    except Exception:  # as above
        return False


def _other(x: Tensor) -> Tensor:
    """Something else of the same kind; of integers, which may be positions or indices, the same."""
    return x.flip(-1) * 1.5 + 0.25 if x.is_floating_point() else x


def _same_bits(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors_in(a), tensors_in(b), strict=True))


def _tolerance(module: nn.Module, values: Any) -> float:
    tensors = (*module.parameters(), *module.buffers(), *tensors_in(values))
    on = tensors[0].device.type
    dtypes = {x.dtype for x in tensors if x.is_floating_point()} | (
        {torch.get_autocast_dtype(on)} if torch.is_autocast_enabled(on) else set()
    )
    return max(ROUNDING.get(dtype, ROUNDING[torch.bfloat16]) for dtype in dtypes)


def _close(a: Any, b: Any, tolerance: float) -> bool:
    for x, y in zip(tensors_in(a), tensors_in(b), strict=True):
        if x.shape != y.shape or x.dtype != y.dtype:
            return False
        largest = x.float().abs().max() if x.numel() else torch.zeros((), device=x.device)
        if not bool((x.float() - y.float()).abs().max() <= tolerance * largest):
            return False
    return True
