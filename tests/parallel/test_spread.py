"""Which views a process has, and its stand-in."""

from __future__ import annotations

import pytest
import torch

from lite3r_plugin.errors import ParallelError
from lite3r_plugin.parallel import view_counts
from lite3r_plugin.parallel.spread import Spread, images_in


@pytest.mark.parametrize(("views", "ranks"), [(1, 1), (2, 2), (3, 3), (5, 2), (100, 2), (100, 3), (1000, 8)])
@pytest.mark.parametrize("stand_in", [True, False])
def test_all_run_about_as_many_views(views: int, ranks: int, stand_in: bool) -> None:
    counts = view_counts(views, ranks, stand_in)
    assert sum(counts) == views
    assert min(counts) >= 1
    held = [count + (stand_in and rank > 0) for rank, count in enumerate(counts)]
    assert max(held) - min(held) <= 1


def test_each_process_needs_a_view() -> None:
    with pytest.raises(ParallelError, match="2 views cannot be spread over 3 processes"):
        view_counts(2, 3)


def test_a_stand_in_is_a_copy_of_the_first_own_view() -> None:
    spread = Spread((2, 3), 1, True, batch=1, bare=False)
    x = torch.arange(5)[None]
    assert spread.own(x, 1).tolist() == [[2, 2, 3, 4]]
    assert spread.without_stand_in(spread.own(x, 1), 1).tolist() == [[2, 3, 4]]
    assert (spread.held, spread.first, spread.views, spread.tokens(8)) == (4, 2, 5, (4, 6))


def test_the_first_process_has_none() -> None:
    spread = Spread((2, 3), 0, True, batch=1, bare=False)
    assert spread.own(torch.arange(5)[None], 1).tolist() == [[0, 1]]


def test_tokens_are_as_many_of_each_view() -> None:
    with pytest.raises(ParallelError, match="9 tokens"):
        Spread((2, 3), 0, True, batch=1, bare=False).tokens(9)


def test_images_are_the_first_tensor() -> None:
    images = torch.zeros(1, 2, 3, 4, 4)
    assert images_in((), {"n": 3, "images": images}) is images
    with pytest.raises(ParallelError, match="has none"):
        images_in((1,), {})
