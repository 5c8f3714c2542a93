"""The kernels of the block map against its definition, to the bit: on a GPU as compiled, elsewhere interpreted."""

from __future__ import annotations

import math

import pytest
import torch
from pairs import each, grid
from sla_cases import DEVICE, DTYPES

from lite3r_plugin.errors import BackendError
from lite3r_plugin.ops.block_map import SegmentMask, masked_block_map, naive
from lite3r_plugin.ops.block_map.kernel_mask import KernelMask

kernels = pytest.importorskip("lite3r_plugin.ops.block_map.kernels")
transpose_kernels = pytest.importorskip("lite3r_plugin.ops.block_map.transpose_kernels")

CASES = ("random", "equal", "with nan", "with infinity", "signed zeros")
# rows, columns, kept, pinned
SIZES = ((3, 7, 3, 1), (5, 40, 40, 2), (2, 33, 1, 0), (1, 1, 1, 1), (4, 100, 17, 5), (2, 21469, 430, 100))


@pytest.mark.parametrize(("sizes", "case", "left_out"), grid(SIZES, CASES, (0.0, 0.3, 1.0)), ids=str)
def test_block_map(sizes: tuple[int, int, int, int], case: str, left_out: float) -> None:
    """`left_out`: the share of the blocks that are not kept which is negligible."""
    rows, columns, kept, pinned = sizes
    q, k = torch.randn(1, 2, rows, 32, device=DEVICE), torch.randn(1, 2, columns, 32, device=DEVICE)
    if case == "equal":
        k = k[:, :, :1].expand_as(k)
    elif case == "with nan":
        k[:, :, columns // 2] = math.nan
    elif case == "with infinity":
        q, k[:, :, 0] = q.abs(), math.inf
    elif case == "signed zeros":
        q, k = q[..., :1] * 0, k[..., :1]
    negligible = int(left_out * (columns - kept))
    critical, others = naive.block_map(q, k, kept=kept, pinned=pinned, negligible=negligible)
    found = kernels.block_map_with_bits(q, k, kept=kept, pinned=pinned, negligible=negligible)
    assert torch.equal(found.kv_indices, critical)
    assert (found.skipped is found.bits) == (negligible == 0)
    for bits, expected in ((found.bits, critical), (found.skipped, torch.cat((critical, others), -1))):
        unpacked = ((bits[..., None] >> torch.arange(32, device=DEVICE)) & 1).flatten(-2).bool()
        assert torch.equal(unpacked, torch.zeros_like(unpacked).scatter(-1, expected.long(), True))
        assert unpacked.sum(-1).eq(expected.shape[-1]).all()


def unpacked(bits: torch.Tensor, columns: int) -> torch.Tensor:
    """A bit set as ``[..., columns]`` bool, whose other bits are zero."""
    found = ((bits[..., None] >> torch.arange(32, device=DEVICE)) & 1).flatten(-2).bool()
    assert not found[..., columns:].any()
    return found[..., :columns]


def listed(indices: torch.Tensor, columns: int) -> torch.Tensor:
    """Indices as ``[..., columns]`` bool; -1 stands for none."""
    chosen = torch.where(indices < 0, columns, indices).long()
    return torch.zeros(*indices.shape[:-1], columns + 1, dtype=torch.bool, device=DEVICE).scatter(-1, chosen, True)[..., :columns]


@pytest.mark.parametrize(
    ("tokens", "kind", "pinned", "left_out", "case"),
    grid(((97, 260), (260, 97), (1, 1), (700, 700)), ("causal", "window", "sink", "nothing"), (0, 40), (0.0, 0.3), CASES[:3]), ids=str,
)  # fmt: skip
def test_block_map_with_a_mask(
    tokens: tuple[int, int], kind: str, pinned: int, left_out: float, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """To the bit, in slabs too; pinned query blocks have all that they may see, and those that see nothing the first one."""
    monkeypatch.setattr(kernels, "SLAB_BYTES", 1)
    queries, keys = (torch.arange(n, device=DEVICE) // 45 for n in tokens)
    options = dict(causal={}, window=dict(before=1, after=1), sink=dict(before=1, sink=0), nothing=dict(before=0, after=0))[kind]
    mask = SegmentMask(queries, keys + 2 * (kind == "nothing"), **options).ordered(None, None)  # type: ignore[arg-type]
    rows, columns = -(-tokens[0] // 32), -(-tokens[1] // 16)
    q, k = torch.randn(1, 2, rows, 32, device=DEVICE), torch.randn(1, 2, columns, 32, device=DEVICE)
    if case == "equal":
        q, k = q.round(), k[:, :, :1].expand_as(k).round()  # products are exact, in slabs of any size
    elif case == "with nan":
        k[:, :, columns // 2] = math.nan
    pinned_queries, pinned_keys = min(rows, pinned // 32), min(columns, pinned // 16)
    critical, negligible = masked_block_map(
        q, k, keep_ratio=0.3, mask=mask.in_blocks(32, 16), pinned=pinned_keys, negligible_ratio=left_out
    )
    kernel_mask = KernelMask.of(
        mask, keep_ratio=0.3, negligible_ratio=left_out, pinned_queries=pinned_queries, pinned_keys=pinned_keys, block_q=32, block_k=16,
        over_all=False,
    )  # fmt: skip
    found = kernels.masked_block_map_with_bits(q, k, kernel_mask)
    blocks = mask.in_blocks(32, 16)
    allowed, forbidden = blocks.allowed(slice(None)), blocks.forbidden(slice(None))
    expected, others = listed(critical, columns), listed(negligible, columns)
    expected[:, :, :pinned_queries] = ~forbidden[:pinned_queries]
    others[:, :, :pinned_queries] = False
    marginal = allowed & ~expected & ~others
    expected[:, :, forbidden.all(-1), 0] = True
    assert torch.equal(unpacked(found.bits, columns), expected)
    assert torch.equal(unpacked(found.skipped, columns), ~marginal)
    assert torch.equal(kernel_mask.near.expand(1, 2, -1), expected.sum(-1))
    for near, row, bits in zip(kernel_mask.near.tolist(), found.kv_indices[0, 1], expected[0, 1], strict=True):
        assert torch.equal(row[:near].long(), bits.nonzero().flatten())
    assert torch.equal(unpacked(kernel_mask.not_whole(), columns), ~allowed)
    assert torch.equal(kernel_mask.means[0].expand(1, 2, -1), marginal.sum(-1))
    column = torch.arange(columns, device=DEVICE)
    outside = (column < kernel_mask.means[1][:, None]) | (column >= kernel_mask.means[2][:, None])
    assert not (marginal & outside).any()
    check_lists(found.bits, expected, kernel_mask)


def check_lists(bits: torch.Tensor, expected: torch.Tensor, mask: KernelMask) -> None:
    """The map by key block: every pair once, in order; there is room for all early parts."""
    columns = expected.shape[-1]
    work = transpose_kernels.by_key_block(bits, columns=columns, kept=columns, pinned=1, mask=mask)
    assert work.masked_part is not None
    part = int(work.masked_part)
    assert part == 2 * -(-int(mask.near.sum()) // columns)
    lists, starts, _, early_columns = (x.cpu().flatten(0, 1) for x in work[:4])
    for head, of_head in enumerate(expected.cpu().flatten(0, 1)):
        slots = []
        for column in range(columns):
            rows = of_head[:, column].nonzero().flatten()
            assert torch.equal(lists[head, starts[head, column] : starts[head, column + 1]].long(), rows)
            slots += [column] * (max(0, len(rows) - 1) // part)
        assert early_columns[head].tolist() == slots + [columns] * (early_columns.shape[-1] - len(slots))


def test_the_map_in_slabs_without_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(2, 2, 5, 32, device=DEVICE), torch.randn(2, 2, 50, 32, device=DEVICE)
    monkeypatch.setattr(kernels, "SLAB_BYTES", 1)
    monkeypatch.setattr(kernels, "MAX_SLABS", 2)
    indices, bits, skipped = kernels.block_map_with_bits(q, k, kept=9, pinned=2, negligible=3, bits=False)
    assert bits is None
    assert skipped is None
    assert torch.equal(indices, naive.block_map(q, k, kept=9, pinned=2)[0])


def test_a_sequence_too_long_for_the_map_says_what_to_do() -> None:
    q, k = torch.zeros(1, 1, 1, 4, device=DEVICE), torch.zeros(1, 1, kernels.MAX_COLUMNS + 1, 4, device=DEVICE)
    with pytest.raises(BackendError, match="has 32769 key blocks, the kernels take 32768; use a larger block_k"):
        kernels.block_map_with_bits(q, k, kept=1)


@pytest.mark.parametrize(("sizes", "at_once"), each([(1, 1, 1, 0), (7, 40, 3, 2), (130, 33, 1, 0), (9, 70, 70, 9)], [32, 1024]), ids=str)
def test_the_map_by_key_block(sizes: tuple[int, int, int, int], at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pair once, in order; early parts are all but the last part of each list."""
    rows, columns, kept, pinned = sizes
    monkeypatch.setattr(transpose_kernels, "COLUMNS", at_once)
    chosen = torch.rand(1, 2, rows, columns).argsort(-1)[..., :kept].sort(-1).values
    mask = torch.zeros(1, 2, rows, columns, dtype=torch.int64).scatter(-1, chosen, 1)
    words = torch.nn.functional.pad(mask, (0, -columns % 32)).unflatten(-1, (-1, 32)) << torch.arange(32)
    bits = words.sum(-1).to(torch.int32).to(DEVICE)
    assert torch.equal(transpose_kernels.indices_of(bits, kept).cpu().long(), chosen)
    work = transpose_kernels.by_key_block(bits, columns=columns, kept=kept, pinned=pinned)
    lists, starts, early_starts, early_columns = (x.cpu().flatten(0, 1) for x in work[:4])
    mask[:, :, :pinned] = 1
    for head, of_head in enumerate(mask.flatten(0, 1)):
        slots = []
        for column in range(columns):
            expected = of_head[:, column].nonzero().flatten()
            assert torch.equal(lists[head, starts[head, column] : starts[head, column + 1]].long(), expected)
            early = max(0, len(expected) - 1) // work.part
            assert early_starts[head, column + 1] - early_starts[head, column] == early
            slots += [column] * early
        assert early_columns[head].tolist() == slots + [columns] * (early_columns.shape[-1] - len(slots))


@pytest.mark.parametrize(("tokens", "block", "dtype"), grid((1, 16, 75), (16, 64), DTYPES), ids=str)
def test_the_spread_of_keys(tokens: int, block: int, dtype: torch.dtype) -> None:
    """Of what is padded with anything, whose last block is short."""
    k = torch.randn(1, 2, 128, 32, device=DEVICE).to(dtype)
    expected = naive.key_spread(k[:, :, :tokens], scale=0.3, block_k=block)
    torch.testing.assert_close(kernels.key_spread(k, tokens=tokens, scale=0.3, block_k=block), expected)


def test_the_map_by_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """In slabs. Scores are far enough from each other for both to choose the same."""
    q, k = 3 * torch.randn(2, 2, 160, 32, device=DEVICE), torch.randn(2, 2, 256, 32, device=DEVICE)
    means = [x.unflatten(2, (-1, size)).mean(3) for x, size in ((q, 32), (k, 16))]
    by_error = naive.key_spread(k, scale=0.3, block_k=16)
    monkeypatch.setattr(kernels, "SLAB_BYTES", 1)
    monkeypatch.setattr(kernels, "MAX_SLABS", 2)
    found = kernels.block_map_with_bits(*means, kept=6, pinned=1, by_error=by_error)
    assert torch.equal(found.kv_indices, naive.block_map(*means, kept=6, pinned=1, by_error=by_error)[0])
    assert not torch.equal(found.kv_indices, naive.block_map(*means, kept=6, pinned=1)[0])


def test_the_map_by_error_with_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """In slabs, of frames that end within blocks, the last ones with keys that are by far the largest."""
    frames = torch.arange(256, device=DEVICE) // 45
    q, k = 3 * torch.randn(2, 2, 256, 32, device=DEVICE), torch.randn(2, 2, 256, 32, device=DEVICE)
    k[:, :, frames > 3] *= 20
    means = [x.unflatten(2, (-1, size)).mean(3) for x, size in ((q, 32), (k, 16))]
    by_error, mask = naive.key_spread(k, scale=0.3, block_k=16), SegmentMask(frames).ordered(None, None)
    monkeypatch.setattr(kernels, "SLAB_BYTES", 1)
    monkeypatch.setattr(kernels, "MAX_SLABS", 3)
    kernel_mask = KernelMask.of(
        mask, keep_ratio=0.3, negligible_ratio=0.0, pinned_queries=0, pinned_keys=1, block_q=32, block_k=16, over_all=False
    )
    found = unpacked(kernels.masked_block_map_with_bits(*means, kernel_mask, by_error).bits, 16)
    options = dict(keep_ratio=0.3, mask=mask.in_blocks(32, 16), pinned=1)
    assert torch.equal(found, listed(masked_block_map(*means, **options, by_error=by_error)[0], 16))
    assert not torch.equal(found, listed(masked_block_map(*means, **options)[0], 16))
