"""Trials of blocks: which arguments are known to reach the attention."""

from __future__ import annotations

import pytest
import torch
from pre_norm_blocks import DIM, Block
from torch import Tensor, nn
from toys import Attention

from lite3r_plugin import AttentionSite, FusedQKV, PreNormBlock
from lite3r_plugin.fp8.trial import BlockTrials

SITE = AttentionSite("b.attn", "global", 16, FusedQKV(2), block=PreNormBlock("b", "mlp.0", "mlp.2", gain1="ls1.gamma", gain2="ls2.gamma"))


class Halves(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None, share: float = 0.5) -> Tensor:
        return super().forward(x, mask) * share


class UsesTheMask(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) + (0 if mask is None else 1)


class KeepsTheMask(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


class Fails(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        raise ValueError("only on Tuesdays")


def test_what_is_passed_on() -> None:
    verdict = BlockTrials().of(SITE, Block("gelu", True))
    assert (verdict.refused, verdict.passed) == (None, {"mask"})
    for kind in (UsesTheMask, KeepsTheMask):
        verdict = BlockTrials().of(SITE, kind("gelu", True))
        assert (verdict.refused, verdict.passed) == (None, frozenset())


class SwitchedAttention(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None, plain: bool = True) -> Tensor:
        return super().forward(x if plain else 2 * x, mask)


class SwitchesOff(Block):
    def __init__(self) -> None:
        super().__init__("gelu", True)
        self.attn = SwitchedAttention(DIM, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), mask, False))
        return x + self.ls2(self.mlp(self.norm2(x)))


def test_what_is_refused() -> None:
    assert "it gives its attention ['plain']" in str(BlockTrials().of(SITE, SwitchesOff()).refused)
    assert "differs from the block's own forward by" in str(BlockTrials().of(SITE, Halves("gelu", True)).refused)
    assert "cannot be tried (ValueError: only on Tuesdays)" in str(BlockTrials().of(SITE, Fails("gelu", True)).refused)


@pytest.mark.parametrize("size", [1e-5, 1.0])
def test_small_gains_hide_nothing(size: float) -> None:
    block = Halves("gelu", True)
    for scale in (block.ls1, block.ls2):
        nn.init.constant_(scale.gamma, size)
    assert BlockTrials().of(SITE, block).refused is not None


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        right, wrong = Block("gelu_tanh", True), Halves("gelu", True)
    trials = BlockTrials()
    assert "differs" in str(trials.of(SITE, right).refused)  # the description says gelu
    assert trials.of(SITE, wrong).refused is not None
    assert DIM == 32
