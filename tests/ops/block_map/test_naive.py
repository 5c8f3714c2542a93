"""The definition of the block map."""

from __future__ import annotations

import math

import pytest
import torch

from lite3r_plugin.ops.block_map import (
    SegmentMask,
    block_map,
    density,
    kept_blocks,
    key_spread,
    masked_block_map,
    masked_density,
    naive,
    negligible_blocks,
)  # fmt: skip
from lite3r_plugin.ops.block_map.naive import masked_counts

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


@pytest.mark.parametrize(("queries", "pinned"), [(320, 40), (320, 0), (64, 40), (64, 90)])
def test_density_counts_what_is_computed(queries: int, pinned: int) -> None:
    keys, of_keys = 16 * 20, 40
    kept = kept_blocks(20, 0.25, -(-of_keys // 16))
    rows = [20 if row < -(-pinned // 32) else kept for row in range(queries // 32)]
    assert density(queries, keys, 0.25, pinned, of_keys, 32, 16) == sum(rows) / (len(rows) * 20)


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.3, 0.7, 1.0])
def test_of_the_blocks_that_a_mask_allows_as_many_are_chosen_as_without_one(ratio: float) -> None:
    free = torch.arange(1, 2000)
    kept, negligible = masked_counts(free, ratio, ratio)
    assert kept.tolist() == [kept_blocks(n, ratio, 0) for n in free.tolist()]
    assert negligible.tolist() == [negligible_blocks(n, ratio, k, 0) for n, k in zip(free.tolist(), kept.tolist(), strict=True)]


@pytest.mark.parametrize(("pinned", "rows"), [(40, 2), (0, 0)])
def test_density_with_a_mask_counts_what_is_computed(pinned: int, rows: int) -> None:
    """Blocks that a query block keeps as one of the map, and all that pinned ones may see."""
    frames = torch.arange(320) // 70
    mask = SegmentMask(frames).ordered(None, None)
    chosen, _ = masked_block_map(torch.randn(1, 1, 10, D), torch.randn(1, 1, 20, D), keep_ratio=0.25, mask=mask.in_blocks(32, 16), pinned=3)
    seen = (~mask.in_blocks(32, 16).forbidden(slice(None))).sum(-1)
    expected = int(seen[:rows].sum() + (chosen[:, :, rows:] >= 0).sum())
    assert masked_density(mask, 0.25, pinned, 40, 32, 16) == expected / (10 * 20)
    everything = SegmentMask(frames, after=None).ordered(None, None)
    assert masked_density(everything, 0.25, pinned, 40, 32, 16) == density(320, 320, 0.25, pinned, 40, 32, 16)


def test_by_error_a_block_is_kept_whose_mean_hides_much() -> None:
    """Block 0 has the highest scores, all alike, which its mean gives exactly; scores vary in block 1, and in block 2 around lower ones."""
    k = torch.tensor([[4.0, 4.0, 0.0, 6.0, -3.0, 3.0]]).mT[None, None] * torch.eye(D)[0]
    q = torch.eye(D)[None, None, :1].expand(-1, -1, 4, -1)
    means = q[:, :, :1], k.unflatten(2, (3, 2)).mean(3)
    by_error = key_spread(k, scale=1.0, block_k=2)
    for kept, expected in ((1, [1]), (2, [1, 2]), (3, [0, 1, 2])):
        assert block_map(*means, kept=kept, by_error=by_error)[0].flatten().tolist() == expected
    assert block_map(*means, kept=1)[0].item() == 0


@pytest.mark.parametrize("keys", [40, 37])
def test_scores_by_error_are_written_out(keys: int) -> None:
    """Up to what is the same for all blocks of a row: the attention that a block gets, times the spread of its scores."""
    q_mean, k = torch.randn(B, H, 2, D, dtype=torch.float64), torch.randn(B, H, keys, D, dtype=torch.float64)
    blocks = k.split(8, 2)
    found = naive.scores_of(q_mean, torch.stack([x.mean(2) for x in blocks], 2), key_spread(k, scale=0.7, block_k=8))
    for row in range(2):
        query = 0.7 * q_mean[:, :, row]
        scores = [(query[:, :, None] @ x.mean(2)[..., None])[..., 0, 0] for x in blocks]
        variances = [(query.square() * x.var(2, correction=0)).sum(-1) for x in blocks]
        masses = torch.stack([x.shape[2] * (s + v / 2).exp() for x, s, v in zip(blocks, scores, variances, strict=True)], -1)
        expected = masses / masses.sum(-1, keepdim=True) * torch.stack(variances, -1).sqrt()
        torch.testing.assert_close(found[:, :, row].softmax(-1), expected / expected.sum(-1, keepdim=True))


def test_by_error_blocks_of_equal_keys_come_last() -> None:
    """Which their means stand for exactly, whatever their scores."""
    k = torch.randn(1, 1, 4, 4, D)
    k[:, :, 2] = 9.0
    means = torch.ones(1, 1, 1, D), k.mean(3)
    assert block_map(*means, kept=3, by_error=key_spread(k.flatten(2, 3), scale=1.0, block_k=4))[0].tolist() == [[[[0, 1, 3]]]]


def test_by_error_slabs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    k = torch.randn(B, H, 37, D)
    by_error, means = key_spread(k, scale=0.3, block_k=8), (torch.randn(B, H, 5, D), torch.randn(B, H, 5, D))
    whole = block_map(*means, kept=3, pinned=1, by_error=by_error)[0]
    monkeypatch.setattr(naive, "SLAB_BYTES", 1)
    assert torch.equal(block_map(*means, kept=3, pinned=1, by_error=by_error)[0], whole)


def test_by_error_nan_is_chosen_last() -> None:
    q, k = torch.randn(1, 1, 4, D), torch.randn(1, 1, 16, D)
    k[:, :, 5] = math.nan
    by_error, means = key_spread(k, scale=1.0, block_k=4), (q.mean(2, True), k.unflatten(2, (4, 4)).mean(3))
    assert block_map(*means, kept=3, by_error=by_error)[0].tolist() == [[[[0, 2, 3]]]]
