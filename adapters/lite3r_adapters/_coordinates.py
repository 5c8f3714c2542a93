"""Layouts of tokens from the coordinates that come with them, as in CroCo's heirs, whose views may be of different sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lite3r_plugin.adapter import TokenLayout, Views

_KNOWN: Any = WeakTensorKeyDictionary()
"""Layouts by coordinates, which all blocks of a forward are given: a GPU waits for their values once for each view."""


def can_be_read(positions: Tensor) -> bool:
    """Whether coordinates have values that can be read now: compilers and CUDA graphs see none."""
    if torch.compiler.is_compiling() or positions.is_meta:
        return False
    return not (positions.is_cuda and torch.cuda.is_current_stream_capturing())


def layout_of(positions: Tensor | None) -> TokenLayout | None:
    """The layout of one view, whose tokens have these coordinates ``[B, N, 2]`` (row, column), special tokens' negative.

    None where they are no grid, or cannot be read: blocks of tokens are then rows and not tiles of an image.
    """
    if positions is None or not can_be_read(positions):
        return None
    version = 0 if positions.is_inference() else positions._version
    known = _KNOWN.get(positions)
    if known is None or known[0] != version:
        view = view_of(positions.cpu())
        _KNOWN[positions] = known = version, None if view is None else TokenLayout((view,))
    return known[1]


def view_of(positions: Tensor) -> Views | None:
    """The one view with these coordinates ``[B, N, 2]``, on the CPU; None where they are no grid, or not the same in the whole batch."""
    if bool((positions != positions[:1]).any()):
        return None
    special = int((positions[0, :, 0] < 0).sum())
    patches = positions[0, special:].long()
    if not len(patches) or bool((patches < 0).any()):
        return None
    rows, columns = (int(n) + 1 for n in patches.amax(0))
    if rows * columns != len(patches):
        return None
    grid = torch.cartesian_prod(*(torch.arange(n, device=positions.device) for n in (rows, columns)))
    return Views((rows, columns), special_tokens=special) if torch.equal(patches, grid) else None
