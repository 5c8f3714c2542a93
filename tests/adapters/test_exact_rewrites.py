"""Exact rewrites against the published code: the same numbers, with BF16 weights too, and nothing that Lite3R cannot run on."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hosts
import pytest
import torch
from interruptions import contents, interrupted, lines_of
from map_kernels import count_map_kernels
from numerics import assert_as_accurate, relative_error
from real_models import small_da3, small_pi3, small_vggt
from rewriting import rewrite_exactly
from sla_cases import DEVICE
from torch import Tensor, nn

from lite3r_adapters._dpt import MixedFirst
from lite3r_plugin import Lite3RConfig, apply_lite3r, convert, describe, lite3r_disabled, load_lite3r, remove_lite3r, save_lite3r
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.errors import NotAppliedError
from lite3r_plugin.runtime import maps
from lite3r_plugin.runtime.rewrites import plan_rewrites
from lite3r_plugin.testing import TEST_CONFIG, named_tensors

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`torch.cuda.amp.autocast\(args...\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda':UserWarning"),
]
DENSE = Lite3RConfig(keep_ratio=1.0, linear_branch="none")
IMAGES = (1, 3, 3, 112, 98)  # rows and columns differ
REWRITES = 8  # of VGGT with a camera and a depth head, as `describe` counts them


@pytest.mark.parametrize("build", [small_vggt, small_da3])
@torch.no_grad()
def test_the_numbers_stay(build: Callable[[], nn.Module]) -> None:
    """In FP32 nothing changes; with BF16 weights the rewritten model runs and answers in FP32."""
    stock = build()
    images = torch.rand(IMAGES)
    rewritten, half = copy.deepcopy(stock), copy.deepcopy(stock).bfloat16()
    done = rewrite_exactly(rewritten)
    assert done is not None
    assert done.made
    assert done.left == {}
    found, expected = named_tensors(rewritten(images)), named_tensors(stock(images))
    assert found.keys() == expected.keys()
    for path, x in expected.items():
        torch.testing.assert_close(found[path], x, atol=1e-5, rtol=16 * torch.finfo(torch.float32).eps)
    rewrite_exactly(half)
    depth = half(images.bfloat16())["depth"]
    assert depth.dtype == torch.float32
    assert relative_error(depth, expected["['depth']"]) < 0.02


def layers_that_heads_see(model: Any, images: Tensor) -> list[bool]:
    seen: list[Any] = []
    handle = model.depth_head.register_forward_pre_hook(lambda module, args: seen.extend(args[0]))
    model(images)
    handle.remove()
    return [isinstance(layer, Tensor) for layer in seen]


@torch.no_grad()
def test_vggt_keeps_only_the_layers_that_heads_read() -> None:
    model, images = small_vggt(), torch.rand(1, 2, 3, 56, 56)
    expected, start = model.aggregator(images)
    apply_lite3r(model, DENSE)
    assert layers_that_heads_see(model, images) == [True, True, False, True, True]
    for layers, special in (model.aggregator(images), model.aggregator.forward(images)):  # called directly it gives all, as before
        assert special == start
        torch.testing.assert_close(layers, expected, rtol=1e-5, atol=1e-5)
    handle = model.aggregator.register_forward_hook(lambda module, args, output: None)
    assert all(layers_that_heads_see(model, images))
    handle.remove()
    with lite3r_disabled(model):
        assert all(layers_that_heads_see(model, images))


@torch.no_grad()
def test_a_rewritten_vggt_takes_lite3r() -> None:
    model, images = small_vggt(), torch.rand(IMAGES)
    rewrite_exactly(model)
    dense = model(images)["depth"]
    apply_lite3r(model, TEST_CONFIG)
    assert describe(model).rewritten == ()  # all there is was there
    assert not torch.equal(model(images)["depth"], dense)
    with lite3r_disabled(model):
        torch.testing.assert_close(model(images)["depth"], dense)


@pytest.mark.parametrize("build", [small_vggt, pytest.param(small_da3, marks=pytest.mark.slow)])
@torch.no_grad()
def test_they_come_with_lite3r_and_go_with_it(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, other, images = build(), build(), torch.rand(IMAGES)
    other.load_state_dict(model.state_dict())
    before, expected = contents(model), named_tensors(model(images))
    apply_lite3r(model, DENSE)
    report = describe(model)
    assert len(report.rewritten) == (REWRITES if build is small_vggt else 6)
    assert report.not_rewritten == {}
    assert all(f"rewritten exactly: {words}" in str(report) for words in report.rewritten)
    assert list(model.state_dict()) == before["keys"]
    for path, found in named_tensors(model(images)).items():
        torch.testing.assert_close(found, expected[path], atol=1e-5, rtol=1e-5)
    with lite3r_disabled(model):
        assert all(torch.equal(found, expected[path]) for path, found in named_tensors(model(images)).items())
    save_lite3r(model, tmp_path, whole=True)
    assert describe(load_lite3r(other, tmp_path)).rewritten == report.rewritten
    for model_again in (model, copy.deepcopy(model)):
        found, loaded = (named_tensors(m(images)) for m in (model_again, other))
        assert all(torch.equal(found[path], x) for path, x in loaded.items())
    remove_lite3r(model)
    assert contents(model) == before
    assert all(torch.equal(found, expected[path]) for path, found in named_tensors(model(images)).items())


@torch.no_grad()
def test_large_linears_of_the_camera_head_take_few_rows_by_themselves() -> None:
    model = small_vggt()
    model.camera_head = pytest.importorskip("vggt.heads.camera_head").CameraHead(dim_in=1024, num_heads=8, trunk_depth=1).eval()
    layers = [torch.randn(1, 3, 2, 1024)]
    expected, forwards = model.camera_head(layers), [m for m in model.modules() if "forward" in vars(m)]
    apply_lite3r(model, DENSE, fuse=False)
    assert not any("few rows" in words for words in describe(model).rewritten)
    remove_lite3r(model)
    apply_lite3r(model, DENSE)
    words = "camera_head.trunk.0.attn.qkv and 4 more: few rows in FP32 by a kernel that reads the weight once"
    assert words in describe(model).rewritten
    torch.testing.assert_close(model.camera_head(layers), expected)
    remove_lite3r(model)
    assert [m for m in model.modules() if "forward" in vars(m)] == forwards
    convert(apply_lite3r(model, DENSE), fp8_backend="emulated")  # which leaves the head as it is
    assert words in describe(model).rewritten
    torch.testing.assert_close(model.camera_head(layers), expected)


@torch.no_grad()
def test_large_linears_of_the_camera_head_are_bf16_and_compute_in_fp32() -> None:
    """What the head says differs by the rounding of these weights, and by nothing else."""
    model = small_vggt()
    head = pytest.importorskip("vggt.heads.camera_head").CameraHead(dim_in=1024, num_heads=8, trunk_depth=1).eval()
    for name, parameter in head.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(parameter)
    model.camera_head, rounded = copy.deepcopy(head), copy.deepcopy(head)
    large = {name for name, module in head.named_modules() if isinstance(module, nn.Linear) and module.weight.numel() >= 2**20}
    for name in large:
        weight = rounded.get_submodule(name).weight
        weight.copy_(weight.bfloat16())
    apply_lite3r(model, DENSE, weights="bf16")
    dtypes = {name: module.weight.dtype for name, module in model.camera_head.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, dtype in dtypes.items() if dtype == torch.bfloat16} == large
    assert len(large) == 5
    for views in (3, 20):  # few rows, and more
        layers = [torch.randn(1, views, 2, 1024)]
        found, expected, exact = (m(layers)[-1] for m in (model.camera_head, rounded, head))
        assert found.dtype == torch.float32
        assert relative_error(found, expected) < 1e-5
        assert 1e-4 < relative_error(expected, exact) < 1e-2
    remove_lite3r(model)
    assert all(torch.equal(x, head.state_dict()[name]) for name, x in model.camera_head.state_dict().items())


def test_they_can_be_left_out() -> None:
    model = small_vggt()
    before = type(model.aggregator), type(model.aggregator.rope), vars(model).keys() - {"training"}
    apply_lite3r(model, DENSE, exact_rewrites=False)
    assert describe(model).rewritten == ()
    assert before == (type(model.aggregator), type(model.aggregator.rope), vars(model).keys() - {"training"})


def heads_of(model: nn.Module) -> list[str]:
    return [words for words in describe(model).rewritten if "feature maps" in words]


@pytest.mark.parametrize("build", [small_vggt, small_da3])
@pytest.mark.parametrize("preset", [{}, {"preset": "fast", "cuda_graphs": False, "compile_blocks": False}])
def test_heads_get_kernels_unless_nothing_is_to_be_fused(build: Callable[[], nn.Module], preset: dict[str, Any]) -> None:
    model = build()
    apply_lite3r(model, DENSE, **preset)
    assert len(heads_of(model)) == 1
    remove_lite3r(model)
    apply_lite3r(model, DENSE, **preset, fuse=False)
    assert heads_of(model) == []
    assert any("position embedding" in words for words in describe(model).rewritten)
    remove_lite3r(model)
    apply_lite3r(model, DENSE, **preset, exact_rewrites=False)
    assert heads_of(model) == []


@pytest.mark.parametrize("build", [small_vggt, small_da3])
@torch.no_grad()
def test_heads_give_with_kernels_what_they_gave(build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, images = build().to(DEVICE), torch.rand(1, 2, 3, 28, 42, device=DEVICE)
    apply_lite3r(model, DENSE)
    expected = named_tensors(model(images))
    ran = count_map_kernels(monkeypatch)
    found = named_tensors(model(images))
    levels, both = (1, 1) if build is small_vggt else (2, 0)  # a second pyramid for rays; the last pass of VGGT's does both
    assert ran["upsample"] == 4 * levels + 1 - both
    assert ran["add_embedding"] == 4 + levels - both
    assert ran["upsample_with_embedding"] == both
    assert ran["add_bias_"] > 20
    for path, x in expected.items():
        torch.testing.assert_close(found[path], x, atol=1e-4, rtol=1e-4)


def test_a_head_for_gaussians_gets_kernels_too() -> None:
    """It is given images besides."""
    gaussians = pytest.importorskip("depth_anything_3.model.gsdpt").GSDPT
    model: Any = small_da3()
    model.gs_head = gaussians(64, output_dim=5, features=16, out_channels=(8, 8, 8, 8)).eval()
    apply_lite3r(model, DENSE)
    assert [words.partition(":")[0] for words in heads_of(model)] == ["head", "gs_head"]
    assert describe(model).not_rewritten == {}


def test_a_head_of_pi3x_gets_kernels_and_stays_in_fp32() -> None:
    convolutions = pytest.importorskip("pi3.models.layers.conv_head").ConvHead
    model: Any = small_pi3()
    model.point_head = convolutions(num_features=4, dim_in=16, projects=nn.Identity(), dim_out=[2, 1], dim_proj=16, dim_upsample=[32] * 3)
    apply_lite3r(model.eval(), DENSE, preset="fast", cuda_graphs=False, compile_blocks=False)
    assert len(heads_of(model)) == 1
    assert "point_head: arithmetic in FP32 whatever the other weights are" in describe(model).rewritten
    before = model.point_head
    remove_lite3r(model)
    assert model.point_head is before.host
    assert "forward" not in vars(model.point_head)


@pytest.mark.gpu
@pytest.mark.parametrize("build", [small_vggt, small_da3])
@pytest.mark.parametrize("preset", [{}, {"preset": "fast"}])
@torch.inference_mode()
def test_heads_on_a_gpu_are_as_exact_as_the_stock_model(
    build: Callable[[], nn.Module], preset: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With kernels for their maps as exact as without: in FP32, and in BF16 from a CUDA graph."""
    monkeypatch.setattr(maps, "LEAST", 1)  # the model is small
    stock, images = build(), torch.rand(1, 3, 3, 224, 280)
    exact = named_tensors(stock(images))
    results: dict[bool, dict[str, Tensor]] = {}
    for fuse in (True, False):
        model = copy.deepcopy(stock).cuda()
        apply_lite3r(model, DENSE, **preset, fuse=fuse)
        for _ in range(3):  # the last is a replay, where there are graphs
            results[fuse] = {path: x.cpu() for path, x in named_tensors(model(images.cuda())).items()}
    for path in ("['depth']", "['depth_conf']"):
        assert_as_accurate(results[True][path], results[False][path], exact[path])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_dtypes_stay_under_autocast(dtype: torch.dtype) -> None:
    model, images = small_vggt(), torch.rand(IMAGES)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected = named_tensors(model(images))
        apply_lite3r(model, DENSE)
        found = named_tensors(model(images))
    assert {path: x.dtype for path, x in found.items()} == {path: x.dtype for path, x in expected.items()}
    assert relative_error(found["['depth']"], expected["['depth']"].float()) < (1e-5 if dtype == torch.float32 else 0.02)


