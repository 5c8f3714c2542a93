"""Token order: finds the layout of a forward, and the order in which blocks of tokens are compact image tiles."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..adapter.sites import TokenLayout, TokenSource
from ..config import Pin
from ..errors import LayoutError

TILE = 8
MAX_PENDING = 64


class _Forward:
    """One forward of a model, on a grid, with gradients."""

    def __init__(self, grid: tuple[int, int]) -> None:
        self.grid = grid
        self.watched = False


class GridTracker:
    """Remembers the patch grid of the running forward. One per image module of a model; its sites share it.

    `observe` is a forward pre-hook of the image module. It must stay a plain method of a plain object, so that models
    with Lite3R can be deep-copied and pickled.
    """

    _pending: tuple[_Forward, ...] = ()  # forwards with gradients whose backward pass has not ended
    _task = -1  # the backward pass in which images were last seen, or -1
    _new = False  # whether the last images are not among `_pending` yet
    _recomputed = False  # whether there was a recomputation since they were seen

    def __init__(self, source: TokenSource) -> None:
        self.source = source
        self.grid: tuple[int, int] | None = None
        self._handle: RemovableHandle | None = None

    def attach(self, module: nn.Module) -> None:
        """Watch `module`."""
        self._handle = module.register_forward_pre_hook(self.observe, with_kwargs=True)

    def detach(self) -> None:
        """Stop watching."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the grid off the first tensor argument, the images ``[..., H, W]``."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.dim() >= 2:
                patch_h, patch_w = self.source.patch_size
                self.grid = (value.shape[-2] // patch_h, value.shape[-1] // patch_w)
                if not torch.compiler.is_compiling():
                    self._task = torch._C._current_graph_task_id()
                    self._new = True
                    if self._recomputed and self._task == -1:  # where checkpointing hides outputs, this ends the forwards before
                        self._pending = tuple(forward for forward in self._pending if forward.watched)
                        self._recomputed = False
                    if torch.is_grad_enabled():
                        self._remember()
                return
        raise LayoutError(
            f"the module {self.source.image_module!r} was called without an image tensor, so the token layout is unknown; "
            "its adapter must name a module that is given the images"
        )

    def _remember(self) -> None:
        if self._new and self._task == -1:
            assert self.grid is not None
            self._pending = (*self._pending[1 - MAX_PENDING :], _Forward(self.grid))
            self._new = False

    def watch(self, out: Tensor) -> None:
        """Note when the backward pass of the running forward ends: when it comes to `out`, the output of a site.

        Gradient checkpointing runs a forward again in a backward pass, where the last images seen may be those of another one.
        """
        if torch.compiler.is_compiling() or not out.requires_grad or self._task != -1 or _in_backward():
            return
        self._remember()  # also where the images were seen without gradients
        if self._pending and not self._pending[-1].watched:
            self._pending[-1].watched = True
            out.register_hook(functools.partial(self._ended, self._pending[-1]))

    def _ended(self, forward: _Forward, grad: Tensor) -> None:
        self._pending = tuple(other for other in self._pending if other is not forward)

    def _recomputed_grid(self, fqn: str, tokens: int) -> tuple[int, int] | None:
        if self._task == torch._C._current_graph_task_id():  # the images are seen again as well
            return self.grid
        self._recomputed = True
        special = self.source.special_tokens
        fitting = {f.grid for f in self._pending if tokens % TokenLayout(1, special, f.grid).tokens_per_view == 0}
        if len(fitting) > 1:
            self._pending = ()
            raise LayoutError(
                f"site {fqn!r} is recomputed by gradient checkpointing, but forwards on grids of {sorted(fitting)} patches came "
                "before this backward pass, and it cannot be told which is meant: call backward() after each forward, run those that "
                "need no gradients under torch.no_grad(), or switch checkpointing off"
            )
        return fitting.pop() if fitting else self.grid

    def layout(self, fqn: str, tokens: int) -> TokenLayout:
        """The layout of a sequence of `tokens` tokens at site `fqn`. Raises `LayoutError` when the images do not fit."""
        grid = self.grid
        if not torch.compiler.is_compiling() and _in_backward():
            grid = self._recomputed_grid(fqn, tokens)
        if grid is None:
            raise LayoutError(
                f"site {fqn!r} ran before {self.source.image_module!r} saw any image; run the model on images, or "
                "apply_lite3r to the module that you call"
            )
        layout = TokenLayout(1, self.source.special_tokens, grid)
        views = tokens // layout.tokens_per_view  # not divmod, which torch.compile does not know for dynamic sizes
        if tokens % layout.tokens_per_view or not views:
            raise LayoutError(
                f"site {fqn!r} got {tokens} tokens, but a view has {layout.tokens_per_view} "
                f"({self.source.special_tokens} special + {grid[0]} x {grid[1]} patches); the adapter's "
                "patch_size or special_tokens is wrong for this model"
            )
        return TokenLayout(views, self.source.special_tokens, grid)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def token_order(layout: TokenLayout, device: torch.device | str = "cpu") -> Tensor:
    """Token indices ``[N]`` int32: all special tokens, then view by view the patches in tile order.

    A view is cut into strips about `TILE` rows high. Each strip is read column by column, strips alternate between
    left to right and right to left. Any 64 consecutive patches are then an image tile of about 8 x 8, exactly so
    where the grid is a multiple of 8, without any padding. It is arithmetic on indices alone, so that a compiled graph
    serves any number of views.
    """
    rows, columns = layout.grid
    strips = max(1, (rows + TILE // 2) // TILE)
    low, taller = rows // strips, rows % strips  # the first `taller` strips have one row more
    patch = torch.arange(rows * columns, device=device, dtype=torch.int32)
    beyond = (patch >= taller * (low + 1) * columns).int()  # 1 in the strips of `low` rows
    patch = patch - beyond * (taller * (low + 1) * columns)
    height = low + 1 - beyond
    strip, within = patch // (height * columns), patch % (height * columns)
    row = beyond * (taller * (low + 1)) + strip * height + within % height
    column = within // height
    backwards = (strip + beyond * taller) % 2
    patches = row * columns + column + backwards * (columns - 1 - 2 * column)
    views = torch.arange(layout.views, device=device, dtype=torch.int32)[:, None] * layout.tokens_per_view
    special = (views + torch.arange(layout.special_tokens, device=device, dtype=torch.int32)).flatten()
    return torch.cat((special, (views + layout.special_tokens + patches).flatten()))


def pinned_tokens(layout: TokenLayout, pin: Pin) -> int:
    """How many tokens at the start of `token_order` are always kept. In a sequence of one view there is no reference view."""
    if pin == "none":
        return 0
    special = layout.views * layout.special_tokens
    return special + math.prod(layout.grid) if pin == "reference" and layout.views > 1 else special


_orders: OrderedDict[tuple[TokenLayout, torch.device], Tensor] = OrderedDict()
_captured: dict[tuple[TokenLayout, torch.device], Tensor] = {}
MAX_ORDERS = 32


def order_for(layout: TokenLayout, device: torch.device) -> Tensor:
    """`token_order` on `device`. Eager calls share cached tensors; compiled graphs, and CUDA graphs without one, build it."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():  # what a mode makes, such as a fake tensor, is its own
        return token_order(layout, device)
    key = (layout, device)
    order = _orders.get(key)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if order is None:
        if capturing:  # its memory is the graph's, and holds nothing before the first replay
            return token_order(layout, device)
        with torch.inference_mode(False):  # it may be saved for a backward pass later
            order = token_order(layout).to(device)  # copied, so that it is there for every stream
        _orders[key] = order
        if len(_orders) > MAX_ORDERS:
            _orders.popitem(last=False)
    if capturing:
        _captured[key] = order  # the graph reads this memory for as long as it lives
    return order
