"""`inspect_model` sees where a model attends, and writes an adapter that passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from toys import Attention, Toy

from lite3r_plugin import FusedQKV, Routed, TokenSource
from lite3r_plugin.errors import InputError
from lite3r_plugin.testing import AdapterReport, inspect_model

SHAPE = (1, 3, 3, 32, 40)


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def test_an_adapter_for_a_plain_model_passes(toy: Toy) -> None:
    seen = inspect_model(toy, shape=SHAPE)
    assert isinstance(seen.report, AdapterReport)
    assert seen.report.scopes == {"frame": 2, "global": 2}
    assert not seen.report.unchecked
    assert {site.tokens for site in seen.sites} == {TokenSource("embed", (4, 4), special_tokens=2)}
    assert {site.projections for site in seen.sites} == {FusedQKV(2, attn_drop="attn_drop")}
    assert 'AttentionSite(f"{dot}cross.{i}", "global", 16, FusedQKV(2, attn_drop="attn_drop"), tokens)' in seen.adapter
    assert toy.training


def test_what_it_prints(toy: Toy) -> None:
    text = str(inspect_model(toy, shape=SHAPE))
    for expected in (
        "Toy on [1, 3, 3, 32, 40]",
        "cross.{i}  (2 of class Attention)\n    q [B, H, N, D] = [1, 2, 246, 16], 246 keys\n    qkv: 32 to 96; proj: 32 to 32",
        "embed: [3, 3, 32, 40] (Conv2d, patches of (4, 4))",
        "for i in range(len(module.cross)):",
        "check_adapter: adapter 'sites=' is fine",
    ):
        assert expected in text


def test_attention_that_does_more_is_routed_and_what_cannot_be_sparse_is_left_out(toy: Toy) -> None:
    class Scaled(Attention):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(x, mask) * 2

    toy.cross = nn.ModuleList([Scaled(32, 2), Attention(32, 2, "causal")])
    toy.frame = nn.ModuleList([Attention(32, 2, "eager"), Attention(32, 2, "twice")])
    seen = inspect_model(toy, shape=SHAPE)
    assert [(site.fqn, site.projections) for site in seen.sites] == [("cross.0", Routed(2))]
    assert isinstance(seen.report, AdapterReport)
    assert seen.eager == ("frame.0",)
    refused = {candidate.fqn: candidate.refused for candidate in seen.candidates}
    assert refused == {
        "cross.0": None, "cross.1": "causal order", "frame.1": "2 calls of scaled_dot_product_attention in one forward"
    }  # fmt: skip
    assert "left out: causal order" in str(seen)


def test_a_model_without_attention(toy: Toy) -> None:
    toy.cross = toy.frame = nn.ModuleList()
    seen = inspect_model(toy, (torch.rand(SHAPE),))
    assert (seen.sites, seen.adapter) == ((), "")
    assert "none" in str(seen)


def test_a_model_that_takes_no_images() -> None:
    with pytest.raises(InputError, match=r"Linear does not run on .*\[1, 2, 3, 112, 224\].*Let the factory return a pair"):
        inspect_model(nn.Linear(2, 2))
