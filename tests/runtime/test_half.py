"""Weights in BF16 of a head that computes in FP32: which they are, what is computed with them, and the way back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import contents
from numerics import relative_error
from torch import Tensor, nn

from lite3r_plugin import apply_lite3r, describe, doctor, lite3r_disabled, load_lite3r, plan_memory, remove_lite3r, save_lite3r
from lite3r_plugin.adapter import ExactRewrite
from lite3r_plugin.adapter.plugins import find_rewrites
from lite3r_plugin.ops import skinny_linear
from lite3r_plugin.runtime import exact
from lite3r_plugin.runtime.exact import few_rows
from lite3r_plugin.testbed import Testbed, TestbedConfig

HALF: dict[str, Any] = {"keep_ratio": 1.0, "linear_branch": "none", "weights": "bf16"}
SIZES = TestbedConfig(dim=32, head_dim=32, depth=1, stem=8)
OTHER = "depth_head.out.weight"


def small() -> Testbed:
    torch.manual_seed(0)
    return Testbed(SIZES).eval()


@pytest.fixture(autouse=True)
def _rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Linears of the testbed's camera head are few rows, as those of VGGT's are."""

    def found(model: nn.Module) -> list[ExactRewrite] | None:
        heads = [(name, module) for name, module in model.named_modules() if name.endswith("camera_head")]
        return [*(find_rewrites(model) or ()), *(rewrite for name, head in heads for rewrite in few_rows(name, head))]

    monkeypatch.setattr(exact, "LEAST_WEIGHTS", 2048)
    monkeypatch.setattr("lite3r_plugin.runtime.rewrites.find_rewrites", found)


def large(model: Any) -> dict[str, Tensor]:
    """Weights of the Linears of the camera head that are large."""
    linears = {name: module for name, module in model.camera_head.named_modules() if isinstance(module, nn.Linear)}
    return {f"camera_head.{name}.weight": module.weight for name, module in linears.items() if module.weight.numel() >= 2048}


def images(views: int = 2) -> Tensor:
    return torch.rand(1, views, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def run(model: nn.Module, views: int = 2) -> dict[str, Tensor]:
    with torch.inference_mode():
        return {name: x.clone() for name, x in model(images(views)).items()}


def rounded(model: Testbed) -> Testbed:
    """The same with the large weights of the camera head rounded, and nothing else."""
    with torch.no_grad():
        for weight in large(model).values():
            weight.copy_(weight.bfloat16())
    return model


def tokens() -> Tensor:
    return torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(2))


def poses(model: Any) -> Tensor:
    """Of the camera head, given FP32."""
    with torch.inference_mode():
        return model.camera_head(tokens())


def test_large_weights_of_a_head_in_fp32_are_bf16_and_the_arithmetic_is_fp32() -> None:
    model = apply_lite3r(small(), **HALF)
    assert len(large(model)) >= 8
    assert {weight.dtype for weight in large(model).values()} == {torch.bfloat16}
    others = {name: p.dtype for name, p in model.named_parameters() if name.startswith("camera_head") and name not in large(model)}
    assert set(others.values()) == {torch.float32}
    assert any(name.endswith("qkv.bias") for name in others)
    found, expected, exact_ = poses(model), poses(rounded(small())), poses(small())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert 1e-6 < relative_error(found, exact_) < 0.01
    assert run(model)["pose_enc"].dtype == torch.float32
    text = str(describe(model))
    assert "camera_head: arithmetic in FP32 whatever the other weights are" in text
    assert f", {len(large(model))} of which are computed with in FP32; " in text


@pytest.mark.parametrize("fields", [dict(fuse=False), dict(exact_rewrites=False)], ids=str)
def test_without_what_widens_them_they_stay_in_fp32(fields: dict[str, Any]) -> None:
    model = apply_lite3r(small(), **HALF, **fields)
    assert {p.dtype for p in model.camera_head.parameters()} == {torch.float32}
    assert model.get_parameter(OTHER).dtype == torch.bfloat16
    assert "computed with in FP32" not in str(describe(model))
    assert torch.equal(poses(model), poses(small()))


def test_a_linear_of_a_fork_stays_in_fp32() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model, fork = small(), "camera_head.trunk.0.attn.qkv"
    model.get_submodule(fork).__class__ = Scaled
    apply_lite3r(model, **HALF)
    assert model.get_parameter(f"{fork}.weight").dtype == torch.float32
    assert model.get_parameter("camera_head.trunk.1.attn.qkv.weight").dtype == torch.bfloat16
    assert any("it is a Scaled" in why for why in describe(model).not_rewritten.values())
    assert run(model)["pose_enc"].isfinite().all()


def test_a_weight_that_others_share_is_what_they_can_compute_with() -> None:
    model: Any = small()
    model.camera_head.other = nn.Embedding(*model.camera_head.project.weight.shape)
    model.camera_head.other.weight = model.camera_head.project.weight
    apply_lite3r(model, **HALF)
    assert model.camera_head.project.weight.dtype == torch.float32
    assert model.camera_head.trunk[0].attn.qkv.weight.dtype == torch.bfloat16


