"""The kernels of the block map against its definition, to the bit: on a GPU as compiled, elsewhere interpreted."""

from __future__ import annotations

import math

import pytest
import torch
from pairs import each, grid
from sla_cases import DEVICE

from lite3r_plugin.errors import BackendError
from lite3r_plugin.ops.block_map import naive

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
