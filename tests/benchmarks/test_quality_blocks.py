"""`benchmarks/quality_blocks.py`: ways of choosing keep as much as they may, and what is said of them is true of the operator."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from lite3r_plugin import TokenLayout, Views
from lite3r_plugin.attention.inputs import AttentionInputs
from lite3r_plugin.ops.sla import sparse_linear_attention
from lite3r_plugin.tokens.layout import Pinned, token_order

KEEP, PINNED = 0.3, 70
LAYOUT = TokenLayout((Views((16, 16), count=4, special_tokens=5),))


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("quality_blocks")


@pytest.fixture
def blocks(study: ModuleType) -> Any:
    tokens = 4 * LAYOUT.parts[0].tokens_per_view
    q, k, v = torch.randn(3, 1, 2, tokens, 32)
    order = token_order(LAYOUT)
    # near tokens are alike, as in images
    q, k = (x.cumsum(2) / 4 for x in (q, k))
    site = SimpleNamespace(order=lambda *_: order, pinned=lambda _: Pinned(PINNED, PINNED))
    return study.Blocks(site, AttentionInputs(q, k, v, layout=LAYOUT)), (q, k, v, order)


def test_every_way_keeps_the_same_share(study: ModuleType, blocks: Any) -> None:
    b = blocks[0]
    oracle = study.truth(b)
    torch.testing.assert_close(oracle["mass"].exp().sum(-1), torch.ones(2, len(b.rows)))
    maps = {name: study.chosen(b, way, KEEP, oracle) for name, way in study.WAYS.items()}
    count = b.pinned + b.free(KEEP)
    for name, kept in maps.items():
        assert kept[..., : b.pinned].all(), name
        assert kept.float().sum(-1).mean() == count, name
        assert "threshold" in name or kept.sum(-1).eq(count).all(), name
    assert len({kept.numpy().tobytes() for kept in maps.values()}) > len(maps) // 2
    recall, errors, _ = study.compare(b, list(maps.values()), branch=False)
    of = dict(zip(maps, recall.tolist(), strict=True))
    assert of["oracle mass, threshold a site"] >= of["oracle mass"] >= max(x for name, x in of.items() if "threshold" not in name)
    error = dict(zip(maps, errors[:, 0].tolist(), strict=True))
    assert error["oracle error"] < error["mean"]


def test_errors_are_those_of_the_operator(study: ModuleType, blocks: Any) -> None:
    b, (q, k, v, order) = blocks
    mean, everything = study.chosen(b, study.WAYS["mean"], KEEP, {}), torch.ones(2, len(b.rows), b.columns, dtype=torch.bool)
    recall, errors, _ = study.compare(b, [mean, everything], branch=False)
    options: dict[str, Any] = dict(order=order, pinned_tokens=PINNED, block_means=True)
    sparse, dense = (sparse_linear_attention(q, k, v, keep_ratio=keep, **options)[0][:, order.long()] for keep in (KEEP, 1.0))
    first = b.pinned_rows * study.BLOCK_Q
    expected = [x[:, first:].square().sum().double() for x in (sparse - dense, dense)]
    torch.testing.assert_close(errors[0], torch.stack(expected), rtol=1e-3, atol=0)
    assert errors[1, 0] < 1e-8 * errors[1, 1]
    assert recall[1] == pytest.approx(1)
    torch.testing.assert_close(study.Bench._by_rows(None, b, mean)[:, first:], sparse[:, first:], rtol=1e-4, atol=1e-5)


def test_the_stored_page_is_the_one_of_what_is_stored(study: ModuleType) -> None:
    report = importlib.import_module("quality_report")
    page = report.tried(json.loads(report.BLOCKS.read_text()), json.loads(report.STORED.read_text()))
    assert page == report.BLOCKS_PAGE.read_text(), "run: python benchmarks/quality_report.py"
