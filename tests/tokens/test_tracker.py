"""The grid that a forward's images give, also where checkpointing runs a forward again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lite3r_plugin import TokenLayout, TokenSource
from lite3r_plugin.errors import LayoutError
from lite3r_plugin.tokens.tracker import GridTracker


def tracker(special: int = 1) -> GridTracker:
    return GridTracker(TokenSource("embed", (4, 4), special))


def test_the_tracker_reads_the_grid_from_the_first_tensor_by_position_or_name() -> None:
    watcher, module = tracker(), nn.Identity()
    watcher.observe(module, ("no tensor", torch.zeros(2, 3, 8, 13)), {})
    assert watcher.layout("a", 2 * 7) == TokenLayout(2, 1, (2, 3))
    watcher.observe(module, (), {"images": torch.zeros(3, 16, 4)})
    assert watcher.layout("a", 5) == TokenLayout(1, 1, (4, 1))


def test_a_forward_without_images_is_named() -> None:
    with pytest.raises(LayoutError, match="'embed' was called without an image tensor"):
        tracker().observe(nn.Identity(), (), {"size": 3})


def test_a_site_before_any_image_is_named() -> None:
    with pytest.raises(LayoutError, match=r"site 'a' ran before 'embed' saw any image"):
        tracker().layout("a", 7)


@pytest.mark.parametrize("tokens", [0, 6, 13])
def test_counts_that_do_not_fit_are_named(tokens: int) -> None:
    watcher = tracker()
    watcher.observe(nn.Identity(), (torch.zeros(1, 3, 8, 12),), {})
    with pytest.raises(
        LayoutError, match=rf"got {tokens} tokens, but a view has 7 \(1 special \+ 2 x 3 patches\).*patch_size or special_tokens"
    ):
        watcher.layout("a", tokens)


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
            found.append(watcher.layout("a", ctx.tokens).grid)
            return grad, None

    def forward(height: int, width: int) -> torch.Tensor:
        watcher.observe(nn.Identity(), (torch.zeros(1, 3, height, width),), {})
        return Site.apply(torch.zeros(1, requires_grad=True), 1 + height * width // 16)

    small, large = forward(8, 12), forward(16, 16)
    (small + large).backward()
    assert sorted(found) == [(2, 3), (4, 4)]
    wide, tall = forward(8, 12), forward(12, 8)
    with pytest.raises(LayoutError, match=r"recomputed by gradient checkpointing, but forwards on grids of \[\(2, 3\), \(3, 2\)\]"):
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
        out = x * 2
        out.register_hook(lambda grad: found.append(watcher.layout("a", 7).grid))  # as recomputation asks, before the hook of `watch`
        watcher.watch(out)
        if width == 8:
            watcher.observe(nn.Identity(), (torch.zeros(1, 3, 16, 16),), {})  # another forward comes between
        out.sum().backward()
    assert found[0] == (2, 3)
    watcher = copy.deepcopy(watcher)
    with torch.no_grad():
        watcher.observe(nn.Identity(), (torch.zeros(1, 3, 12, 8),), {})
    assert watcher.layout("a", 7).grid == (3, 2)
