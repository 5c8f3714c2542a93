"""The published code of model families in small, for tests that need more of it than attention. Skipped where it is not importable."""

from __future__ import annotations

import copy
import functools
import importlib
import logging
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn


def small_vggt() -> nn.Module:
    """VGGT with two of its heads. Residual branches count in full, so that a wrong rotation would show."""
    pytest.importorskip("vggt")
    return _vggt_of("vggt")


def _vggt_of(package: str, patch_embed: str = "conv", dim: int = 64) -> nn.Module:
    def part(module: str, name: str) -> Any:
        return getattr(importlib.import_module(f"{package}.{module}"), name)

    VGGT, Aggregator = part("models.vggt", "VGGT"), part("models.aggregator", "Aggregator")
    CameraHead, DPTHead = part("heads.camera_head", "CameraHead"), part("heads.dpt_head", "DPTHead")
    model = VGGT.__new__(VGGT)  # its constructor has no size
    nn.Module.__init__(model)
    model.point_head = model.track_head = None
    model.aggregator = Aggregator(img_size=112, embed_dim=dim, depth=5, num_heads=2, patch_embed=patch_embed)
    model.camera_head = CameraHead(dim_in=2 * dim, num_heads=2, trunk_depth=1)
    model.depth_head = DPTHead(
        2 * dim, output_dim=2, activation="exp", features=16, out_channels=[8] * 4, intermediate_layer_idx=[0, 1, 3, 4]
    )
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(parameter)
    return model.eval()


def small_streamvggt() -> nn.Module:
    """StreamVGGT with two of its heads, as `small_vggt`."""
    pytest.importorskip("streamvggt")
    from streamvggt.heads.camera_head import CameraHead
    from streamvggt.heads.dpt_head import DPTHead
    from streamvggt.models.aggregator import Aggregator
    from streamvggt.models.streamvggt import StreamVGGT

    return _small_stream(StreamVGGT, Aggregator, CameraHead, DPTHead)


def small_stream3r() -> nn.Module:
    """STream3R in the same size."""
    pytest.importorskip("stream3r")
    from stream3r.models.components.aggregator.streamaggregator import STreamAggregator
    from stream3r.models.components.heads.camera_head import CameraHead
    from stream3r.models.components.heads.dpt_head import DPTHead
    from stream3r.models.stream3r import STream3R

    return _small_stream(STream3R, STreamAggregator, CameraHead, DPTHead)


def _small_stream(model_class: Any, aggregator: Any, camera_head: Any, dpt_head: Any) -> nn.Module:
    model = model_class.__new__(model_class)  # its constructor has no depth
    nn.Module.__init__(model)
    model.aggregator = aggregator(img_size=112, embed_dim=64, depth=5, num_heads=2, patch_embed="conv")
    model.camera_head = camera_head(dim_in=128, num_heads=2, trunk_depth=1)
    sizes: dict[str, Any] = dict(features=16, out_channels=[8] * 4, intermediate_layer_idx=[0, 1, 3, 4])
    model.depth_head = dpt_head(128, output_dim=2, activation="exp", conf_activation="expp1", **sizes)
    model.point_head = dpt_head(128, output_dim=4, activation="inv_log", conf_activation="expp1", **sizes)
    model.track_head = None
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(parameter)
        elif name.endswith("_token"):
            nn.init.normal_(parameter)
    return model.eval()


def small_da3() -> nn.Module:
    """Depth Anything 3 in its smallest size, as it is created for random weights."""
    pytest.importorskip("depth_anything_3")
    from depth_anything_3.cfg import create_object, load_config
    from depth_anything_3.registry import MODEL_REGISTRY

    return create_object(load_config(MODEL_REGISTRY["da3-small"])).eval()  # pyright: ignore[reportArgumentType]


def small_pi3() -> nn.Module:
    """Pi3 with a small encoder, four decoder blocks and one block per head."""
    module = pytest.importorskip("pi3.models.pi3")
    return _pi3_of(module, pytest.importorskip("pi3.models.dinov2.models.vision_transformer"))


def _pi3_of(module: Any, vit: Any) -> nn.Module:
    def small_encoder(pretrained: bool) -> nn.Module:
        encoder = vit.vit_small(img_size=56, patch_size=14, num_register_tokens=4, block_chunks=0, init_values=1.0)
        encoder.blocks = encoder.blocks[:2]
        return encoder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "dinov2_vitl14_reg", small_encoder)
        model = module.Pi3(decoder_size="small")
    model.decoder = model.decoder[:4]
    for head in (model.point_decoder, model.conf_decoder, model.camera_decoder):
        head.blocks = head.blocks[:1]
    return model


