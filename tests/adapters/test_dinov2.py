"""DINOv2 as Meta publishes it: a double of its structure; a published copy of the code (Pi3's) wherever it can be imported."""

from __future__ import annotations

from typing import Any

import hosts
import pytest
import torch
from properties import enlarge_layer_scales
from torch import Tensor, nn

from lite3r_plugin import FusedQKV, apply_lite3r, describe, remove_lite3r
from lite3r_plugin.adapter import find_sites
from lite3r_plugin.adapter.plugins import find_rewrites
from lite3r_plugin.testing import check_adapter

PATCH = 14


class Chunk(nn.ModuleList):
    """Blocks that run one after the other; the places of those before are filled with nothing."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


class DinoVisionTransformer(hosts.Encoder):
    """With a class token of its own, position embeddings and, if asked for, blocks in chunks."""

    def __init__(self, registers: int = 0, chunks: int = 0, depth: int = 4, dim: int = 32) -> None:
        super().__init__(PATCH, dim, num_heads=2, depth=depth, registers=registers)
        del self.special
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.register_tokens = nn.Parameter(torch.randn(1, registers, dim)) if registers else None
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + 5 * 7, dim))
        if chunks:
            size, own = depth // chunks, list(self.blocks)
            self.blocks = nn.ModuleList(Chunk([*(nn.Identity() for _ in range(i)), *own[i : i + size]]) for i in range(0, depth, size))

    def interpolate_pos_encoding(self, x: Tensor) -> Tensor:
        return self.pos_embed

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1)
        x = x + self.interpolate_pos_encoding(x)
        if self.register_tokens is not None:
            x = torch.cat((x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]), 1)
        for block in self.blocks:
            x = block(x)
        return x


def double(registers: int, chunks: int) -> nn.Module:
    torch.manual_seed(0)
    return DinoVisionTransformer(registers, chunks).eval()


def published(registers: int, chunks: int) -> nn.Module:
    code = pytest.importorskip("pi3.models.dinov2.models.vision_transformer")
    torch.manual_seed(0)
    model = code.DinoVisionTransformer(
        img_size=PATCH * 5, patch_size=PATCH, embed_dim=64, depth=4, num_heads=2, num_register_tokens=registers, block_chunks=chunks,
        init_values=1.0,
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    enlarge_layer_scales(model)
    return model.eval()


def tokens_of(model: Any, images: Tensor) -> Tensor:
    """All tokens, or those that the published code gives."""
    return model.forward_features(images)["x_prenorm"] if hasattr(model, "forward_features") else model(images)


IMAGES = torch.rand(2, 3, 5 * PATCH, 7 * PATCH)


@pytest.mark.parametrize("build", [double, published])
@pytest.mark.parametrize(("registers", "chunks"), [(0, 0), (4, 0), (4, 2)])
def test_conformance(build: Any, registers: int, chunks: int) -> None:
    model = build(registers, chunks)
    adapter, sites = find_sites(model)
    assert adapter == "dinov2"
    names = [f"blocks.{i // 2}.{i}.attn" if chunks else f"blocks.{i}.attn" for i in range(4)]
    assert [site.fqn for site in sites] == names
    assert {site.scope for site in sites} == {"frame"}
    assert all(isinstance(site.projections, FusedQKV) for site in sites)
    assert all((site.block is None) == (build is double) for site in sites)  # whose block takes any arguments
    report = check_adapter(model, lambda m: tokens_of(m, IMAGES))
    assert report.dense_error <= 1e-5
    assert report.tokens == 1 + registers + 5 * 7


@pytest.mark.parametrize("build", [double, published])
@torch.no_grad()
def test_alone_it_runs_in_bf16_and_its_patches_by_a_product(build: Any) -> None:
    model = build(4, 0)
    expected = tokens_of(model, IMAGES)
    apply_lite3r(model, keep_ratio=1.0, linear_branch="none", weights="bf16")
    assert any("patch_embed.proj: patches become tokens" in line for line in describe(model).rewritten)
    assert model.cls_token.dtype == torch.bfloat16
    if build is published:  # the double's forward is the model's own, which is given what it is given
        assert (tokens_of(model, IMAGES.bfloat16()).float() - expected).norm() < 0.05 * expected.norm()
    remove_lite3r(model)
    assert torch.equal(tokens_of(model, IMAGES), expected)


def test_inside_of_a_larger_model_its_attention_alone_is_known() -> None:
    model = nn.ModuleDict({"backbone": double(0, 0), "head": nn.Conv2d(32, 1, 1)})
    adapter, sites = find_sites(model)
    assert adapter == "dinov2"
    assert sites[0].fqn == "backbone.blocks.0.attn"
    assert sites[0].tokens is not None
    assert sites[0].tokens.image_module == "backbone.patch_embed"
    assert find_rewrites(model) is None  # whether the head runs in BF16 nobody knows


def test_the_encoder_of_a_known_model_stays_that() -> None:
    torch.manual_seed(0)
    adapter, sites = find_sites(hosts.Aggregator(DinoVisionTransformer(registers=4)))
    assert adapter == "vggt"
    assert {site.scope for site in sites if site.fqn.startswith("patch_embed.")} == {"encoder"}
