"""Sites that run the whole path themselves: what they ask of the host, and of the calls."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import Attention, Separate

from lite3r_plugin import AttentionSite, FusedQKV, Rope2D, SeparateQKV, apply_lite3r
from lite3r_plugin.attention.styles.projected import head_norm
from lite3r_plugin.attention.styles.registry import check_projections, style_of
from lite3r_plugin.errors import AdapterError
from lite3r_plugin.ops.dispatch import SlowPathWarning


def site(projections: Any, head_dim: int = 16) -> AttentionSite:
    return AttentionSite("a.0", "global", head_dim, projections)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (site(FusedQKV(4)), r"site 'a\.0': qkv\.out_features is 96, but 4 heads of 16 need 192; correct num_heads or head_dim"),
        (site(SeparateQKV(2)), "Attention has no child 'q_proj'"),
        (site(FusedQKV(2, out_drop="drop")), "has no child 'drop'"),
        (site(FusedQKV(2, positions="pos")), "the host's forward has no argument 'pos'"),
        (site(FusedQKV(16, rope=Rope2D()), head_dim=2), "a multiple of 4, not 2"),
    ],
)
def test_a_wrong_description_is_named(made: AttentionSite, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        check_projections(made, Attention(32, 2))


def test_a_right_description_passes() -> None:
    check_projections(site(FusedQKV(2, attn_drop="attn_drop")), Attention(32, 2))
    check_projections(site(SeparateQKV(2)), Separate(32, 2))


def test_only_a_rotary_embedding_is_worth_a_dense_site() -> None:
    host = Attention(32, 2)
    assert style_of(site(FusedQKV(2, rope=Rope2D())), host).fuses
    assert not style_of(site(FusedQKV(2)), host).fuses
    assert not style_of(site(FusedQKV(2, rope=Rope2D())), host, fuse=False).fuses


@pytest.mark.parametrize(
    ("norm", "kind"),
    [(nn.LayerNorm(16), "layer"), (nn.RMSNorm(16), "rms"), (nn.LayerNorm(8), None), (nn.LayerNorm((2, 16)), None), (nn.Identity(), None)],
)
def test_norms_that_the_kernel_knows(norm: nn.Module, kind: str | None) -> None:
    found = head_norm(norm, 16)
    assert (None if found is None else found.kind) == kind


def test_the_default_eps_of_an_rms_norm_is_torchs() -> None:
    found = head_norm(nn.RMSNorm(16), 16)
    assert found is not None
    assert found.eps == torch.finfo(torch.float32).eps


class Switched(Attention):
    """Has switches that are on, as forks have."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        flipped: bool = False,
        plain: bool = True,
        order: str | None = "natural",
        signs: Any = (1,),
        rope: Any = (None, None),
    ) -> Tensor:
        return super().forward(x.flip(1) * 2 if flipped or not plain or order != "natural" or signs != (1,) or any(rope) else x)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, None),
        ({"flipped": False, "plain": True, "order": "natural", "signs": (1,), "rope": (None, None)}, None),
        ({"rope": [None]}, None),
        ({"rope": (1, 2)}, "rope"),
        ({"signs": (2,)}, "signs"),
        ({"flipped": True}, "flipped"),
        ({"plain": False}, "plain"),
        ({"order": None}, "order"),
        ({"signs": None}, "signs"),
        ({"plain": None, "order": "other"}, "plain, order"),
    ],
)
def test_what_is_given_beside_the_tokens_counts_unless_it_is_as_by_default(given: dict[str, Any], said: str | None) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Switched(32, 2)), torch.randn(1, 24, 32)
    expected = model[0](x, **given)
    apply_lite3r(model, keep_ratio=1.0, sites=[AttentionSite("0", "global", 16, FusedQKV(2))])
    with contextlib.nullcontext() if said is None else pytest.warns(SlowPathWarning, match=f"it is given {said}$"):
        got = model[0](x, **given)
    torch.testing.assert_close(got, expected)
    assert model[0].calls.dense == (said is None)  # by the site's own code


class Dropping(Attention):
    def __init__(self, p: float) -> None:
        super().__init__(32, 2)
        self.out = nn.Sequential(nn.Linear(32, 32), nn.Dropout(p))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(self.out[1](x), mask)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_what_drops_by_chance_and_is_not_named_is_not_lost_in_training(p: float) -> None:
    model, x = nn.Sequential(Dropping(p)), torch.randn(1, 24, 32)
    apply_lite3r(model, keep_ratio=1.0, sites=[AttentionSite("0", "global", 16, FusedQKV(2))])
    with pytest.warns(SlowPathWarning, match=r"it has 'out\.1', which drops by chance and is not named") if p else contextlib.nullcontext():
        assert torch.equal(model.train()(x), model(x)) == (not p)
    assert torch.equal(model.eval()(x), model(x))


def test_what_dropped_by_chance_may_be_gone() -> None:
    """As LoRA that was unloaded, or a part that was exchanged."""
    model, x = nn.Sequential(Dropping(0.5)), torch.randn(1, 24, 32)
    apply_lite3r(model, keep_ratio=1.0, sites=[AttentionSite("0", "global", 16, FusedQKV(2))])
    model[0].out = nn.Linear(32, 32)
    assert torch.equal(model.train()(x), model(x))
    assert model[0].calls.dense == 2