CROCO: dict[str, Any] = dict(
    img_size=(96, 160), patch_size=16, enc_embed_dim=64, enc_depth=1, enc_num_heads=2, dec_embed_dim=64, dec_depth=2, dec_num_heads=2,
    pos_embed="RoPE100", head_type="linear", landscape_only=False,
)  # fmt: skip


def small_dust3r() -> nn.Module:
    """DUSt3R with an encoder of one block, linear heads."""
    pytest.importorskip("dust3r")
    model = pytest.importorskip("dust3r.model")
    if not hasattr(model, "AsymmetricCroCo3DStereo"):
        pytest.skip("this dust3r is another one, as CUT3R's")
    return model.AsymmetricCroCo3DStereo(output_mode="pts3d", **CROCO).eval()


def small_mast3r() -> nn.Module:
    """MASt3R in the same size, whose heads are convolutions with descriptors: they want more layers."""
    pytest.importorskip("mast3r")
    model = pytest.importorskip("mast3r.model")
    sizes = CROCO | dict(head_type="catmlp+dpt", dec_depth=12)
    return model.AsymmetricMASt3R(
        output_mode="pts3d+desc24", depth_mode=("exp", float("-inf"), float("inf")), conf_mode=("exp", 1, float("inf")), two_confs=True,
        desc_conf_mode=("exp", 0, float("inf")), **sizes,
    ).eval()  # fmt: skip


def small_cut3r() -> nn.Module:
    """CUT3R with an encoder of one block."""
    code = pytest.importorskip("dust3r.model")
    inf = float("inf")
    sizes = CROCO | dict(dec_depth=4, head_type="dpt")
    config = code.ARCroco3DStereoConfig(
        state_size=64, rgb_head=True, pose_head=True, output_mode="pts3d+pose", depth_mode=("exp", -inf, inf), conf_mode=("exp", 1, inf),
        pose_mode=("exp", -inf, inf), state_dec_num_heads=2, ray_enc_depth=1, **sizes,
    )  # fmt: skip
    return code.ARCroco3DStereo(config).eval()


def small_fast3r(attn_implementation: str = "flash_attention", depth: int = 10, **decoder: Any) -> nn.Module:
    """Fast3R with an encoder of one block, and as few as its heads take in the decoder."""
    pytest.importorskip("fast3r")
    pytest.importorskip("omegaconf")
    pytest.importorskip("einops")
    code: Any = _imported(
        "fast3r.models.fast3r",
        # Training and data sets, which it imports a logger and the name of a view from.
        {
            "fast3r.utils": {},
            "fast3r.utils.pylogger": {"RankedLogger": lambda *_, **__: logging.getLogger("fast3r")},
            "fast3r.dust3r.datasets": {},
            "fast3r.dust3r.datasets.base": {},
            "fast3r.dust3r.datasets.base.base_stereo_view_dataset": {"view_name": str},
        },
    )
    inf, implementation = float("inf"), {"attn_implementation": attn_implementation}
    head, small = code.PixelwiseTaskWithDPT, dict(feature_dim=16, last_dim=8, layer_dims=[8] * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code, "PixelwiseTaskWithDPT", lambda **sizes: head(**sizes | small))
        return code.Fast3R(
            encoder_args=implementation
            | dict(
                encoder_type="croco", img_size=512, patch_size=16, patch_embed_cls="PatchEmbedDust3R", embed_dim=64, num_heads=2, depth=1,
                mlp_ratio=2, pos_embed="RoPE100",
            ),
            decoder_args=implementation
            | dict(random_image_idx_embedding=True, enc_embed_dim=64, embed_dim=64, num_heads=2, depth=depth, mlp_ratio=2.0)
            | decoder,
            head_args=dict(
                head_type="dpt", output_mode="pts3d", landscape_only=False, depth_mode=["exp", -inf, inf], conf_mode=["exp", 1, inf],
                patch_size=16, with_local_head=True,
            ),
        ).eval()  # fmt: skip


def _imported(name: str, stubs: Mapping[str, Mapping[str, Any]]) -> ModuleType:
    """A module that is imported with others in the place of what a forward does not need."""
    if name in sys.modules:
        return sys.modules[name]
    with pytest.MonkeyPatch.context() as patch:
        for stub, attributes in stubs.items():
            module = ModuleType(stub)
            vars(module).update(attributes)
            patch.setitem(sys.modules, stub, module)
            parent, _, child = stub.rpartition(".")
            if parent in stubs:
                setattr(sys.modules[parent], child, module)
        return importlib.import_module(name)


