"""Which process computes which query blocks.

In one process, tokens are put in order (`tokens.layout.token_order`: special tokens of all views first, then the reference view, then
view by view), and blocks are cut from that order, wherever views end. For the same choice of key blocks they have to be the same
blocks, so processes share whole blocks of the order: pinned ones, which attend to everything, and the others, each kind evenly. A
process that holds the views 50 to 99 computes about the blocks of their patches, so that few queries but the special tokens travel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapter.layouts import TokenLayout
from ..config import Pin
from ..tokens.layout import pinned_tokens, token_order


@dataclass(frozen=True)
class Rows:
    """The query blocks of one process, and how their tokens come and go.

    Attributes:
        sent: How many of its own tokens this process sends to each.
        received: How many tokens it gets from each, whose blocks it computes.
        staying: ``[s]`` int64, those of its own tokens whose blocks it computes.
        leaving: ``[n - s]`` int64, the others in the order in which they are sent.
        returning: ``[n]`` int64, the place of each token among those that stay and those that leave, one after the other; with a
            stand-in, its tokens come first and get what those of the view that it copies get.
        arranged: ``[m]`` int32, the order that makes queries of those that stay and those that are received, one after the other.
        pinned: Of its m queries the first so many are of pinned blocks.
        pinned_keys: How many keys all queries attend to.
        order: ``[N]`` int32, the order of the keys of all processes.
    """

    sent: tuple[int, ...]
    received: tuple[int, ...]
    staying: Tensor
    leaving: Tensor
    returning: Tensor
    arranged: Tensor
    pinned: int
    pinned_keys: int
    order: Tensor


def plan_rows(
    layout: TokenLayout, held: tuple[int, ...], pin: Pin, block_q: int, rank: int, device: torch.device, stand_in: int = 0
) -> Rows:  # fmt: skip
    """The rows of process `rank`.

    Args:
        layout: Of the whole sequence.
        held: How many tokens of it each process holds, one after the other.
        pin: As in `Lite3RConfig`.
        block_q: Tokens of a query block.
        rank: The process.
        device: Where tensors go.
        stand_in: Tokens of this process's stand-in.
    """
    order = token_order(layout)
    tokens, ranks, pinned = len(order), len(held), pinned_tokens(layout, pin)
    rows = -(-tokens // block_q)
    pinned_rows = min(-(-pinned.queries // block_q), rows)
    shares, pinned_shares = [], []
    for one in range(ranks):
        bounds = [
            torch.arange(*(min(tokens, (start + count * part // ranks) * block_q) for part in (one, one + 1)), device="cpu")
            for start, count in ((0, pinned_rows), (pinned_rows, rows - pinned_rows))
        ]
        pinned_shares.append(len(bounds[0]))
        shares.append(torch.cat(bounds))
    ends = torch.tensor(held, device="cpu").cumsum(0)
    start = int(ends[rank]) - held[rank]
    every = order[torch.cat(shares)].long()  # tokens by who computes them
    holder = torch.bucketize(every, ends, right=True)
    computer = torch.repeat_interleave(torch.arange(ranks, device="cpu"), torch.tensor([len(share) for share in shares], device="cpu"))
    own, here = holder == rank, computer == rank
    staying, leaving = every[own & here] - start, every[own & ~here] - start
    returning = torch.cat((staying, leaving)).argsort()
    arrived = holder[here]
    arranged = arrived.where(arrived != rank, -1).argsort(stable=True).argsort()
    return Rows(
        sent=tuple(torch.bincount(computer[own & ~here], minlength=ranks).tolist()),
        received=tuple(torch.bincount(holder[here & ~own], minlength=ranks).tolist()),
        staying=staying.to(device),
        leaving=leaving.to(device),
        returning=torch.cat((returning[:stand_in], returning)).to(device),
        arranged=arranged.int().to(device),
        pinned=pinned_shares[rank],
        pinned_keys=pinned.keys,
        order=order.to(device),
    )
