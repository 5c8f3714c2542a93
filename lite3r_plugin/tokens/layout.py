"""The order in which blocks of tokens are compact image tiles, and the tokens that are never dropped."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..adapter.layouts import TokenLayout, Views
from ..config import Pin

TILE = 8


def token_order(layout: TokenLayout, device: torch.device | str = "cpu") -> Tensor:
    """Token indices ``[N]`` int32: all special tokens, then view by view, the reference view first, the patches in tile order.

    A view is cut into strips about `TILE` rows high. Each strip is read column by column, strips alternate between
    left to right and right to left. Any 64 consecutive patches are then an image tile of about 8 x 8, exactly so
    where the grid is a multiple of 8, without any padding. It is arithmetic on indices alone, so that a compiled graph
    serves any number of views.
    """
    special: list[Tensor] = []
    patches: list[Tensor] = []
    reference: list[Tensor] = []
    start, view = 0, 0
    for part in layout.parts:
        if isinstance(part, int):
            special.append(torch.arange(part, device=device, dtype=torch.int32) + start)
            start = start + part
            continue
        first = torch.arange(part.count, device=device, dtype=torch.int32)[:, None] * part.tokens_per_view + start  # token of each view
        if part.special_tokens or part.trailing_tokens:
            beside = torch.arange(part.special_tokens + part.trailing_tokens, device=device, dtype=torch.int32)
            beside = beside + (beside >= part.special_tokens).int() * part.patches_per_view
            special.append((first + beside).flatten())
        tiles = first + part.special_tokens + _tile_order(part.grid, device)
        if layout.reference and view <= layout.reference < view + part.count:  # the first one is where it belongs already
            chosen = layout.reference - view
            reference.append(tiles[chosen])
            tiles = torch.cat((tiles[:chosen], tiles[chosen + 1 :]))
        patches.append(tiles.flatten())
        start, view = start + part.count * part.tokens_per_view, view + part.count
    return torch.cat((*special, *reference, *patches))


class Pinned(NamedTuple):
    """How many tokens at the start of `token_order` are always kept.

    Attributes:
        queries: Those that attend to all tokens.
        keys: Those to which all tokens attend.
    """

    queries: int
    keys: int


NOTHING = Pinned(0, 0)


def pinned_tokens(layout: TokenLayout, pin: Pin) -> Pinned:
    """The tokens that are always kept. In a sequence of one view there is no reference view."""
    if pin == "none":
        return NOTHING
    special = layout.special_tokens
    if pin == "special" or layout.reference is None or layout.views < 2:
        return Pinned(special, special)
    both = special + _view(layout, layout.reference).patches_per_view
    return Pinned(special if pin == "reference_keys" else both, both)


def _view(layout: TokenLayout, index: int) -> Views:
    """What the view `index` is like."""
    views = [part for part in layout.parts if isinstance(part, Views)]
    for part in views:
        if index < part.count:
            return part
        index = index - part.count
    return views[-1]


def _tile_order(grid: tuple[int, int], device: torch.device | str) -> Tensor:
    """Patch indices of a view ``[rows * columns]``, int32, in tile order."""
    rows, columns = grid
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
    return row * columns + column + backwards * (columns - 1 - 2 * column)