def small_mapanything(sharing: str = "alternating_attention", registers: bool = True, **sharing_args: Any) -> nn.Module:
    """MapAnything with a DINOv2 of two blocks, and four blocks that share information."""
    code = _mapanything("mapanything.models.mapanything.model")
    configuration = copy.deepcopy(importlib.import_module("lite3r_adapters.mapanything.model").CONFIGURATION)
    configuration["encoder_config"] |= dict(size="small", keep_first_n_layers=2)
    args = configuration["info_sharing_config"]["module_args"]
    configuration["info_sharing_config"]["model_type"] = sharing
    args |= dict(indices=[0, 1], depth=4, dim=64, num_heads=2, init_values=1.0) | sharing_args
    head = configuration["pred_head_config"]
    head["feature_head"] |= dict(feature_dim=16, layer_dims=[8] * 4)
    for encoder in configuration["geometric_input_config"].values():
        if isinstance(encoder, dict):
            encoder["intermediate_dims"] = [16, 16, 16]
    configuration["use_register_tokens_from_encoder"] = registers
    return _with_small_dinov2(code.MapAnything, **configuration)


def small_modular_dust3r() -> nn.Module:
    """DUSt3R of UniCeption's parts: two views, CroCo's encoder and cross-attention with a rotary embedding."""
    code = _mapanything("mapanything.models.mapanything.modular_dust3r")
    inf = float("inf")
    args = dict(
        name="sharing", num_views=2, indices=[0, 1], norm_intermediate=False, depth=3, dim=64, num_heads=2, mlp_ratio=2,
    )  # fmt: skip
    return code.ModularDUSt3R(
        name="small",
        encoder_config=dict(
            encoder_str="croco", name="croco", data_norm_type="croco", patch_embed_cls="PatchEmbedDust3R", img_size=(64, 96),
            enc_embed_dim=64, enc_depth=1, enc_num_heads=2, uses_torch_hub=False,
        ),
        info_sharing_config=dict(
            model_type="cross_attention", model_return_type="intermediate_features", custom_positional_encoding="RoPE100",
            module_args=args,
        ),
        pred_head_config=dict(
            type="dpt", feature_head=dict(feature_dim=16, hooks=[0, 1, 2, 3], layer_dims=[8] * 4), regressor_head=dict(output_dim=4),
            adaptor_type="pointmap+confidence",
            adaptor=dict(
                name="pointmap", pointmap_mode="exp", pointmap_vmin=-inf, pointmap_vmax=inf, confidence_type="exp", confidence_vmin=1,
                confidence_vmax=inf,
            ),
        ),
    ).eval()  # fmt: skip


def wrapped_vggt() -> nn.Module:
    """VGGT as MapAnything's factory has it, whose constructor wants a GPU."""
    code = _mapanything("mapanything.models.external.vggt")
    return _with_small_dinov2(lambda: _wrapped(code.VGGTWrapper, _vggt_of("mapanything.models.external.vggt", "dinov2_vits14_reg", 384)))


def wrapped_pi3() -> nn.Module:
    """Pi3 in the same way."""
    code = _mapanything("mapanything.models.external.pi3")
    vit = importlib.import_module("mapanything.models.external.dinov2.models.vision_transformer")
    return _wrapped(code.Pi3Wrapper, _pi3_of(importlib.import_module("mapanything.models.external.pi3.models.pi3"), vit))


def _wrapped(wrapper: Any, model: nn.Module) -> nn.Module:
    made = wrapper.__new__(wrapper)
    nn.Module.__init__(made)
    made.name, made.torch_hub_force_reload, made.dtype, made.model = "small", False, torch.bfloat16, model
    return made.eval()


def _mapanything(name: str) -> Any:
    for library in ("mapanything", "uniception", "hydra", "cv2", "einops", "jaxtyping"):
        pytest.importorskip(library)
    return importlib.import_module(name)


def _with_small_dinov2(build: Any, **arguments: Any) -> nn.Module:
    """What `build` makes with a small DINOv2 in the place of one from torch.hub."""
    vit: Any = importlib.import_module("mapanything.models.external.dinov2.models.vision_transformer")

    def load(repository: str, name: str, **_: Any) -> nn.Module:
        sizes: dict[str, Any] = dict(embed_dim=384, num_heads=6, mlp_ratio=1, depth=2)
        registers = 4 if name.endswith("_reg") else 0
        options: dict[str, Any] = dict(patch_size=14, img_size=56, init_values=1.0, block_chunks=0, num_register_tokens=registers)
        return vit.DinoVisionTransformer(block_fn=functools.partial(vit.Block, attn_class=vit.MemEffAttention), **sizes, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "load", load)
        return build(**arguments).eval()
