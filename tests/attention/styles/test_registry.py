"""Which style serves which class of projections; a style of somebody else is one line."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import Adapter, Attention, Toy, images, toy_adapter

from lite3r_plugin import AttentionSite, FusedQKV, Routed, SeparateQKV, apply_lite3r
from lite3r_plugin.attention.styles.base import ProjectionStyle, SiteModule
from lite3r_plugin.attention.styles.fused import FusedStyle
from lite3r_plugin.attention.styles.registry import STYLES, style_of
from lite3r_plugin.attention.styles.routed import RoutedStyle
from lite3r_plugin.attention.styles.separate import SeparateStyle
from lite3r_plugin.errors import AdapterError
from lite3r_plugin.testing import TEST_CONFIG

__all__ = ["toy_adapter"]  # the fixture


@dataclasses.dataclass(frozen=True)
class Interleaved(FusedQKV):
    """Somebody else's class of projections."""


class InterleavedStyle(FusedStyle):
    """q, k and v of a head side by side: ``qkv(x).view(B, N, H, 3, D)``."""

    def project(self, module: SiteModule, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        num_heads, dim = self.shape
        q, k, v = module.child(self.qkv)(x).unflatten(-1, (num_heads, 3, dim)).permute(3, 0, 2, 1, 4).unbind(0)
        return q, k, v


@pytest.mark.parametrize(
    ("projections", "style"),
    [(FusedQKV(2), FusedStyle), (SeparateQKV(2), SeparateStyle), (Routed(), RoutedStyle), (Interleaved(2), FusedStyle)],
)
def test_the_class_decides(projections: Any, style: type[ProjectionStyle]) -> None:
    """A derived class is served as the one that it is derived from, unless it has a style of its own."""
    site = AttentionSite("a", "global", 16, projections)
    assert type(style_of(site, Attention(32, 2))) is style
    assert type(style_of(site, Attention(32, 2), fuse=False)) is RoutedStyle


def test_each_site_has_a_style_of_its_own() -> None:
    site, host = AttentionSite("a", "global", 16, FusedQKV(2)), Attention(32, 2)
    assert style_of(site, host) is not style_of(site, host)
    assert style_of(site, host).argument_names == ("x", "mask")


def test_a_class_without_a_style_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(STYLES, FusedQKV)
    with pytest.raises(AdapterError, match="site 'a': no projection style serves FusedQKV"):
        style_of(AttentionSite("a", "global", 16, FusedQKV(2)), Attention(32, 2))


def test_another_style_is_one_line(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    class Host(Attention):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return self.proj(out.transpose(1, 2).flatten(2))

    monkeypatch.setitem(STYLES, Interleaved, InterleavedStyle)
    adapter.answer = lambda model: [AttentionSite(f"cross.{i}", "global", 16, Interleaved(2)) for i in range(2)]
    model = Toy(make=Host).eval()
    with torch.no_grad():
        expected = model(images())
        apply_lite3r(model, TEST_CONFIG, keep_ratio=1.0)
        assert type(model.cross[0].style) is InterleavedStyle
        torch.testing.assert_close(model(images()), expected)
