"""The definition of a transformer block, and what is found where a block does something else."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import Attention

from lite3r_plugin import AttentionSite, FusedQKV, PreNormBlock
from lite3r_plugin.errors import AdapterError
from lite3r_plugin.testing import block_forward, check_blocks

DIM = 32


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(DIM, 96), nn.Linear(48, DIM)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    """As DINOv2's; `kind` is the activation."""

    def __init__(self, kind: str, scaled: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM, bias=False)
        nn.init.uniform_(self.norm1.weight, 0.5, 2)
        self.attn = Attention(DIM, 2)
        self.ls1, self.ls2 = (LayerScale() if scaled else nn.Identity() for _ in range(2))
        act = nn.GELU(approximate="tanh" if kind == "gelu_tanh" else "none")
        self.mlp = SwiGLU() if kind == "swiglu" else nn.Sequential(nn.Linear(DIM, 64), act, nn.Linear(64, DIM))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), mask))
        return x + self.ls2(self.mlp(self.norm2(x)))


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
