"""Gradient checkpointing runs a forward again when others may have come after it: on which grid?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from lite3r_plugin import TokenLayout, TokenSource, Views
from lite3r_plugin.errors import LayoutError
from lite3r_plugin.tokens.pending import MAX_PENDING, PendingForwards
from lite3r_plugin.tokens.tracker import LayoutTracker


def tracker() -> LayoutTracker:
    return LayoutTracker(TokenSource("embed", (4, 4), 1))


def grid_of(layout: TokenLayout | None) -> tuple[int, int]:
    assert layout is not None
    [views] = layout.parts
    assert isinstance(views, Views)
    return views.grid


def test_recomputation_in_a_backward_pass() -> None:
    """Gradient checkpointing runs a forward again when others may have come after it."""
    watcher, found = tracker(), []

    class Site(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, tokens):
            ctx.tokens = tokens
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            found.append(grid_of(watcher.layout("a", ctx.tokens)))
            return grad, None

    def forward(height: int, width: int) -> torch.Tensor:
        watcher.observe(nn.Identity(), (torch.zeros(1, 3, height, width),), {})
        return Site.apply(torch.zeros(1, requires_grad=True), 1 + height * width // 16)

    small, large = forward(8, 12), forward(16, 16)
    (small + large).backward()
    assert sorted(found) == [(2, 3), (4, 4)]
    wide, tall = forward(8, 12), forward(12, 8)
    with pytest.raises(LayoutError, match=r"recomputed by gradient checkpointing, but forwards on 2 x 3 patches, 3 x 2 patches came"):
        (wide + tall).backward()
    with torch.no_grad():
        watcher.observe(nn.Identity(), (torch.zeros(1, 3, 8, 12),), {})
    forward(12, 8).backward()
    assert found[-1] == (3, 2)


def test_forwards_whose_backward_pass_is_over_are_forgotten() -> None:
    """So that checkpointing may be switched on after other sizes were trained on without it."""
    watcher, found = tracker(), []
    x = torch.zeros(1, requires_grad=True)
    for height, width in ((8, 12), (12, 8)):
        watcher.observe(nn.Identity(), (torch.zeros(1, 3, height, width),), {})
        watcher.layout("a", 7)
        out = x * 2
        out.register_hook(lambda grad: found.append(grid_of(watcher.layout("a", 7))))  # as recomputation asks, before the hook of `watch`
        watcher.watch(out)
        if width == 8:
            watcher.observe(nn.Identity(), (torch.zeros(1, 3, 16, 16),), {})  # another forward comes between
            watcher.layout("a", 17)
        out.sum().backward()
    assert found[0] == (2, 3)
    watcher = copy.deepcopy(watcher)
    with torch.no_grad():
        watcher.observe(nn.Identity(), (torch.zeros(1, 3, 12, 8),), {})
    assert grid_of(watcher.layout("a", 7)) == (3, 2)


def recomputed(pending: PendingForwards) -> tuple[int, int]:
    """What it answers in a backward pass of no forward that it knows, whatever the number of tokens."""
    found: list[tuple[tuple[int, int]]] = []
    x = torch.zeros(1, requires_grad=True) * 1
    x.register_hook(lambda grad: found.append(pending.recomputed(((0, 0),), lambda grid: True, "a")))
    x.sum().backward()
    return found[0][0]


def test_forwards_without_gradients_are_not_remembered() -> None:
    pending = PendingForwards()
    with torch.no_grad():
        pending.saw_images((2, 3))
    assert recomputed(pending) == (0, 0)
    pending.saw_images((2, 3))
    assert recomputed(pending) == (2, 3)


def test_new_images_after_a_recomputation_end_forwards_that_nobody_watches() -> None:
    """As reentrant checkpointing leaves them."""
    pending = PendingForwards()
    pending.saw_images((2, 3))
    assert recomputed(pending) == (2, 3)
    pending.saw_images((3, 2))
    assert recomputed(pending) == (3, 2)


def test_the_oldest_of_too_many_is_forgotten() -> None:
    pending = PendingForwards()
    pending.saw_images((9, 9))
    for _ in range(MAX_PENDING):
        pending.saw_images((2, 3))
    assert recomputed(pending) == (2, 3)


def elsewhere(call: Callable[[], None]) -> None:
    """Run it in another thread."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(call).result()


def test_a_thread_ends_its_own_forwards() -> None:
    pending = PendingForwards()
    pending.saw_images((2, 3))
    elsewhere(lambda: pending.saw_images((3, 2)))
    out = torch.zeros(1, requires_grad=True) * 1
    pending.saw_output(out, (2, 3))
    out.sum().backward()
    assert recomputed(pending) == (3, 2)  # and nothing came after it in that thread
    elsewhere(lambda: pending.saw_images((3, 2)))
    pending.saw_images((4, 4))
    with pytest.raises(LayoutError, match="forwards on 3 x 2 patches, 4 x 4 patches came"):
        recomputed(pending)
