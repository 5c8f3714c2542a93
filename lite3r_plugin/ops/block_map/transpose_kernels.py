"""The block map for a backward pass, from its bit set alone: by query block, and by key block with work cut into parts.

The lists come from the bit set of the map by counting and filling, a program for 32 key blocks of one head, so they are
in ascending order and the same on every run. Their total length is known beforehand; nothing waits for the GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sizes import power_of_2
from .kernel_mask import KernelMask

ROWS = 128
COLUMNS = 1024


class Columns(NamedTuple):
    """The map by key block.

    A key block that many query blocks attend to (a pinned one: all of them) would be one long program. Its list is cut
    into *early* parts of exactly `part` query blocks and a last one of at most `part`.

    Attributes:
        rows: ``[B, H, total]`` int32, the query blocks of key block 0, of key block 1, ...
        starts: ``[B, H, columns + 1]`` int32, where the list of each key block starts in `rows`.
        early_starts: ``[B, H, columns + 1]`` int32, where its early parts start among those of the head.
        early_columns: ``[B, H, slots]`` int32, the key block of each early part; `columns` where there is none.
        part: Query blocks in an early part.
        masked_part: The same with a mask, int32 ``[]``, else None: the GPU alone knows then how long lists are, and `part` is 0.
    """

    rows: Tensor
    starts: Tensor
    early_starts: Tensor
    early_columns: Tensor
    part: int
    masked_part: Tensor | None


@triton.jit(do_not_specialize=["rows", "columns", "words", "pinned", "total"])
def _columns_kernel(Bits, Starts, Counts, List, rows, columns, words, pinned, total, ROWS: tl.constexpr, FILL: tl.constexpr):
    """Counts the query blocks of 32 key blocks, or (FILL) writes them to their lists; pinned query blocks attend to all.

    Programs are [words, heads]. Bits ``[heads, rows, words]``, Starts ``[heads, columns + 1]`` (FILL), Counts ``[heads, columns]`` and
    List ``[heads, total]`` (FILL) are int32 and contiguous.
    """
    word = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    column = word * 32 + tl.arange(0, 32)
    inside = column < columns
    to = tl.zeros([32], tl.int32)
    if FILL:
        to += tl.load(Starts + head * (columns + 1) + column, mask=inside, other=0)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        bits = tl.load(Bits + (head * rows + row) * words + word, mask=row < rows, other=0)
        bits = tl.where(row < pinned, -1, bits)
        chosen = (bits[:, None] >> tl.arange(0, 32)[None, :]) & 1
        if FILL:
            at = head * total + to[None, :] + tl.cumsum(chosen, 0) - 1
            tl.store(List + at, row[:, None] + tl.zeros_like(chosen), mask=(chosen == 1) & inside[None, :])
        to += tl.sum(chosen, 0)
    if not FILL:
        tl.store(Counts + head * columns + column, to, mask=inside)


@triton.jit(do_not_specialize=["columns", "slots", "part"])
def _starts_kernel(Counts, Starts, EarlyStarts, EarlyColumns, Part, columns, slots, part, COLUMNS: tl.constexpr):
    """Where the lists of one head start, and its early parts: sums of what comes before each key block.

    A program for each head. Counts ``[heads, columns]``, Starts and EarlyStarts ``[heads, columns + 1]`` and EarlyColumns
    ``[heads, slots]`` are int32 and contiguous, see `Columns`. Part is None, or holds `part`.
    """
    head = tl.program_id(0).to(tl.int64)
    starts = Starts + head * (columns + 1)
    early_starts = EarlyStarts + head * (columns + 1)
    early_columns = EarlyColumns + head * slots
    if Part is not None:
        part = tl.load(Part)
    total = 0
    early_total = 0
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = column < columns
        count = tl.load(Counts + head * columns + column, mask=inside, other=0)
        early = tl.maximum(count - 1, 0) // part
        before = early_total + tl.cumsum(early, 0) - early
        tl.store(starts + column, total + tl.cumsum(count, 0) - count, mask=inside)
        tl.store(early_starts + column, before, mask=inside)
        for i in range(0, tl.max(early, 0)):
            tl.store(early_columns + before + i, column, mask=i < early)
        total += tl.sum(count, 0)
        early_total += tl.sum(early, 0)
    tl.store(starts + columns, total)
    tl.store(early_starts + columns, early_total)
    for first in range(early_total, slots, COLUMNS):
        slot = first + tl.arange(0, COLUMNS)
        tl.store(early_columns + slot, columns + tl.zeros_like(slot), mask=slot < slots)


@triton.jit(do_not_specialize=["kept", "words"])
def _indices_kernel(Bits, Indices, kept, words, WIDTH: tl.constexpr):
    """Writes the positions of the bits of one row of Bits ``[rows, words]``, ascending, to Indices ``[rows, kept]``; both int32."""
    row = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, WIDTH)
    bits = tl.load(Bits + row * words + word, mask=word < words, other=0)
    chosen = (bits[:, None] >> tl.arange(0, 32)[None, :]) & 1
    counts = tl.sum(chosen, 1)
    to = (tl.cumsum(counts, 0) - counts)[:, None] + tl.cumsum(chosen, 1) - 1
    tl.store(Indices + row * kept + to, word[:, None] * 32 + tl.arange(0, 32)[None, :], mask=chosen == 1)


def indices_of(bits: Tensor, kept: int) -> Tensor:
    """The map as indices ``[B, H, query blocks, kept]`` int32, from its bit set, which has `kept` bits in each row, or fewer."""
    *rows, words = bits.shape
    indices = torch.empty(*rows, kept, device=bits.device, dtype=torch.int32)
    _indices_kernel[(bits.numel() // words,)](bits, indices, kept, words, WIDTH=power_of_2(words), num_warps=4)
    return indices


def by_key_block(bits: Tensor, *, columns: int, kept: int, pinned: int, mask: KernelMask | None = None) -> Columns:
    """The map by key block, from the bit set `bits` ``[B, H, query blocks, ceil(columns / 32)]`` int32.

    Args:
        bits: As `kernels.block_map_with_bits` makes it, or with a mask `kernels.masked_block_map_with_bits`.
        columns: Number of key blocks.
        kept: Key blocks that a query block attends to.
        pinned: The first `pinned` query blocks attend to all key blocks, whatever their bits are; not so with a mask.
        mask: What the map was made for, or None.

    Returns:
        See `Columns`; all on the GPU of `bits`, which is not waited for.
    """
    batch, heads, rows, words = bits.shape
    # Parts of twice the mean length: most key blocks stay whole, and the parts of the others take little memory.
    masked_part = None
    if mask is None:
        total = pinned * columns + (rows - pinned) * kept
        part = max(2 * -(-total // columns), 1)
        slots = total // part if rows > part else 0
    else:
        pinned, part, total = 0, 0, rows * columns
        masked_part = 2 * ((mask.near.sum(dtype=torch.int32) + columns - 1) // columns)
        slots = columns // 2 if rows > 2 else 0

    def empty(*shape: int) -> Tensor:
        return torch.empty(batch, heads, *shape, device=bits.device, dtype=torch.int32)

    counts, lists, starts, early_starts, early = empty(columns), empty(total), empty(columns + 1), empty(columns + 1), empty(slots)
    sizes = (rows, columns, words, pinned, total)
    grid = (-(-columns // 32), batch * heads)
    _columns_kernel[grid](bits, counts, counts, lists, *sizes, ROWS=ROWS, FILL=False, num_warps=4)
    _starts_kernel[(batch * heads,)](
        counts, starts, early_starts, early, masked_part, columns, slots, part,
        COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    _columns_kernel[grid](bits, starts, counts, lists, *sizes, ROWS=ROWS, FILL=True, num_warps=4)
    return Columns(lists, starts, early_starts, early, part, masked_part)
