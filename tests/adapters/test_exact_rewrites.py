"""Exact rewrites against the published code: the same numbers, with BF16 weights too, and nothing that Lite3R cannot run on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import hosts
import pytest
import torch
from numerics import relative_error
from real_models import small_da3, small_vggt
from torch import nn

from lite3r_plugin import apply_lite3r, lite3r_disabled
from lite3r_plugin.adapter import get_manager
from lite3r_plugin.errors import AdapterError
from lite3r_plugin.testbed import Testbed, TestbedConfig
from lite3r_plugin.testing import TEST_CONFIG, named_tensors

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`torch.cuda.amp.autocast\(args...\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda':UserWarning"),
]
IMAGES = (1, 3, 3, 112, 98)  # rows and columns differ


def rewrite(model: nn.Module) -> Sequence[str] | None:
    return get_manager().hook.lite3r_exact_rewrites(model=model)


@pytest.mark.parametrize("build", [small_vggt, small_da3])
@torch.no_grad()
def test_the_numbers_stay(build: Callable[[], nn.Module]) -> None:
    """In FP32 nothing changes; with BF16 weights the rewritten model runs and answers in FP32."""
    stock = build()
    images = torch.rand(IMAGES)
    rewritten, half = copy.deepcopy(stock), copy.deepcopy(stock).bfloat16()
    words = rewrite(rewritten)
    assert words
    assert all(isinstance(word, str) for word in words)
    found, expected = named_tensors(rewritten(images)), named_tensors(stock(images))
    assert found.keys() == expected.keys()
    for path, x in expected.items():
        torch.testing.assert_close(found[path], x, atol=1e-5, rtol=0)
    rewrite(half)
    depth = half(images.bfloat16())["depth"]
    assert depth.dtype == torch.float32
    assert relative_error(depth, expected["['depth']"]) < 0.02


@torch.no_grad()
def test_vggt_keeps_only_the_layers_that_heads_read() -> None:
    model = small_vggt()
    rewrite(model)
    kept, _ = model.aggregator(torch.rand(1, 2, 3, 56, 56))
    assert [layer is not None for layer in kept] == [True, True, False, True, True]


@torch.no_grad()
def test_a_rewritten_vggt_takes_lite3r() -> None:
    model, images = small_vggt(), torch.rand(IMAGES)
    rewrite(model)
    dense = model(images)["depth"]
    apply_lite3r(model, TEST_CONFIG)
    assert not torch.equal(model(images)["depth"], dense)
    with lite3r_disabled(model):
        torch.testing.assert_close(model(images)["depth"], dense)


def test_only_the_given_instance_changes() -> None:
    model, other = small_da3(), small_da3()
    before = {name: type(module) for name, module in other.named_modules()}
    rewrite(model)
    assert {name: type(module) for name, module in other.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in other.modules())


def test_other_models_have_none() -> None:
    for model in (nn.Linear(2, 2), hosts.Pi3(), Testbed(TestbedConfig(dim=64, head_dim=32, depth=1, stem=8))):
        state = {name: type(module) for name, module in model.named_modules()}
        assert rewrite(model) is None
        assert {name: type(module) for name, module in model.named_modules()} == state


def test_a_vggt_that_is_built_in_another_way_is_refused() -> None:
    model = hosts.VGGT(encoder=False)
    model.aggregator.aa_order, model.aggregator.aa_block_size = ["global", "frame"], 1
    with pytest.raises(AdapterError, match="alternating frame and global blocks"):
        rewrite(model)
