"""VGGT-Omega, by a double of its structure; the real code wherever it can be imported."""

from __future__ import annotations

from typing import Any

import hosts
import pytest
import torch
from torch import Tensor, nn

from lite3r_plugin import LayoutFunction, TokenSource
from lite3r_plugin.adapter import find_sites
from lite3r_plugin.errors import LayoutError
from lite3r_plugin.testing import check_adapter

REGISTERS, PATCH = 16, 16
REGISTER_LAYERS = {1}


class Aggregator(nn.Module):
    """Frame and inter-frame blocks in turn; some of the latter are given the camera and register tokens alone."""

    def __init__(self, dim: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.patch_embed = hosts.Patches(PATCH, dim)
        self.frame_blocks = nn.ModuleList(hosts.Block(hosts.PosAttention(dim, 2), dim) for _ in range(depth))
        self.inter_frame_blocks = nn.ModuleList(hosts.Block(hosts.PosAttention(dim, 2), dim) for _ in range(depth))
        self.inter_frame_attention_types = ["register" if i in REGISTER_LAYERS else "global" for i in range(depth)]
        self.patch_size, self.patch_token_start = PATCH, 1 + REGISTERS
        self.special = nn.Parameter(torch.randn(1, 1 + REGISTERS, dim))

    def forward(self, images: Tensor) -> Tensor:
        batch, views = images.shape[:2]
        x = self.patch_embed(images.flatten(0, 1))
        x = torch.cat((self.special.expand(len(x), -1, -1), x), 1)
        for frame, across, kind in zip(self.frame_blocks, self.inter_frame_blocks, self.inter_frame_attention_types, strict=True):
            x = frame(x).unflatten(0, (batch, views))
            if kind == "global":
                x = across(x.flatten(1, 2)).view_as(x)
            else:
                special, patches = x.tensor_split((self.patch_token_start,), 2)
                x = torch.cat((across(special.flatten(1, 2)).view_as(special), patches), 2)
            x = x.flatten(0, 1)
        return x


@pytest.fixture
def aggregator() -> Aggregator:
    torch.manual_seed(0)
    return Aggregator().eval()


IMAGES = torch.rand(1, 3, 3, 64, 96)


def test_register_layers_have_special_tokens_alone(aggregator: Aggregator) -> None:
    name, sites = find_sites(nn.Sequential(aggregator))
    assert name == "vggt_omega"
    assert [(s.fqn, s.scope, type(s.tokens)) for s in sites if s.scope == "global"] == [
        ("0.inter_frame_blocks.0.attn", "global", TokenSource),
        ("0.inter_frame_blocks.1.attn", "global", LayoutFunction),
        ("0.inter_frame_blocks.2.attn", "global", TokenSource),
    ]
    assert sum(s.scope == "frame" for s in sites) == 3
    tokens = sites[0].tokens
    assert isinstance(tokens, TokenSource)
    assert (tokens.image_module, tokens.patch_size, tokens.special_tokens) == ("0.patch_embed", (16, 16), 17)


def test_the_adapter_passes(aggregator: Aggregator) -> None:
    report = check_adapter(aggregator, (IMAGES,), scopes=("global", "frame"))
    assert report.scopes == {"global": 3, "frame": 3}
    assert not report.unchecked


def test_a_register_layer_taken_for_a_global_one_raises(aggregator: Aggregator) -> None:
    aggregator.inter_frame_attention_types = ["global"] * 3
    _, sites = find_sites(aggregator)
    aggregator.inter_frame_attention_types[1] = "register"
    with pytest.raises(LayoutError, match=r"site 'inter_frame_blocks\.1\.attn' got 51 tokens, but a view has 41"):
        check_adapter(aggregator, (IMAGES,), sites=sites)


def test_the_real_aggregator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Last run with vggt_omega of 39a0cb8."""
    code: Any = pytest.importorskip("vggt_omega.models.aggregator")
    monkeypatch.setattr(code, "_build_patch_embed", lambda patch_size, embed_dim: hosts.Patches(patch_size, embed_dim))
    torch.manual_seed(0)
    model = code.Aggregator(
        embed_dim=64, depth=3, num_heads=2, register_attention_block_indices=[1], cached_layer_indices=(0, 1, 2)
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if "gamma" in name:
                value.fill_(1)
            elif "bias" in name or not value.isfinite().all():
                value.fill_(0)
            elif value.dim() > 2:
                value.normal_()
    report = check_adapter(model, lambda model: model(IMAGES)[0], scopes=("global", "frame"))
    assert report.scopes == {"global": 3, "frame": 3}
    assert not report.unchecked
