"""The definition of the block map."""

from __future__ import annotations

import math

import pytest
import torch

from lite3r_plugin.ops.block_map import block_map, density, kept_blocks, negligible_blocks

B, H, D = 2, 2, 8


@pytest.mark.parametrize(
    ("columns", "ratio", "pinned", "expected"), [(10, 0.3, 0, 3), (10, 0.01, 2, 3), (10, 0.5, 10, 10), (7, 0.1, 0, 1), (30, 0.1, 0, 3)]
)
def test_kept_blocks(columns: int, ratio: float, pinned: int, expected: int) -> None:
    assert kept_blocks(columns, ratio, pinned) == expected


@pytest.mark.parametrize("pinned", [0, 2])
def test_the_map_holds_the_best_blocks_and_the_pinned_ones(pinned: int) -> None:
    q_mean, k_mean = torch.randn(B, H, 5, D), torch.randn(B, H, 9, D)
    chosen, left_out = block_map(q_mean, k_mean, kept=4, pinned=pinned, negligible=3)
    scores = q_mean @ k_mean.mT
    scores[..., :pinned] = math.inf
    assert torch.equal(chosen, scores.topk(4).indices.sort().values.int())
    assert torch.equal(left_out, scores.topk(3, largest=False).indices.sort().values.int())
    assert block_map(q_mean, k_mean, kept=4, pinned=pinned)[1].shape == (B, H, 5, 0)


def test_of_equal_blocks_the_first_are_kept_and_the_last_negligible() -> None:
    chosen, left_out = block_map(torch.ones(1, 1, 1, D), torch.ones(1, 1, 9, D), kept=3, pinned=1, negligible=2)
    assert (chosen.tolist(), left_out.tolist()) == ([[[[0, 1, 2]]]], [[[[7, 8]]]])


def test_nan_scores_are_chosen_last() -> None:
    k_mean = torch.randn(1, 1, 4, D)
    k_mean[:, :, 2] = math.nan
    chosen, left_out = block_map(torch.randn(1, 1, 1, D), k_mean, kept=3, negligible=1)
    assert (chosen.tolist(), left_out.tolist()) == ([[[[0, 1, 3]]]], [[[[2]]]])


@pytest.mark.parametrize(
    ("columns", "ratio", "kept", "pinned", "expected"),
    [(10, 0.3, 4, 0, 3), (10, 0.3, 4, 2, 2), (10, 0.0, 1, 0, 0), (10, 1.0, 4, 3, 6), (10, 0.9, 10, 10, 0)],
)
def test_negligible_blocks(columns: int, ratio: float, kept: int, pinned: int, expected: int) -> None:
    assert negligible_blocks(columns, ratio, kept, pinned) == expected


def test_density_counts_what_is_computed() -> None:
    tokens, pinned = 16 * 20, 40
    kept = kept_blocks(20, 0.25, -(-pinned // 16))
    rows = [20 if row < -(-pinned // 32) else kept for row in range(10)]
    assert density(tokens, 0.25, pinned, 32, 16) == sum(rows) / (10 * 20)