def test_nothing_changes_for_weights_as_they_are_and_for_bf16_everywhere() -> None:
    model = apply_lite3r(small(), keep_ratio=1.0, linear_branch="none")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert any("few rows" in words for words in describe(model).rewritten)
    everywhere: dict[str, Any] = HALF | {"weights": "bf16_everywhere"}
    model = apply_lite3r(small(), **everywhere)
    assert {p.dtype for p in model.camera_head.parameters()} == {torch.bfloat16}
    assert "computed with in FP32" not in str(describe(model))
    assert run(model)["pose_enc"].dtype == torch.float32


def test_the_way_back_is_bit_for_bit() -> None:
    model, dense = small(), run(small())
    before = contents(model)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    apply_lite3r(model, **HALF)
    with lite3r_disabled(model):
        assert all(torch.equal(x, dense[name]) for name, x in run(model).items())
    assert {weight.dtype for weight in large(model).values()} == {torch.bfloat16}
    remove_lite3r(model)
    assert contents(model) == before
    assert all(torch.equal(x, weights[name]) and x.dtype == weights[name].dtype for name, x in model.state_dict().items())
    assert all(torch.equal(x, dense[name]) for name, x in run(model).items())


def test_what_somebody_has_made_of_them_since_is_said() -> None:
    model = apply_lite3r(small(), **HALF)
    assert "weights in BF16: " in str(describe(model))
    assert "weights that became BF16, and are in float32 now: " in str(describe(model.float()))


def test_the_weights_that_came_are_there_while_anybody_has_it_disabled() -> None:
    dense = run(small())
    model = apply_lite3r(small(), **HALF)
    before = run(model)
    first, second = lite3r_disabled(model), lite3r_disabled(model)
    first.__enter__()
    second.__enter__()
    for open_ in (first, second):
        assert all(torch.equal(x, dense[name]) for name, x in run(model).items())
        open_.__exit__(None, None, None)
    assert all(torch.equal(x, before[name]) for name, x in run(model).items())
    assert not all(torch.equal(x, dense[name]) for name, x in before.items())


@pytest.mark.filterwarnings("ignore:Lite3R. weights become BF16, and keep_originals=False:UserWarning")
def test_without_originals_they_are_bf16_all_the_same() -> None:
    model = apply_lite3r(small(), **HALF, keep_originals=False)
    assert {weight.dtype for weight in large(model).values()} == {torch.bfloat16}
    torch.testing.assert_close(poses(model), poses(apply_lite3r(small(), **HALF)))


def test_a_model_in_half_precision_keeps_them_so() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = apply_lite3r(small().to(dtype), **HALF)
        assert {weight.dtype for weight in large(model).values()} == {torch.bfloat16}
        assert model.camera_head.norm.weight.dtype == torch.float32
        with torch.inference_mode():
            assert model(images().to(dtype))["pose_enc"].isfinite().all()
        remove_lite3r(model)
        assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies_compute_alike_and_go_back(copied: Callable[[nn.Module], Any]) -> None:
    model, dense = apply_lite3r(small(), **HALF), small()
    twin = copied(model)
    assert torch.equal(poses(twin), poses(model))
    assert vars(twin.camera_head.project)["forward"].module is twin.camera_head.project
    remove_lite3r(twin)
    assert all(torch.equal(x, dense.state_dict()[name]) for name, x in twin.state_dict().items())
    assert model.camera_head.project.weight.dtype == torch.bfloat16


