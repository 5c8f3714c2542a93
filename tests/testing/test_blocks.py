"""The definition of a transformer block, and what is found where a block does something else."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from pre_norm_blocks import DIM, Block
from torch import nn

from lite3r_plugin import AttentionSite, FusedQKV, PreNormBlock
from lite3r_plugin.errors import AdapterError
from lite3r_plugin.testing import block_forward, check_blocks


def described(kind: str, scaled: bool) -> AttentionSite:
    up, down = ("mlp.w12", "mlp.w3") if kind == "swiglu" else ("mlp.0", "mlp.2")
    gains = dict(gain1="ls1.gamma", gain2="ls2.gamma") if scaled else {}
    return AttentionSite("1.attn", "frame", DIM // 2, FusedQKV(2), block=PreNormBlock("1", up, down, activation=kind, **gains))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "swiglu"])
@pytest.mark.parametrize("scaled", [True, False])
@torch.no_grad()
def test_what_a_block_does_is_compared_with_what_is_said(kind: str, scaled: bool) -> None:
    model = nn.Sequential(nn.Identity(), Block(kind, scaled)).eval()
    x, site = torch.randn(2, 10, DIM), described(kind, scaled)

    def check(site: AttentionSite) -> None:
        check_blocks(model, [dataclasses.replace(site, block=None), site], lambda model: model(x), 1e-5)

    check(site)
    torch.testing.assert_close(block_forward(model[1], site, x), model(x))
    others = {"gelu": "gelu_tanh", "gelu_tanh": "gelu"}
    wrong: list[dict[str, Any]] = [{"activation": others[kind]}] if kind in others else []
    wrong += [{"gain1": None}, {"gain1": "ls2.gamma", "gain2": "ls1.gamma"}] if scaled else []
    wrong += [{"norm2": "norm1", "norm1": "norm2"}]
    for change in wrong:
        with pytest.raises(AdapterError, match=r"site '1\.attn': the block '1' gives something else than described"):
            check(dataclasses.replace(site, block=dataclasses.replace(site.block, **change)))
    assert not model[1]._forward_hooks


@torch.no_grad()
def test_further_arguments_go_to_the_attention() -> None:
    model = nn.Sequential(nn.Identity(), Block("gelu", False)).eval()
    x, mask = torch.randn(2, 10, DIM), torch.ones(10, 10, dtype=torch.bool).tril()
    expected = model[1](x, mask)
    assert not torch.equal(expected, model(x))
    torch.testing.assert_close(block_forward(model[1], described("gelu", False), x, mask=mask), expected)
    check_blocks(model, [described("gelu", False)], lambda model: model[1](x, mask=mask), 1e-5)
