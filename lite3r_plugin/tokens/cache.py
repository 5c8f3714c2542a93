"""Token orders that were made before."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..adapter.layouts import TokenLayout
from .layout import token_order

MAX_ORDERS = 32


class OrderCache:
    """The token orders of one model, by layout and device.

    At most `MAX_ORDERS` are kept, besides those that CUDA graphs read. A graph reads the memory that was there when it was
    captured, for as long as it lives, and tells nobody when it goes; so what it reads is kept until the model goes. That is right
    because a graph needs the parameters of the model just as much: whoever replays it keeps the model, with Lite3R in it, as it is.
    And it is little: one order of 4 bytes a token for each layout that was captured, however often, beside a graph whose own memory
    holds all activations of that layout. Kept for the whole process, orders would outlive their models.

    A copy, also a pickled one, starts empty: no graph reads its orders.

    Args:
        make: Makes the order ``[N]`` of a layout on a device.
    """

    def __init__(self, make: Callable[[TokenLayout, torch.device], Tensor] = token_order) -> None:
        self.make = make
        self._recent: OrderedDict[tuple[TokenLayout, torch.device], Tensor] = OrderedDict()
        self._captured: dict[tuple[TokenLayout, torch.device], Tensor] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderCache, (self.make,)

    def __len__(self) -> int:
        """How many orders it keeps."""
        return len(self._recent.keys() | self._captured.keys())

    def get(self, layout: TokenLayout, device: torch.device) -> Tensor:
        """The order of `layout`, ``[N]`` int32, on `device`.

        Eager calls share cached tensors; compiled graphs, and CUDA graphs without a cached one, build it inside.
        """
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():  # what a mode makes, such as a fake tensor, is its own
            return self.make(layout, device)
        key = (layout, device)
        order = self._captured.get(key)
        if order is None:
            order = self._recent.get(key)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if order is None:
            if capturing:  # its memory is the graph's, and holds nothing before the first replay
                return self.make(layout, device)
            with torch.inference_mode(False):  # it may be saved for a backward pass later
                order = self.make(layout, torch.device("cpu")).to(device)  # copied, so that it is there for every stream
            self._recent[key] = order
            if len(self._recent) > MAX_ORDERS:
                self._recent.popitem(last=False)
        if capturing:
            self._captured[key] = order
        return order
