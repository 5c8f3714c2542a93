"""The grid that a forward's images give."""

from __future__ import annotations

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
