"""Which of PyTorch's backends runs dense attention: the fastest for the shape at hand, or one for all; and which one ran."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

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
    if torch.cuda.is_available() and not torch._C._len_torch_dispatch_stack():
        _let_torch_choose()
    others = [backend for key, backend in BACKENDS.items() if key != name]
    with sdpa_kernel([BACKENDS[name], *others, SDPBackend.MATH], set_priority=True):
        yield


@functools.cache
def _let_torch_choose() -> None:
    """The first choice on a GPU sets the order that torch prefers there, over the one asked for; and the end of the context over that."""
    q = torch.empty(1, 1, 16, 64, device="cuda", dtype=torch.bfloat16)
    torch._fused_sdp_choice(q, q, q)


class DenseKernels(TorchFunctionMode):
    """Notes which kernel runs each dense attention, a `scaled_dot_product_attention` without a mask, inside its context.

    What runs is read off the operators that PyTorch calls, not off settings; compiled code is not seen. It may be entered again.

    Attributes:
        ran: By the shapes of queries ``[..., N, D]`` and keys, the kernels and their dtypes, such as ``"flash bfloat16"``: a name of
            `BACKENDS`, or ``"math"`` where none of them ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ran: dict[tuple[tuple[int, ...], tuple[int, ...]], set[str]] = {}

    @property
    def names(self) -> list[str]:
        """All kernels that ran, sorted."""
        return sorted(set().union(*self.ran.values()))

    def agree(self, other: DenseKernels) -> bool | None:
        """Whether both ran the same kernels wherever both ran dense attention of the same shapes; None where they never did."""
        shapes = self.ran.keys() & other.ran.keys()
        return all(self.ran[shape] == other.ran[shape] for shape in shapes) if shapes else None

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or kwargs.get("attn_mask", args[3] if len(args) > 3 else None) is not None:
            return func(*args, **kwargs)
        with _Operator() as called:
            out = func(*args, **kwargs)
        q, k = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key")))
        dtype = str(out.dtype).removeprefix("torch.")
        self.ran.setdefault((tuple(q.shape), tuple(k.shape)), set()).add(f"{called.kernel} {dtype}")
        return out


class LargestDense(TorchFunctionMode):
    """Notes the queries of the dense attention inside its context that has the most products: what a choice of backend is about.

    Attributes:
        queries: Shape ``[..., N, D]``, dtype and device of them; None where there is no dense attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queries: tuple[torch.Size, torch.dtype, torch.device] | None = None
        self._products = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and len(args) > 1:
            q, k = args[0], args[1]
            if q.numel() * k.shape[-2] > self._products and q.shape[-2] == k.shape[-2]:
                on = q.device.type
                dtype = torch.get_autocast_dtype(on) if torch.is_autocast_enabled(on) else q.dtype
                self._products, self.queries = q.numel() * k.shape[-2], (q.shape, dtype, q.device)
        return func(*args, **kwargs)


class _Operator(TorchDispatchMode):
    """Finds out which fused operator `scaled_dot_product_attention` calls; ``"math"`` is none of them, but products and a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = "math"

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func.name()
        if "_scaled_dot_product_" in name:  # aten::_scaled_dot_product_flash_attention_for_cpu and others
            self.kernel = next((key for key in BACKENDS if f"_{key}_" in name), name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))
