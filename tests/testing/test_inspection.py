"""`inspect_model` sees where a model attends, and writes an adapter that passes."""

from __future__ import annotations

from typing import Any

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


def test_one_site_that_does_more_and_one_that_is_left_to_the_host_do_not_spoil_the_others(toy: Toy) -> None:
    """Attention that needs coordinates, and one whose keys are its own tokens in the first call alone."""

    class Placed(Attention):
        def forward(self, x: Tensor, place: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(x + place, mask)

    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            q, k, v = (f(t).unflatten(-1, (2, -1)).transpose(1, 2) for f, t in ((self.q, x), (self.k, y), (self.v, y)))
            return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    class Model(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.memory = Memory()
            self.placed = Placed(32, 2)

        def forward(self, images: Tensor, **options: Any) -> Tensor:
            x = self.embed(images.flatten(0, 1)).flatten(2).transpose(1, 2)
            x = self.frame[0](torch.cat((self.special.expand(x.shape[0], -1, -1), x), 1))
            x = x + self.placed(x, torch.ones(1))
            for y in (x.roll(1, 1), torch.cat((x, x), 1)):
                x = x + self.memory(x, y)
            return self.head(x)

    seen = inspect_model(Model(), shape=SHAPE)
    assert [(site.fqn, type(site.projections)) for site in seen.sites] == [("frame.0", FusedQKV), ("placed", Routed)]
    assert isinstance(seen.report, AdapterReport)
    refused = {candidate.fqn: candidate.refused for candidate in seen.candidates}
    assert "cross-attention" in str(refused["memory"])
    assert "left out: it is cross-attention" in str(seen)


def test_a_model_without_attention(toy: Toy) -> None:
    toy.cross = toy.frame = nn.ModuleList()
    seen = inspect_model(toy, (torch.rand(SHAPE),))
    assert (seen.sites, seen.adapter) == ((), "")
    assert "none" in str(seen)


def test_a_model_that_takes_no_images() -> None:
    with pytest.raises(InputError, match=r"Linear does not run on .*\[1, 2, 3, 112, 224\].*Let the factory return a pair"):
        inspect_model(nn.Linear(2, 2))


def test_a_block_that_is_in_the_model_twice() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 32, 8, 8)
            self.blocks = nn.ModuleList([Attention(32, 2)] * 2)

        def forward(self, images: Tensor) -> Tensor:
            x = self.embed(images.flatten(0, 1)).flatten(2).mT.flatten(0, 1)[None]
            for block in self.blocks:
                x = x + block(x)
            return x

    torch.manual_seed(0)
    assert [site.fqn for site in inspect_model(Shared().eval(), shape=(1, 3, 3, 48, 64)).sites] == ["blocks.0"]
