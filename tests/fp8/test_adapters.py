"""FP8 in the built-in families: how many blocks are fused, and what becomes of the output."""

from __future__ import annotations

import pytest
import torch
from numerics import relative_error
from torch import nn

from lite3r_plugin import apply_lite3r, convert, describe
from lite3r_plugin.fp8.block import Fp8Block
from lite3r_plugin.testbed import Testbed, TestbedConfig

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:register_new_resolver\(\) is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda':UserWarning"),
]


def da3() -> tuple[nn.Module, str, torch.Tensor, int, int]:
    pytest.importorskip("depth_anything_3")
    from depth_anything_3.cfg import create_object, load_config
    from depth_anything_3.registry import MODEL_REGISTRY

    return create_object(load_config(MODEL_REGISTRY["da3-small"])), "depth", torch.rand(1, 2, 3, 70, 98), 48, 12  # pyright: ignore[reportArgumentType]


def timm() -> tuple[nn.Module, None, torch.Tensor, int, int]:
    library = pytest.importorskip("timm")
    model = library.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, img_size=70, depth=2)
    return model, None, torch.rand(1, 3, 70, 70), 8, 0  # timm has its own LayerNorm


def transformers() -> tuple[nn.Module, str, torch.Tensor, int, int]:
    library = pytest.importorskip("transformers")
    config = library.Dinov2Config(hidden_size=64, num_attention_heads=2, num_hidden_layers=2, image_size=56, patch_size=14)
    return library.Dinov2Model(config), "last_hidden_state", torch.rand(1, 3, 56, 56), 12, 0


def testbed() -> tuple[nn.Module, str, torch.Tensor, int, int]:
    return Testbed(TestbedConfig(dim=64, depth=2, stem=16)), "depth", torch.rand(1, 3, 3, 48, 64), 16, 4


testbed.__test__ = False  # pyright: ignore[reportFunctionMemberAccess]


@pytest.mark.parametrize("make", [da3, timm, transformers, testbed])
@torch.no_grad()
def test_families(make) -> None:
    model, key, images, linears, fused = make()
    model.eval()
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in ("gamma", "lambda1"):
            nn.init.constant_(parameter, 0.3)

    def run() -> torch.Tensor:
        return model(images) if key is None else model(images)[key]

    dense = run()
    apply_lite3r(model, keep_ratio=1.0, precision="fp8_qat", fp8_filter=("*",))
    trained = run()
    convert(model)
    assert describe(model).linears == {"in FP8 (emulated)": linears}
    assert sum(isinstance(m, Fp8Block) for m in model.modules()) == fused
    assert relative_error(run(), trained) < 1e-2
    assert 1e-4 < relative_error(trained, dense) < 0.1