def test_weights_that_are_loaded_since_are_rounded_too() -> None:
    model, other = apply_lite3r(small(), **HALF), small()
    with torch.no_grad():
        other.camera_head.project.weight.mul_(1.01)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(poses(model), poses(rounded(other)), rtol=1e-5, atol=1e-6)
    model.load_state_dict(small().state_dict(), assign=True)  # which brings FP32
    assert torch.equal(poses(model), poses(small()))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_a_head_that_is_sharded_since_computes_alike() -> None:
    """Its weights are DTensors in BF16 then, and inputs in FP32."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = apply_lite3r(small(), **HALF)
    expected = poses(model)
    linears = {
        name: module
        for name, module in model.camera_head.trunk[0].named_modules()
        if name.startswith("mlp.") and isinstance(module, nn.Linear)
    }
    assert len(linears) == 2
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        plan = dict(zip(linears, (ColwiseParallel(), RowwiseParallel()), strict=True))
        parallelize_module(model.camera_head.trunk[0], init_device_mesh("cpu", (1,)), plan)
        assert all(isinstance(module.weight, DTensor) and module.weight.dtype == torch.bfloat16 for module in linears.values())
        with torch.no_grad():
            torch.testing.assert_close(model.camera_head(tokens()), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_a_checkpoint_holds_what_they_were(tmp_path: Path) -> None:
    model, dense = apply_lite3r(small(), **HALF), small()
    save_lite3r(model, tmp_path, whole=True)
    torch.manual_seed(5)
    loaded = load_lite3r(Testbed(SIZES).eval(), tmp_path)
    assert {weight.dtype for weight in large(loaded).values()} == {torch.bfloat16}
    assert torch.equal(poses(loaded), poses(model))
    remove_lite3r(loaded)
    assert all(torch.equal(x, dense.state_dict()[name]) for name, x in loaded.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_model_can_be_moved_to_another_dtype_since(dtype: torch.dtype) -> None:
    model = apply_lite3r(small(), **HALF).to(dtype)
    with torch.inference_mode():
        found, expected = (m.camera_head(tokens().to(dtype)) for m in (model, rounded(small()).to(dtype)))
    assert relative_error(found, expected) < (1e-5 if dtype.itemsize > 2 else 0.02)
    assert torch.isfinite(run(model)["depth"]).all()


def test_the_dtype_of_the_rest_is_not_read_from_the_head() -> None:
    """A head that comes first may be moved by itself."""
    model = small()
    model._modules = {"camera_head": model._modules.pop("camera_head")} | model._modules
    apply_lite3r(model, **HALF)
    model.camera_head.float()
    assert vars(model)["forward"].half.dtype == torch.bfloat16
    assert torch.equal(run(model)["depth"], run(apply_lite3r(small(), **HALF))["depth"])


def test_gradients_reach_what_is_before_the_head() -> None:
    def gradient(model: Any) -> Tensor:
        given = tokens().requires_grad_()
        return torch.autograd.grad(model.camera_head(given).square().sum(), given)[0]

    model = apply_lite3r(small(), **HALF)
    torch.testing.assert_close(gradient(model), gradient(rounded(small())), rtol=1e-4, atol=1e-6)
    model.train()(images())["pose_enc"].sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in large(model).values())


def test_compiled_blocks_have_the_kernel_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sees the rows of each call."""
    seen: list[int] = []
    own = skinny_linear.linear
    monkeypatch.setattr(skinny_linear, "linear", lambda x, *rest: seen.append(x.numel() // x.shape[-1]) or own(x, *rest))
    plain = apply_lite3r(small(), **HALF)
    model = apply_lite3r(small(), **HALF, compile_blocks=True)
    fast: Any = vars(model)["forward"]
    fast.blocks.backend = "aot_eager"
    expected = [run(plain, views) for views in (2, 20)]
    seen.clear()
    for views, wanted in zip((2, 20), expected, strict=True):
        assert relative_error(run(model, views)["pose_enc"], wanted["pose_enc"]) < 0.01
    assert "compiled" in str(describe(model))
    assert "not compiled" not in str(describe(model))
    assert seen == [2] * len(large(model)) + [20] * len(large(model))


def test_memory_is_planned_and_told() -> None:
    model = apply_lite3r(small(), **HALF, max_memory="1GB")
    plan = plan_memory(model, images(12))
    assert plan.fits
    assert plan.standing < plan_memory(apply_lite3r(small(), **HALF, fuse=False, max_memory="1GB"), images(12)).standing
    saved = next(step for step in doctor(small(), images()).steps if step.name == "weights in BF16").saves_bytes
    before, after = (sum(p.nbytes for p in m.parameters()) for m in (small(), model))
    assert saved == before - after


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # inductor's advice, which the head does not take
def test_the_preset_on_a_gpu_gives_what_its_parts_do_without_it() -> None:
    """Compiled, and from CUDA graphs; of few rows and of more."""
    plain = apply_lite3r(small().cuda(), **HALF)
    model = apply_lite3r(small().cuda(), keep_ratio=1.0, linear_branch="none", preset="fast")
    assert {weight.dtype for weight in large(model).values()} == {torch.bfloat16}
    for views in (2, 16, 20):
        given = images(views).cuda()
        with torch.inference_mode():
            expected = plain(given)["pose_enc"]
            for _ in range(3):  # the last is a replay
                found = model(given)["pose_enc"].clone()
        assert relative_error(found, expected) < 0.01
    assert "not compiled" not in str(describe(model))


class Normalising(Testbed):
    """Has a buffer that is a view when it is made, as VGGT's means of images are."""

    def __init__(self, config: TestbedConfig) -> None:
        super().__init__(config)
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 1, 3, 1, 1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return super().forward(images - self.mean)


@pytest.mark.parametrize("fields", [{"weights": "bf16"}, {"preset": "fast"}])
def test_a_model_with_buffers_that_are_views_compiles_whole(fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Normalising(SIZES).eval().requires_grad_(False)
    host, before = model.mean, model.mean.clone()
    assert host._is_view()
    apply_lite3r(model, **fields)
    assert model.mean.dtype == torch.bfloat16
    expected = run(model)["depth"]
    torch.testing.assert_close(run(torch.compile(model, backend="eager"))["depth"], expected, rtol=2e-2, atol=2e-2)
    remove_lite3r(model)
    assert model.mean is host
    assert torch.equal(host, before)
    assert host.dtype == torch.float32
