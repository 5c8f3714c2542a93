"""timm: the real package, with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from properties import assert_bf16_is_as_exact_as_dense, assert_compiled_equals_eager, assert_threads_do_not_mix, enlarge_layer_scales
from torch import Tensor, nn

from lite3r_plugin import Routed, apply_lite3r
from lite3r_plugin.adapter.plugins import find_sites
from lite3r_plugin.errors import UnknownModelError
from lite3r_plugin.ops.dispatch import SlowPathWarning
from lite3r_plugin.peft import add_lora, lora_disabled, merge_lora
from lite3r_plugin.testing import TEST_CONFIG, check_adapter

timm = pytest.importorskip("timm")


def build(name: str, size: int, **options: Any) -> nn.Module:
    model = timm.create_model(name, img_size=size, depth=2, num_classes=0, **options)
    for parameter in model.parameters():  # initial weights are so small that attention is uniform
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    enlarge_layer_scales(model)
    return model.eval()


MODELS = {  # name: (image size, options, special tokens)
    "vit_tiny_patch16_224": (96, {"dynamic_img_size": True}, 1),
    "deit_tiny_distilled_patch16_224": (96, {}, 2),
    "vit_small_patch14_reg4_dinov2": (98, {"dynamic_img_size": True}, 5),
    "vit_small_patch16_dinov3": (96, {"dynamic_img_size": True}, 5),
    "eva02_tiny_patch14_224": (98, {}, 1),
    "vit_pe_core_tiny_patch16_384": (96, {}, 1),
    "vit_small_patch16_rope_mixed_224": (96, {}, 1),
    "vit_base_patch16_siglip_224": (96, {"embed_dim": 192, "num_heads": 3}, 0),
}


@pytest.mark.parametrize("name", MODELS)
def test_conformance(name: str) -> None:
    size, options, special = MODELS[name]
    model = build(name, size, **options)
    adapter, sites = find_sites(model)
    assert adapter == "timm"
    assert [site.fqn for site in sites] == ["blocks.0.attn", "blocks.1.attn"]
    assert {site.scope for site in sites} == {"frame"}
    assert all(isinstance(site.projections, Routed) for site in sites)
    patch = model.patch_embed.patch_size
    tokens = sites[0].tokens
    assert tokens is not None
    assert (tokens.image_module, tokens.patch_size, tokens.special_tokens) == ("patch_embed.proj", patch, special)
    height = size + 2 * patch[0] if "dynamic_img_size" in options else size
    images = torch.rand(2, 3, height, size)
    report = check_adapter(model, lambda m: m.forward_features(images))
    assert report.dense_error <= 1e-5
    assert report.tokens == special + height * size // patch[0] ** 2


@pytest.fixture
def vit() -> nn.Module:
    return build("vit_tiny_patch16_224", 96, dynamic_img_size=True)


def test_padded_images(vit: nn.Module) -> None:
    """The patch embedding pads 122 x 70 pixels to 8 x 5 patches."""
    vit.patch_embed.dynamic_img_pad = True
    images = torch.rand(1, 3, 122, 70)
    report = check_adapter(vit, lambda m: m.forward_features(images))
    assert report.tokens == 1 + 8 * 5


def test_features_only() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=2, features_only=True, out_indices=[1]).eval()
    sites = find_sites(model)[1]
    assert sites[0].fqn == "model.blocks.0.attn"
    assert sites[0].tokens.image_module == "model.patch_embed.proj"
    check_adapter(model, (torch.rand(1, 3, 96, 96),))


def test_naflex_keeps_its_token_order() -> None:
    """Its sequence is packed, so there is no grid to read off an image."""
    model = timm.create_model("naflexvit_base_patch16_gap", depth=1, embed_dim=192, num_heads=3).eval()
    assert {site.tokens for site in find_sites(model)[1]} == {None}
    check_adapter(model, (torch.rand(1, 3, 128, 96),))


def test_patch_dropout_keeps_token_order() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, patch_drop_rate=0.5)
    assert {site.tokens for site in find_sites(model)[1]} == {None}


@pytest.mark.parametrize(
    ("name", "options"),
    [("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}), ("beit_base_patch16_224", {"depth": 1}), ("resnet18", {})],
)
def test_attention_with_a_bias_and_convolutions_are_left_alone(name: str, options: dict[str, Any]) -> None:
    model = timm.create_model(name, **options)
    with pytest.raises(UnknownModelError):
        find_sites(model)


def test_unfused_attention_is_dense(vit: nn.Module) -> None:
    vit.blocks[1].attn.fused_attn = False
    apply_lite3r(vit, TEST_CONFIG)
    with pytest.warns(SlowPathWarning, match=r"blocks.1.attn.*fused_attn=True"):
        vit(torch.rand(1, 3, 96, 96))


def test_a_mask_is_dense(vit: nn.Module) -> None:
    apply_lite3r(vit, TEST_CONFIG)
    with pytest.warns(SlowPathWarning, match="a mask or a bias"):
        vit.forward_features(torch.rand(1, 3, 96, 96), attn_mask=torch.ones(37, 37, dtype=torch.bool))


def test_bf16(vit: nn.Module) -> None:
    assert_bf16_is_as_exact_as_dense(vit, torch.rand(1, 3, 128, 96))


@pytest.mark.slow
def test_compile(vit: nn.Module) -> None:
    assert_compiled_equals_eager(vit, lambda m, x: m(x), [torch.rand(batch, 3, 128, 96) for batch in (3, 2, 5)], dynamic=0)


def test_threads(vit: nn.Module) -> None:
    wide, tall = torch.rand(1, 3, 96, 160), torch.rand(1, 3, 128, 96)
    assert_threads_do_not_mix(vit, (lambda m: m.forward_features(wide), lambda m: m.forward_features(tall)))


class VendoredAttention(nn.Module):
    """A copy of timm's attention under another module path."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.fused_attn = num_heads, dim // num_heads, True
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).movedim(2, 0).transpose(2, 3)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_a_vendored_copy_is_found_by_structure(vit: nn.Module) -> None:
    for block in vit.blocks:
        block.attn = VendoredAttention(192, 3)
    images = torch.rand(1, 3, 128, 96)
    report = check_adapter(vit.eval(), lambda m: m.forward_features(images))
    assert report.scopes == {"frame": 2}


def test_lora_learns_where_a_host_computes_with_the_weight_itself() -> None:
    """As EVA-02 does with that of qkv."""
    model: Any = build("eva02_tiny_patch14_224", 98).requires_grad_(False)
    images = torch.rand(1, 3, 98, 98)
    apply_lite3r(model, TEST_CONFIG)
    add_lora(model, rank=2)
    layer = model.blocks[0].attn.qkv
    nn.init.normal_(layer.lora_B["default"].weight, std=0.5)
    out = model(images)
    out.square().sum().backward()
    assert layer.lora_A["default"].weight.grad.abs().sum() > 0
    with torch.no_grad(), lora_disabled(model):
        assert (model(images) - out).abs().max() > 1e-3
    merge_lora(model)
    torch.testing.assert_close(model(images), out.detach())
