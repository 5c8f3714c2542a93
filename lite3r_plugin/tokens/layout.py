"""The order in which blocks of tokens are compact image tiles, and the tokens that are never dropped."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..adapter.sites import TokenLayout
from ..config import Pin

TILE = 8


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
