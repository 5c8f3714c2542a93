"""The order of tokens: a permutation into compact image tiles; the tokens that are always kept come first."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lite3r_plugin import TokenLayout, Views
from lite3r_plugin.config import Pin
from lite3r_plugin.errors import AdapterError
from lite3r_plugin.tokens.layout import pinned_tokens, token_order

GRIDS = [(1, 1), (1, 30), (30, 1), (7, 9), (8, 8), (16, 24), (37, 37), (28, 37), (11, 50), (12, 20), (20, 12), (4, 64)]


@pytest.mark.parametrize("special", [0, 1, 5])
@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_order_is_a_permutation_special_tokens_first_then_view_by_view(grid: tuple[int, int], views: int, special: int) -> None:
    layout = TokenLayout((Views(grid, views, special),))
    order = token_order(layout)
    assert order.dtype == torch.int32
    assert order.sort().values.tolist() == list(range(layout.num_tokens))
    within = order % (special + grid[0] * grid[1])
    assert (within[: views * special] < special).all()
    assert (within[views * special :] >= special).all()
    view_of_patch = order[views * special :] // (special + grid[0] * grid[1])
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
    order = token_order(TokenLayout((Views(grid),)))
    return order // grid[1], order % grid[1]


@pytest.mark.parametrize(
    ("views", "pin", "expected"),
    [
        (4, "reference", (26, 26)), (4, "reference_keys", (20, 26)), (4, "special", (20, 20)), (4, "none", (0, 0)),
        (1, "reference", (5, 5)), (1, "reference_keys", (5, 5)), (1, "none", (0, 0)),
    ],
)  # fmt: skip
def test_pinned_tokens(views: int, pin: Pin, expected: tuple[int, int]) -> None:
    assert pinned_tokens(TokenLayout((Views((2, 3), views, 5),)), pin) == expected


def layout_of(*parts: Views | int, reference: int | None = 0) -> TokenLayout:
    return TokenLayout(parts, reference)


def said(layout: TokenLayout) -> list[tuple[str, int, int, int]]:
    """What each token is, in the order of the sequence, written out: its kind, its view, its row, its column."""
    tokens: list[tuple[str, int, int, int]] = []
    view = 0
    for part in layout.parts:
        if isinstance(part, int):
            tokens += [("special", -1, 0, i) for i in range(part)]
            continue
        for _ in range(part.count):
            tokens += [("special", view, 1, i) for i in range(part.special_tokens)]
            tokens += [("patch", view, row, column) for row in range(part.grid[0]) for column in range(part.grid[1])]
            tokens += [("special", view, 2, i) for i in range(part.trailing_tokens)]
            view += 1
    return tokens


LAYOUTS = {
    "mixed grids": layout_of(Views((6, 10)), Views((10, 6)), Views((6, 10), 2)),
    "trailing": layout_of(Views((4, 5), 3, special_tokens=1, trailing_tokens=2)),
    "once per sequence": layout_of(Views((4, 5), 3), 1),
    "once in front": layout_of(2, Views((9, 5), 2, 1)),
    "special only": layout_of(17 * 3),
    "no grid": layout_of(Views((1, 23))),
    "windows": layout_of(Views((7, 7), 4), reference=None),
    "another reference": layout_of(Views((9, 5), 2, 1), Views((5, 9), 3, 1, 1), 2, reference=3),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_is_ordered_special_tokens_first_then_the_reference_view(layout: TokenLayout) -> None:
    tokens, order = said(layout), token_order(layout).tolist()
    assert len(tokens) == layout.num_tokens
    assert sorted(order) == list(range(len(tokens)))
    kinds = [tokens[i][0] for i in order]
    assert kinds == ["special"] * layout.special_tokens + ["patch"] * (len(tokens) - layout.special_tokens)
    views = list(dict.fromkeys(tokens[i][1] for i in order[layout.special_tokens :]))
    first = [] if layout.reference is None or not layout.views else [layout.reference]
    assert views == first + [view for view in range(layout.views) if view not in first]
    for view in views:  # in it, patches are in the order of a view alone
        own = [tokens[i] for i in order if tokens[i][:2] == ("patch", view)]
        rows, columns = max(t[2] for t in own) + 1, max(t[3] for t in own) + 1
        assert [t[2] * columns + t[3] for t in own] == token_order(TokenLayout((Views((rows, columns)),))).tolist()


@pytest.mark.parametrize(
    ("name", "special", "reference"),
    [
        ("mixed grids", 0, 60), ("trailing", 9, 29), ("once per sequence", 1, 21), ("once in front", 4, 49), ("special only", 51, 51),
        ("no grid", 0, 0), ("windows", 0, 0), ("another reference", 10, 55),
    ],
)  # fmt: skip
def test_what_is_pinned_follows_from_the_layout(name: str, special: int, reference: int) -> None:
    layout = LAYOUTS[name]
    pins: tuple[Pin, ...] = ("none", "special", "reference_keys", "reference")
    assert [pinned_tokens(layout, pin).keys for pin in pins] == [0, special, reference, reference]
    assert [pinned_tokens(layout, pin).queries for pin in pins] == [0, special, special, reference]
    kept = [said(layout)[i] for i in token_order(layout).tolist()[:reference]]
    assert {t[1] for t in kept if t[0] == "patch"} <= {layout.reference}


def test_tokens_without_a_grid_keep_their_order() -> None:
    assert token_order(LAYOUTS["no grid"]).tolist() == list(range(23))


def test_layouts_are_compared_and_hashed_by_what_they_say() -> None:
    assert layout_of(Views((2, 3), 2), 1) == layout_of(Views((2, 3), 2), 1)
    assert (
        len({layout_of(Views((2, 3))), layout_of(Views((3, 2))), layout_of(Views((2, 3))), layout_of(Views((2, 3)), reference=None)}) == 3
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Views((2, 0)), r"grid of Views is a pair of positive integers \(rows, columns\), got \(2, 0\)"),
        (lambda: Views((2, 3), 0), "count of Views is an integer from 1 on, got 0"),
        (lambda: Views((2, 3), trailing_tokens=-1), "trailing_tokens of Views is an integer from 0 on, got -1"),
        (lambda: TokenLayout(Views((2, 3))), "parts of a TokenLayout are a tuple of Views"),  # pyright: ignore[reportArgumentType]
        (lambda: TokenLayout(()), "parts of a TokenLayout are a tuple of Views"),
        (lambda: layout_of(Views((2, 3)), 0), "a part of a TokenLayout is Views or a number of special tokens from 1 on, got 0"),
        (lambda: layout_of(Views((2, 3), 2), reference=2), "reference of a TokenLayout of 2 views is one of them or None, got 2"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        make()