def test_training_is_as_before() -> None:
    """The host's aggregator recomputes its blocks in training."""
    model, images = small_vggt().train(), torch.rand(1, 2, 3, 56, 56)
    model.aggregator.patch_embed.eval()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(images)["depth"].mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    apply_lite3r(model, DENSE)
    torch.testing.assert_close(gradients(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients_in_evaluation(model.eval(), images), gradients_in_evaluation(remove_lite3r(model), images))


def gradients_in_evaluation(model: Any, images: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(images)["depth"].mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@torch.no_grad()
def test_a_fork_of_vggt_may_give_only_the_layers_that_its_heads_read() -> None:
    """As forks do to save memory, with None for the others."""
    model, images = small_vggt(), torch.rand(1, 2, 3, 56, 56)
    host = type(model.aggregator).forward

    def forward(self: Any, images: Tensor) -> Any:
        layers, start = host(self, images)
        return [None if i == 2 else layer for i, layer in enumerate(layers)], start

    model.aggregator.__class__ = type("Fork", (type(model.aggregator),), {"forward": forward})
    expected, depth = model.aggregator(images)[0], model(images)["depth"]
    apply_lite3r(model, DENSE)
    assert "because it differs" not in str(describe(model))
    found = model.aggregator(images)[0]
    assert [layer is None for layer in found] == [layer is None for layer in expected] == [i == 2 for i in range(5)]
    torch.testing.assert_close([x for x in found if x is not None], [x for x in expected if x is not None], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(images)["depth"], depth, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_fork_of_vggt_may_ask_its_aggregator_for_some_layers() -> None:
    """By an argument that the published one does not have."""
    model, images = small_vggt(), torch.rand(1, 2, 3, 56, 56)
    host = type(model.aggregator).forward

    def forward(self: Any, images: Tensor, wanted: list[int] | None = None) -> Any:
        layers, start = host(self, images)
        return layers if wanted is None else [layers[i] for i in wanted], start

    model.aggregator.__class__ = type("Fork", (type(model.aggregator),), {"forward": forward})
    expected, depth = model.aggregator(images, wanted=[1, 3])[0], model(images)["depth"]
    apply_lite3r(model, DENSE)
    assert any(line.startswith("aggregator: ") for line in describe(model).rewritten)
    for found in (model.aggregator(images, wanted=[1, 3])[0], model.aggregator(images, [1, 3])[0]):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(images)["depth"], depth, rtol=1e-5, atol=1e-5)


def reading_a_layer(model: Any) -> str:
    """A head of a fork reads another layer, which no attribute tells."""
    host = type(model.depth_head).forward

    def forward(self: Any, layers: Any, images: Tensor, patch_start_idx: int) -> Any:
        return host(self, [layers[2] if i == 1 else layers[i] for i in range(5)], images, patch_start_idx)

    model.depth_head.__class__ = type("Fork", (type(model.depth_head),), {"forward": forward})
    return "its heads read all layers"


def with_another_order(model: Any) -> str:
    model.aggregator.aa_order = ["global", "frame"]
    return "it differs from the host's own forward by"


def with_another_rotation(model: Any) -> str:
    host = type(model.aggregator.rope).forward
    fork = type("Fork", (type(model.aggregator.rope),), {"forward": lambda self, tokens, positions: host(self, tokens, positions // 2)})
    model.aggregator.rope.__class__ = fork
    return "it differs from the host's own forward by"


def with_another_embedding(model: Any) -> str:
    host = type(model.depth_head)._apply_pos_embed
    fork = type("Fork", (type(model.depth_head),), {"_apply_pos_embed": lambda self, x, W, H, ratio=0.1: host(self, x, W, H, ratio) * 2})
    model.depth_head.__class__ = fork
    return "it differs from the host's own _apply_pos_embed by"


def with_blocks_that_take_more(model: Any) -> str:
    aggregator = model.aggregator
    host = type(aggregator)._process_global_attention

    def process(self: Any, tokens: Tensor, B: int, S: int, P: int, C: int, i: int, pos: Any = None) -> Any:
        self.global_blocks[i].mask = None
        for block in self.global_blocks:
            block(tokens.view(B, S * P, C), pos=pos.view(B, S * P, 2), mask=None)
        return host(self, tokens, B, S, P, C, i, pos)

    aggregator.__class__ = type("Fork", (type(aggregator),), {"_process_global_attention": process})
    return "unexpected keyword argument 'mask'"


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (reading_a_layer, 1),
        (with_another_order, 2),
        (with_another_rotation, 1),
        (with_another_embedding, 1),
        (with_blocks_that_take_more, 2),
    ],
)
def test_a_fork_of_vggt_that_differs_runs_its_own_code(change: Callable[[Any], str], left: int) -> None:
    model = small_vggt()
    reason = change(model)
    before = contents(model)
    apply_lite3r(model, DENSE)
    report = describe(model)
    assert len(report.not_rewritten) == left
    assert any(reason in why for why in report.not_rewritten.values()), report.not_rewritten
    assert all(f"not rewritten: {words}, because {why}" in str(report) for words, why in report.not_rewritten.items())
    assert len(report.rewritten) == REWRITES - left
    remove_lite3r(model)
    assert contents(model) == before


def test_a_part_cannot_be_taken_out_of_a_rewritten_model() -> None:
    model = small_vggt()
    apply_lite3r(model, DENSE)
    with pytest.raises(NotAppliedError, match="part of the model that Lite3R was applied to: call remove_lite3r on the whole model"):
        remove_lite3r(model.aggregator)
    remove_lite3r(model)


def test_an_interruption_leaves_vggt_as_it_was(request: pytest.FixtureRequest) -> None:
    def apply() -> None:
        apply_lite3r(model, DENSE)

    model = small_vggt()
    apply()  # what is found once
    remove_lite3r(model)
    before, seen = contents(model), Counter[str]()
    lines = lines_of(apply)
    remove_lite3r(model)
    first = lines - 900  # most of what comes before changes nothing
    for line in range(first, lines + 1, 1 if request.config.getoption("--every-line") else 29):
        assert interrupted(apply, line)
        if lite3r_modules(model):
            assert interrupted(lambda: remove_lite3r(model), line - first + 1) or not lite3r_modules(model)
        if lite3r_modules(model):
            remove_lite3r(model)
            seen["taken out"] += 1
        assert contents(model) == before
        assert "forward" not in vars(model)
        assert "_apply_pos_embed" not in vars(model.depth_head)
        seen["as it was"] += 1
    assert seen["as it was"] > 20


def test_an_interruption_of_the_removal_loses_nothing(request: pytest.FixtureRequest) -> None:
    def remove() -> None:
        remove_lite3r(model)

    model = small_vggt()
    before = contents(model)
    apply_lite3r(model, DENSE)
    lines = lines_of(remove)
    for line in range(lines % 37 + 1, lines + 1, 1 if request.config.getoption("--every-line") else lines // 37):
        apply_lite3r(model, DENSE)
        assert interrupted(remove, line)
        if lite3r_modules(model):
            assert len(describe(model).rewritten) == REWRITES
            remove_lite3r(model)
        assert contents(model) == before
        assert "forward" not in vars(model)


def test_only_the_given_instance_changes() -> None:
    model, other = small_da3(), small_da3()
    before = {name: type(module) for name, module in other.named_modules()}
    rewrite_exactly(model)
    assert {name: type(module) for name, module in other.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in other.modules())


def test_other_models_have_none() -> None:
    for model in (nn.Linear(2, 2), nn.Sequential(hosts.Encoder(14, 32, 2, depth=1))):
        state = {name: type(module) for name, module in model.named_modules()}
        assert rewrite_exactly(model) is None
        assert {name: type(module) for name, module in model.named_modules()} == state


@pytest.mark.parametrize("build", [small_vggt, small_da3])
@torch.no_grad()
def test_convolutions_after_the_upsampling_come_before_it(build: Callable[[], nn.Module]) -> None:
    model, images = build(), torch.rand(IMAGES)
    expected = named_tensors(model(images))
    apply_lite3r(model, DENSE)
    assert any("1 x 1 convolutions before" in line for line in describe(model).rewritten)
    block = next(module for name, module in model.named_modules() if name.endswith("refinenet1"))
    assert isinstance(block, MixedFirst)
    maps = [torch.randn(1, block.out_conv.in_channels, 3, 4) for _ in range(2)]
    for given in ({}, {"size": (7, 5)}):
        found = block(*(x.clone() for x in maps), **given)
        torch.testing.assert_close(found, block.run_host(*(x.clone() for x in maps), **given), rtol=1e-4, atol=1e-5)
    sizes: list[torch.Size] = []
    handle = block.out_conv.register_forward_hook(lambda module, args, output: sizes.append(output.shape[2:]))
    assert block(*(x.clone() for x in maps)).shape[2:] == sizes[0] == (6, 8)  # whoever watches sees what the host shows
    handle.remove()
    for path, x in named_tensors(model(images)).items():
        torch.testing.assert_close(x, expected[path], atol=1e-5, rtol=16 * torch.finfo(torch.float32).eps)
    remove_lite3r(model)
    assert not any(isinstance(module, MixedFirst) for module in model.modules())


@pytest.mark.parametrize("build", [small_vggt, small_da3])
@torch.no_grad()
def test_another_module_in_the_place_of_the_convolution_comes_where_the_host_has_it(build: Callable[[], nn.Module]) -> None:
    model = build()
    apply_lite3r(model, DENSE)
    block: Any = next(module for name, module in model.named_modules() if name.endswith("refinenet1"))
    plain, maps = block.out_conv, [torch.randn(1, block.out_conv.in_channels, 3, 4) for _ in range(2)]

    def as_the_host() -> bool:
        return torch.equal(block(*(x.clone() for x in maps)), block.run_host(*(x.clone() for x in maps)))

    wide, padded = (nn.Conv2d(plain.in_channels, plain.out_channels, size, padding=1) for size in (3, 1))
    for other in (nn.Sequential(plain, nn.ReLU()), wide, padded):
        block.out_conv = other
        assert as_the_host()
    block.out_conv = plain
    plain.forward = lambda x: nn.Conv2d.forward(plain, x).relu()
    assert as_the_host()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("own(self, *maps, size=size).relu()", "differs"),
        ("own(self, *maps, size=size) if size is None else own(self, *maps).mean()", "differs"),
        ("other(self, *maps, size=size)", "there is no"),
    ],
)
def test_fusion_blocks_that_are_written_otherwise_are_left(body: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows the convolution would come before it; and a function that nobody knows may do anything."""
    model = small_vggt()
    block_class = type(model.depth_head.scratch.refinenet1)
    around = dict(vars(sys.modules[block_class.__module__])) if reason == "differs" else {}
    around |= {"own": block_class.forward, "other": block_class.forward}
    exec(f"def forward(self, *maps, size=None):\n    return {body}", around)
    monkeypatch.setattr(block_class, "forward", around["forward"])
    left = {line: why for line, why in plan_of(model).left.items() if "1 x 1" in line}
    assert left
    assert all(reason in why for why in left.values()), left


@torch.no_grad()
def test_a_fusion_block_that_takes_no_size_is_not_given_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_vggt()
    block = model.depth_head.scratch.refinenet1
    maps = [torch.randn(1, block.out_conv.in_channels, 3, 4) for _ in range(2)]
    apply_lite3r(model, DENSE)
    made = model.depth_head.scratch.refinenet1
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(made, "run_host", lambda *given, **named: seen.append(named))
    handle = made.out_conv.register_forward_hook(lambda *_: None)
    made(*maps)
    made(*maps, size=(7, 5))
    handle.remove()
    assert seen == [{}, {"size": (7, 5)}]


@pytest.mark.parametrize("name", ["aggregator.patch_embed.proj", "aggregator.rope", "depth_head", "depth_head.scratch.refinenet1"])
def test_a_module_that_was_replaced_since_does_not_keep_lite3r_in(name: str) -> None:
    model, fresh = small_vggt(), small_vggt()
    apply_lite3r(model, DENSE)
    owner, _, child = name.rpartition(".")
    setattr(model.get_submodule(owner), child, fresh.get_submodule(name))
    with pytest.raises(NotAppliedError, match="a part of the model"):
        remove_lite3r(model.aggregator)
    wrapped = nn.Sequential(model)
    remove_lite3r(wrapped)
    assert not lite3r_modules(model)
    with torch.no_grad():
        model(torch.rand(IMAGES))


def test_copies_that_peft_keeps_are_not_rewritten() -> None:
    """They leave with the adapter."""
    peft = pytest.importorskip("peft")
    model = small_vggt()
    config = peft.LoraConfig(r=2, target_modules=r".*patch_embed\.proj", modules_to_save=["refinenet1"])
    wrapped = peft.get_peft_model(model, config)
    apply_lite3r(wrapped, DENSE)
    assert not any("lora" in line or "modules_to_save" in line for line in describe(wrapped).rewritten)
    unloaded = wrapped.merge_and_unload()
    remove_lite3r(wrapped)
    assert not lite3r_modules(unloaded)


def plan_of(model: nn.Module) -> Any:
    """What would be rewritten, and what would not."""
    found = plan_rewrites(model, dict(model.named_modules()))
    assert found is not None
    return found


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_weights_in_bf16_lie_as_the_maps_of_a_head_do(layout: torch.memory_format) -> None:
    model, images = small_vggt(), torch.rand(IMAGES)
    model.depth_head.to(memory_format=layout)
    before = {name: (p.clone(), p.stride()) for name, p in model.named_parameters()}
    apply_lite3r(model, DENSE, weights="bf16")
    convolutions = [m for m in model.depth_head.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) and max(m.kernel_size) > 1]
    assert convolutions
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convolutions)
    assert model.aggregator.patch_embed.proj.weight.is_contiguous()
    assert model(images)["depth"].isfinite().all()
    convolutions[0].weight.mul_(2.0)  # what is written since, stays
    changed = next(name for name, p in model.named_parameters() if p is convolutions[0].weight)
    remove_lite3r(model)
    for name, (p, stride) in before.items():
        now = model.get_parameter(name)
        assert now.stride() == stride, name
        assert torch.equal(now, p.bfloat16().float() * 2 if name == changed else p), name
