"""Query blocks that processes share are those of one process, and tokens come and go."""

from __future__ import annotations

import pytest
import torch

from lite3r_plugin.adapter import TokenLayout, Views
from lite3r_plugin.config import Pin
from lite3r_plugin.parallel.rows import Rows, plan_rows
from lite3r_plugin.tokens.layout import pinned_tokens, token_order


def plans(counts: tuple[int, ...], pin: Pin, block: int = 16) -> tuple[TokenLayout, tuple[int, ...], list[Rows]]:
    views = Views((4, 5), sum(counts), 3)
    layout, held = TokenLayout((views,)), tuple(count * views.tokens_per_view for count in counts)
    return layout, held, [plan_rows(layout, held, pin, block, rank, torch.device("cpu")) for rank in range(len(counts))]


def queries_of(rank: int, held: tuple[int, ...], rows: list[Rows]) -> torch.Tensor:
    """The tokens of the queries of a process, as they arrive from all."""
    starts = [sum(held[:one]) for one in range(len(held))]
    arrived = [(starts[one] + rows[one].leaving).split(rows[one].sent)[rank] for one in range(len(held))]
    assert tuple(map(len, arrived)) == rows[rank].received
    assert rows[rank].received[rank] == 0
    return torch.cat((starts[rank] + rows[rank].staying, *arrived))[rows[rank].arranged]


@pytest.mark.parametrize("pin", ["none", "special", "reference_keys", "reference"])
@pytest.mark.parametrize("counts", [(5,), (3, 2), (1, 1, 1), (3, 1, 2, 1)])
def test_processes_share_the_blocks_of_one(counts: tuple[int, ...], pin: Pin) -> None:
    layout, held, rows = plans(counts, pin)
    order, block = token_order(layout).long(), 16
    pinned_rows = -(-pinned_tokens(layout, pin).queries // block)
    blocks = {tuple(one.tolist()): number for number, one in enumerate(order.split(block))}
    seen: list[int] = []
    for rank, own in enumerate(rows):
        queries = queries_of(rank, held, rows)
        numbers = [blocks[tuple(one.tolist())] for one in queries.split(block)]  # whole blocks, in order
        pinned = [number for number in numbers if number < pinned_rows]
        assert numbers == sorted(numbers)
        assert own.pinned_keys == pinned_tokens(layout, pin).keys
        assert own.pinned == sum(len(order.split(block)[number]) for number in pinned)
        seen += numbers
    assert sorted(seen) == list(range(len(blocks)))


def test_blocks_of_each_kind_are_shared_evenly() -> None:
    rows = plans((4, 3, 3), "reference")[-1]
    pinned = [own.pinned // 16 for own in rows]
    others = [(len(own.staying) + sum(own.received) - own.pinned) / 16 for own in rows]
    assert max(pinned) - min(pinned) <= 1
    assert max(others) - min(others) <= 1
    assert sum(pinned) > 0


def test_results_find_the_way_home() -> None:
    rows = plans((3, 1, 2), "reference")[-1]
    for own in rows:
        assert torch.equal(torch.cat((own.staying, own.leaving))[own.returning], torch.arange(len(own.staying) + sum(own.sent)))
        assert torch.equal(own.arranged.sort().values.long(), torch.arange(len(own.staying) + sum(own.received)))


def test_a_stand_in_gets_what_the_view_gets_that_it_copies() -> None:
    layout, held, _ = plans((3, 2), "reference")
    tokens = held[0] // 3
    without, with_it = (plan_rows(layout, held, "reference", 16, 1, torch.device("cpu"), count).returning for count in (0, tokens))
    assert torch.equal(with_it[tokens:], without)
    assert torch.equal(with_it[:tokens], without[:tokens])


def test_most_queries_stay_where_they_are() -> None:
    layout = TokenLayout((Views((28, 28), 8, 5),))
    held = (4 * 789, 4 * 789)
    rows = [plan_rows(layout, held, "special", 128, rank, torch.device("cpu")) for rank in (0, 1)]
    assert all(len(own.staying) > 0.95 * held[rank] for rank, own in enumerate(rows))
