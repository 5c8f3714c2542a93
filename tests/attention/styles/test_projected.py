"""Sites that run the whole path themselves: what they ask of the host, and of the calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from toys import Attention, Separate

from lite3r_plugin import AttentionSite, FusedQKV, Rope2D, SeparateQKV
from lite3r_plugin.attention.styles.projected import head_norm
from lite3r_plugin.attention.styles.registry import check_projections, style_of
from lite3r_plugin.errors import AdapterError


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
