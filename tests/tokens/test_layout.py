"""The order of tokens: a permutation into compact image tiles; the tokens that are always kept come first."""

from __future__ import annotations

import pytest
import torch

from lite3r_plugin import TokenLayout
from lite3r_plugin.config import Pin
from lite3r_plugin.tokens.layout import pinned_tokens, token_order

GRIDS = [(1, 1), (1, 30), (30, 1), (7, 9), (8, 8), (16, 24), (37, 37), (28, 37), (11, 50), (12, 20), (20, 12), (4, 64)]


@pytest.mark.parametrize("special", [0, 1, 5])
@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_order_is_a_permutation_special_tokens_first_then_view_by_view(grid: tuple[int, int], views: int, special: int) -> None:
    layout = TokenLayout(views, special, grid)
    order = token_order(layout)
    assert order.dtype == torch.int32
    assert order.sort().values.tolist() == list(range(layout.num_tokens))
    within = order % layout.tokens_per_view
    assert (within[: views * special] < special).all()
    assert (within[views * special :] >= special).all()
    view_of_patch = order[views * special :] // layout.tokens_per_view
    assert view_of_patch.tolist() == [v for v in range(views) for _ in range(grid[0] * grid[1])]


@pytest.mark.parametrize("grid", [(8, 8), (16, 24), (8, 40), (40, 8), (64, 16)])
def test_multiples_of_eight_give_exact_tiles(grid: tuple[int, int]) -> None:
    rows, columns = _coordinates(grid)
    for block in range(0, len(rows), 64):
        y, x = rows[block : block + 64], columns[block : block + 64]
        assert y.min() % 8 == 0
        assert x.min() % 8 == 0
        assert (int(y.max() - y.min()), int(x.max() - x.min())) == (7, 7)


@pytest.mark.parametrize("grid", [g for g in GRIDS if min(g) >= 4])
def test_any_window_of_64_patches_is_compact(grid: tuple[int, int]) -> None:
    """Also windows that do not start at a multiple of 64, as after special tokens. Strips are at most 11 rows high."""
    rows, columns = _coordinates(grid)
    for start in range(max(1, len(rows) - 63)):
        y, x = rows[start : start + 64], columns[start : start + 64]
        assert int(y.max() - y.min()) < 24
        assert int(x.max() - x.min()) < 24


@pytest.mark.parametrize("grid", [(37, 37), (28, 37)])
def test_tiles_are_far_more_compact_than_raster_order(grid: tuple[int, int]) -> None:
    def spread(y: torch.Tensor, x: torch.Tensor) -> float:
        blocks = [(y[i : i + 64].double(), x[i : i + 64].double()) for i in range(0, len(y) - 63, 64)]
        return sum(float(a.var() + b.var()) for a, b in blocks) / len(blocks)

    raster = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).unbind(1)
    assert spread(*_coordinates(grid)) < 0.25 * spread(*raster)


def _coordinates(grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    order = token_order(TokenLayout(1, 0, grid))
    return order // grid[1], order % grid[1]


@pytest.mark.parametrize(
    ("views", "pin", "expected"),
    [(4, "reference", 4 * 5 + 6), (4, "special", 20), (4, "none", 0), (1, "reference", 5), (1, "none", 0)],
)
def test_pinned_tokens(views: int, pin: Pin, expected: int) -> None:
    assert pinned_tokens(TokenLayout(views, 5, (2, 3)), pin) == expected
