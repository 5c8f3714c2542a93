"""transformers: the real package, with random weights."""

from __future__ import annotations

import warnings

import pytest
import torch
from properties import assert_bf16_is_as_exact_as_dense, assert_compiled_equals_eager, assert_threads_do_not_mix, enlarge_layer_scales
from torch import nn

from lite3r_plugin import Routed, apply_lite3r
from lite3r_plugin.adapter.plugins import find_sites
from lite3r_plugin.errors import LayoutError, UnknownModelError
from lite3r_plugin.ops.dispatch import SlowPathWarning
from lite3r_plugin.testing import TEST_CONFIG, check_adapter

hf = pytest.importorskip("transformers")
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "patch_size": 14, "image_size": 98}
MODELS = {  # family: (model class, special tokens, whether other image sizes work without an option)
    "Dinov2": ("Dinov2Model", 1, True),
    "Dinov2WithRegisters": ("Dinov2WithRegistersModel", 5, True),
    "DINOv3ViT": ("DINOv3ViTModel", 4, True),
    "ViT": ("ViTModel", 1, False),
    "DPT": ("DPTModel", 1, False),
    "SiglipVision": ("SiglipVisionModel", 0, False),
}


def enlarge(model: nn.Module) -> nn.Module:
    """Initial weights are so small that attention is uniform."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    enlarge_layer_scales(model)
    return model.eval()


def build(family: str) -> nn.Module:
    options = {"num_register_tokens": 3} if family == "DINOv3ViT" else {}
    if family == "DPT":
        options["is_hybrid"] = False
    return enlarge(getattr(hf, MODELS[family][0])(getattr(hf, f"{family}Config")(**TINY, **options)))


@pytest.mark.parametrize("family", MODELS)
def test_conformance(family: str) -> None:
    _, special, any_size = MODELS[family]
    model = build(family)
    adapter, sites = find_sites(model)
    assert adapter == "transformers"
    assert len(sites) == 2
    assert all(isinstance(site.projections, Routed) and site.scope == "frame" and site.head_dim == 32 for site in sites)
    tokens = sites[0].tokens
    assert tokens is not None
    assert (tokens.patch_size, tokens.special_tokens) == ((14, 14), special)
    height = 126 if any_size else 98
    report = check_adapter(model, {"pixel_values": torch.rand(1, 3, height, 98)})
    assert report.tokens == special + height // 14 * 7
    assert report.dense_error <= 1e-5


def test_depth_anything() -> None:
    """The backbone is inside, and the head has convolutions of its own."""
    backbone = hf.Dinov2Config(**TINY, out_indices=[1, 2], reshape_hidden_states=False)
    config = hf.DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=14,
        reassemble_hidden_size=64,
        reassemble_factors=[2, 1],
        neck_hidden_sizes=[16, 32],
        fusion_hidden_size=16,
        head_hidden_size=8,
    )
    model = enlarge(hf.DepthAnythingForDepthEstimation(config))
    sites = find_sites(model)[1]
    assert [site.tokens.image_module for site in sites] == ["backbone.embeddings.patch_embeddings.projection"] * 2
    images = torch.rand(1, 3, 98, 70)
    check_adapter(model, lambda m: m.backbone(images).feature_maps)


def test_vjepa2_has_no_image_grid() -> None:
    config = hf.VJEPA2Config(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=16,
        crop_size=64,
        frames_per_clip=4,
        pred_hidden_size=48,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
    )
    model = enlarge(hf.VJEPA2Model(config))
    assert {site.tokens for site in find_sites(model)[1]} == {None}
    check_adapter(model, {"pixel_values_videos": torch.rand(1, 4, 3, 64, 64)})


def test_a_model_of_images_and_text_is_sparse_in_images_only() -> None:
    text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "vocab_size": 99}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    model = hf.SiglipModel(hf.SiglipConfig(text_config={**text, **ends}, vision_config=TINY)).eval()
    assert {site.fqn.split(".")[0] for site in find_sites(model)[1]} == {"vision_model"}


def test_text_models_are_left_alone() -> None:
    config = hf.BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    with pytest.raises(UnknownModelError):
        find_sites(hf.BertModel(config))


def test_eager_attention_is_dense() -> None:
    model = build("Dinov2")
    model.set_attn_implementation("eager")
    apply_lite3r(model, TEST_CONFIG)
    with pytest.warns(SlowPathWarning, match=r'model\.set_attn_implementation\("sdpa"\)'):
        model(torch.rand(1, 3, 98, 98))


def test_bf16() -> None:
    assert_bf16_is_as_exact_as_dense(build("Dinov2WithRegisters"), torch.rand(1, 3, 98, 126))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Dinov2", "DINOv3ViT"])  # the second hands its rotary embedding to attention
def test_compile(family: str) -> None:
    images = [torch.rand(batch, 3, 96, 128) for batch in (3, 2, 5)]
    assert_compiled_equals_eager(build(family), lambda m, x: m(x).last_hidden_state, images, dynamic=0)


def test_threads() -> None:
    wide, tall = torch.rand(1, 3, 98, 126), torch.rand(1, 3, 126, 98)
    assert_threads_do_not_mix(build("DINOv3ViT"), (lambda m: m(wide), lambda m: m(tall)))


def test_found_inside_a_wrapper() -> None:
    model = nn.ModuleDict({"net": build("Dinov2WithRegisters")}).eval()
    images = torch.rand(1, 3, 98, 126)
    check_adapter(model, lambda m: m["net"](images))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_forward_that_cannot_be_told_from_another_is_not_recomputed_as_dense(reentrant: bool) -> None:
    """Two grids of as many tokens before one backward pass: gradients would be those of another model."""
    model = hf.Dinov2Model(hf.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8)).train()
    apply_lite3r(model, TEST_CONFIG)
    with warnings.catch_warnings():  # of its name, which others are to have from v6 on
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    square, wide = (torch.rand(1, 3, height, 4096 // height, requires_grad=True) for height in (64, 32))
    loss = model(square).last_hidden_state.sum() + model(wide).last_hidden_state.sum()
    with pytest.raises(LayoutError, match=r"forwards on 4 x 16 patches, 8 x 8 patches came before this backward pass"):
        loss.backward()
    model(wide).last_hidden_state.sum().backward()
