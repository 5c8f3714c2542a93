"""When sparse attention pays: whole-number arithmetic, agreement with stored measurements."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from cost_formula import SLOW, modelled

from lite3r_plugin import Lite3RConfig
from lite3r_plugin.costs.attention import H100, NEVER
from lite3r_plugin.costs.model import BILLION, AttentionCosts, SparseShares, break_even_of

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize("keep_ratio", [0.1, 0.3, 1 / 3, 1.0])
def test_shares_are_those_of_the_site(keep_ratio: float) -> None:
    config = Lite3RConfig(keep_ratio={"a.*": keep_ratio, "*": 0.5}, block_means=True, block_k=64)
    shares = SparseShares.of(config, "a.0")
    assert shares.keep_ratio == pytest.approx(keep_ratio, abs=1e-9)
    assert shares.mean_share == 1 / 64
    assert SparseShares.of(config, "b").keep_ratio == 0.5
    assert SparseShares.of(config.replace(block_means=False), "a.0").mean_share == 0


@pytest.mark.parametrize("costs", [H100, SLOW])
@pytest.mark.parametrize(("keep_ratio", "mean_share"), [(0.1, 1 / 64), (0.3, 0.0)])
@pytest.mark.parametrize("width", [1024, 384])
def test_the_whole_numbers_say_what_the_formula_says(costs: AttentionCosts, keep_ratio: float, mean_share: float, width: int) -> None:
    config = Lite3RConfig(keep_ratio=keep_ratio, block_means=mean_share > 0)
    rule, compared = break_even_of(costs, SparseShares.of(config, "site")), set()
    assert mean_share in (0.0, 1 / config.block_k)
    for batch in (1, 7):
        for tokens in (500, 1374, 2748, 5496, 10992, 43968, 1_374_000):
            for queries, keys in itertools.product((0, tokens // 20, tokens // 2, tokens), repeat=2):
                critical = 1 - (1 - keep_ratio) * (1 - queries / tokens) * (1 - keys / tokens)
                share = critical + (1 - critical) * mean_share
                work = batch * width / 1024
                dense, sparse = work * modelled(costs, tokens, None), work * modelled(costs, tokens, share)
                sparse += costs.per_call * (1 - work)  # launches do not follow the size
                if abs(dense - sparse) > 0.01 * dense:
                    assert rule.pays(batch * width, tokens, queries, tokens, keys, tokens) == (sparse < dense)
                    compared.add(sparse < dense)
    assert compared == {True, False}


@pytest.mark.parametrize("pinned", [0, 7])
@pytest.mark.parametrize("tokens", [7, 10_000, 10_000_000])
def test_where_it_never_pays_it_never_does(tokens: int, pinned: int) -> None:
    assert not NEVER.pays(1024, tokens, pinned, tokens, pinned, tokens)


def test_a_frame_of_a_stream_pays_from_some_frames_on_since_others_are_prepared() -> None:
    rule = break_even_of(H100, SparseShares(BILLION // 10, 64))
    frame = 1041
    prepared = [rule.pays(1024, frame, 5, frames * frame, 5 * frames + 1036, frame) for frames in (1, 10, 100, 1000)]
    assert prepared == [False, False, True, True]
    anew = [rule.pays(1024, frame, 5, frames * frame, 5 * frames + 1036, frames * frame) for frames in (1, 10, 100, 1000)]
    assert not any(anew)  # linear costs grow as what attention saves


def test_an_h100_is_judged_as_it_was_measured() -> None:
    decided = set()
    report = json.loads((RESULTS / "h100_operator_keep0.1.json").read_text())
    width = report["conditions"]["heads"] * report["conditions"]["head_dim"]
    eager = {(r["tokens"], r["method"]): r["forward_ms"] for r in report["records"] if "forward_ms" in r}
    for tokens in {tokens for tokens, _ in eager}:
        pays = eager[tokens, "ours"] < eager[tokens, "SDPA cuDNN"]
        assert break_even_of(H100, SparseShares(BILLION // 10, 64)).pays(width, tokens, 0, tokens, 0, tokens) == pays, tokens
        decided.add(pays)
    assert decided == {True, False}
