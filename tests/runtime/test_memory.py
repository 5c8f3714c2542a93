"""`max_memory`: forwards are planned before they run, run in exact chunks where they must, and are refused where nothing helps."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from real_models import small_da3, small_vggt
from torch import Tensor, nn

from lite3r_plugin import Lite3RConfig, apply_lite3r, choose_keep_ratios, describe, lite3r_disabled, plan_memory, remove_lite3r
from lite3r_plugin.attention.module import SparseLinearAttention
from lite3r_plugin.errors import ConfigError, InputError, MemoryLimitError, NotAppliedError
from lite3r_plugin.fp8.block import mlp
from lite3r_plugin.fp8.linear import Fp8Linear
from lite3r_plugin.ops.dispatch import SlowPathWarning
from lite3r_plugin.ops.fp8 import E4M3, quantize
from lite3r_plugin.runtime import memory
from lite3r_plugin.runtime.chunks import Chunks, Places, by_views, finding_places, in_chunks
from lite3r_plugin.runtime.trace import traced
from lite3r_plugin.testbed import Testbed, TestbedConfig

VIEWS = 5
SPARSE: dict[str, Any] = {"dense_below": 0, "pin": "special", "block_q": 16, "block_k": 16}
FAST = {"preset": "fast", "compile_blocks": False}
EAGER = {**FAST, "cuda_graphs": False}  # a recording holds what it needs before the next forward


def small() -> Testbed:
    torch.manual_seed(0)
    return Testbed(TestbedConfig(dim=64, head_dim=32, depth=1, stem=8)).eval().requires_grad_(False)


def images(views: int = VIEWS, size: int = 64) -> Tensor:
    return torch.rand(1, views, 3, size, size, generator=torch.Generator().manual_seed(0))


def places_of(model: nn.Module, *inputs: Any, views: int = 2) -> Places:
    with torch.no_grad(), finding_places(model, views) as places:
        model(*inputs)
    return places()


def held(model: nn.Module, chunks: Chunks, places: Places, x: Tensor) -> int:
    with torch.no_grad(), in_chunks(model, places, chunks), traced(model) as trace:
        model(x)
    return trace.peak


# Places


def test_what_treats_views_and_tokens_by_themselves_is_found() -> None:
    places = places_of(small(), images(2))
    assert places.views == ("aggregator.patch_embed", "aggregator.frame_blocks.0", "depth_head", "point_head")
    assert "aggregator.global_blocks.0.mlp" in places.rows
    assert not any(name.startswith("aggregator.frame_blocks") for name in places.rows)
    assert places.heads == {}


class Mixing(nn.Module):
    """Looks like a module of single views, and lets each see the next one a little."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.up, self.down = dim, nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x)) + 1e-5 * x.roll(1, self.dim)


@pytest.mark.parametrize("dim", [0, 1])
def test_what_lets_views_or_tokens_see_each_other_is_not_taken(dim: int) -> None:
    places = places_of(nn.Sequential(Mixing(dim)), torch.rand(2, 6, 8))
    assert ("0" in places.views) == (dim == 1)
    assert ("0" in places.rows) == (dim == 0)


def test_modules_that_must_see_all_views_stay_whole() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8)))
    with torch.no_grad(), finding_places(model, 2, {model[0][0]}) as places:
        model(torch.rand(2, 8))
    assert places() == Places()


class Head(nn.Module):
    """Takes some views at once, as the heads of VGGT."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.sizes = nn.Linear(4, 4), list[int]()

    def forward(self, x: Tensor, frames_chunk_size: int = 8) -> Tensor:
        self.sizes.append(frames_chunk_size)
        return self.linear(x)


def test_heads_that_say_how_many_views_they_take_are_told() -> None:
    model = nn.Sequential(Head())
    places = places_of(model, torch.rand(1, 2, 4))
    assert places.heads == {"0": "frames_chunk_size"}
    with torch.no_grad(), in_chunks(model, places, Chunks(heads=2)):
        model(torch.rand(1, 4, 4))
    model(torch.rand(1, 4, 4))
    assert model[0].sizes == [8, 2, 8]


# Chunks


@pytest.mark.parametrize("chunks", [Chunks(views=2), Chunks(views=1), Chunks(rows=50), Chunks(views=3, rows=7)])
@torch.no_grad()
def test_chunks_give_the_same_and_hold_less(chunks: Chunks) -> None:
    model, x = small(), images()
    places = places_of(model, images(2))
    whole = model(x)
    with in_chunks(model, places, chunks):
        cut = model(x)
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=1e-5, atol=1e-5)
    assert held(model, Chunks(views=1, rows=50), places, x) < held(model, Chunks(), places, x)
    assert all(module._compiled_call_impl is None for module in model.modules())


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 1, 2)])
def test_parts_of_views_are_joined_as_they_lie_in_memory(order: tuple[int, ...]) -> None:
    x = torch.rand(5, 2, 3, 4).permute(order)
    joined = by_views(2, lambda part: 2 * part, x)
    assert torch.equal(joined, 2 * x)
    assert joined.stride() == x.stride()


@torch.no_grad()
def test_compiled_blocks_run_in_chunks_too() -> None:
    model, x = small(), images()
    places = places_of(model, images(2))
    expected = model(x)["depth"]
    calls: list[tuple[int, ...]] = []
    block = model.aggregator.frame_blocks[0]
    block._compiled_call_impl = lambda x, pos: (calls.append(tuple(x.shape)), block._call_impl(x, pos=pos))[1]
    with in_chunks(model, places, Chunks(views=2)):
        torch.testing.assert_close(model(x)["depth"], expected)
    assert [shape[0] for shape in calls] == [2, 2, 1]


@torch.no_grad()
def test_the_mlp_of_an_fp8_block_in_chunks_is_bit_for_bit_the_same() -> None:
    torch.manual_seed(0)
    up, down = (Fp8Linear.quantized(nn.Linear(*size).bfloat16(), "emulated") for size in ((32, 64), (64, 32)))
    x = torch.randn(2, 9, 32, dtype=torch.bfloat16)
    whole = mlp(quantize(x), up, down, "gelu")
    assert torch.equal(mlp(quantize(x), up, down, "gelu", rows_at_once=4), whole)


# Plans


@pytest.mark.parametrize(
    "fields",
    [
        {},
        pytest.param(SPARSE, marks=pytest.mark.slow),
        FAST,
        pytest.param({**FAST, "precision": "fp8", "fp8_backend": "emulated"}, marks=pytest.mark.slow),
    ],
)
def test_the_predicted_peak_is_what_is_held(fields: dict[str, Any]) -> None:
    model = apply_lite3r(small(), max_memory="1GB", **fields)
    x = images()
    plan = plan_memory(model, x)
    assert plan.fits
    assert plan.chunks == Chunks()
    with torch.no_grad(), traced(model) as trace:
        model(x)
    assert plan.peak - plan.standing == trace.peak
    assert plan.standing == sum(p.nbytes for p in (*model.parameters(), *model.buffers())) + x.nbytes


@pytest.mark.parametrize("make", [small_vggt, pytest.param(small_da3, marks=pytest.mark.slow)])
def test_the_published_families_are_foreseen_and_cut_exactly(make: Callable[[], nn.Module]) -> None:
    model, x = make().requires_grad_(False), images(3, 112)
    apply_lite3r(model, max_memory="2GB", **FAST, **SPARSE)
    plan = plan_memory(model, x)
    with torch.no_grad(), traced(model) as trace:
        model(x)
    assert plan.peak - plan.standing == trace.peak
    assert set(model.forward.places.heads.values()) <= {"frames_chunk_size", "chunk_size"}
    with torch.no_grad():
        expected = model(x)["depth"]
        with in_chunks(model, model.forward.places, Chunks(heads=1, views=1, rows=50, attention=1)):
            cut = model(x)["depth"]
    torch.testing.assert_close(cut, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("make", [small_vggt, small_da3])
@pytest.mark.parametrize(
    "fields",
    [{"dense_below": 0, "keep_ratio": 0.3}, {**EAGER, "dense_below": 0}, {**EAGER, "precision": "fp8"}, {"preset": "small"}],
    ids=str,
)
def test_what_kernels_hold_on_a_gpu_is_foreseen(make: Callable[[], nn.Module], fields: dict[str, Any]) -> None:
    model, x = make().requires_grad_(False).cuda(), images(3, 224).cuda()
    apply_lite3r(model, **{"max_memory": "8GB", **fields})
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled="preset" not in fields):
        model(x)  # libraries take what they keep: a workspace of cuBLAS
        model.forward.plans.clear()
        gc.collect()  # else it comes in the midst
        before = torch.cuda.memory_allocated()
        plan = plan_memory(model, x)
        assert torch.cuda.memory_allocated() == before
        torch.cuda.reset_peak_memory_stats()
        model(x)
    held = torch.cuda.max_memory_allocated() - before
    assert plan.fits
    assert plan.standing == before
    assert plan.peak - plan.standing == pytest.approx(held, rel=0.05)


def test_hooks_that_watch_do_not_change_what_is_held() -> None:
    model = small_vggt().requires_grad_(False)
    apply_lite3r(model)
    with torch.no_grad(), traced(model) as trace:
        model(images(2, 112))
    layers = [item for item in trace.held if item.part == "aggregator" and item.shape == (1, 2, 69, 128)]
    assert len(layers) == 4, "of five layers the heads read four"
    in_heads = min(item.made for item in trace.held if item.part.startswith("camera_head"))
    assert sum((item.freed or math.inf) > in_heads for item in layers) == 1


def test_what_a_frame_block_gave_is_not_held_while_the_next_one_runs() -> None:
    model = small_vggt().requires_grad_(False)
    apply_lite3r(model)
    with torch.no_grad(), traced(model) as trace:
        model(images(2, 112))
    for block in range(4):
        made = min(item.made for item in trace.held if item.part.startswith(f"aggregator.frame_blocks.{block + 1}"))
        given = [item for item in trace.held if item.part.startswith(f"aggregator.frame_blocks.{block}") and item.made < made]
        assert given
        assert all((item.freed or math.inf) <= made for item in given), block


@torch.no_grad()
def test_the_wide_rows_of_an_mlp_are_not_held_while_it_makes_its_output() -> None:
    up, down = (Fp8Linear.quantized(nn.Linear(*size).bfloat16(), "emulated") for size in ((32, 128), (128, 32)))
    rows = quantize(torch.randn(64, 32, dtype=torch.bfloat16))
    with traced(nn.Sequential(up, down)) as trace:
        mlp(rows, up, down, "gelu")
    wide = next(item for item in trace.held if item.shape == (64, 128) and item.size == 64 * 128 * 2)
    out = [item for item in trace.held if item.shape == (64, 32) and item.size == 64 * 32 * 2]
    assert wide.freed is not None
    assert wide.freed < out[-1].made


def test_buffers_that_are_views_are_planned() -> None:
    model = small()
    model.register_buffer("mean", torch.rand(3).view(1, 1, 3, 1, 1))
    assert model.mean._is_view()
    assert plan_memory(apply_lite3r(model, max_memory="1GB", **FAST), images(2)).fits


def test_a_forward_that_is_too_large_runs_in_chunks() -> None:
    model, x = small(), images()
    expected = model(x)
    whole = plan_memory(apply_lite3r(model, max_memory="1GB"), x)
    remove_lite3r(model)
    apply_lite3r(model, max_memory=whole.peak - 1)
    with torch.inference_mode():
        found = model(x)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
    plan = plan_memory(model, x)
    assert plan.whole == whole.peak
    assert plan.peak < whole.peak
    assert plan.chunks != Chunks()
    assert held(model, plan.chunks, model.forward.places, x) == plan.peak - plan.standing
    assert f"instead of {plan.whole / 2**30:.3f}" in str(describe(model))


def test_observers_see_no_forward_of_a_plan() -> None:
    model, x, seen = small(), images(), list[tuple[int, float]]()
    apply_lite3r(model, max_memory="1GB", **SPARSE)
    site: Any = model.get_submodule("aggregator.global_blocks.0.attn")
    with torch.inference_mode(), site.observe(lambda site, inputs, out: seen.append((inputs.layout.views, out.abs().max().item()))):
        model(x)
    assert len(seen) == 1, "not those on two views, nor those without data"
    assert seen[0][0] == VIEWS


def test_what_takes_the_place_of_attention_sees_no_forward_of_a_plan() -> None:
    model, x, seen = small(), images(), list[float]()
    apply_lite3r(model, max_memory="1GB", keep_ratio="auto", **SPARSE)
    sites = [module for module in model.modules() if isinstance(module, SparseLinearAttention) and module.sparse]
    with torch.inference_mode(), contextlib.ExitStack() as stack:
        for site in sites:
            stack.enter_context(site.substitute(lambda site, inputs: (seen.append(inputs.v.sum().item()), inputs.v)[1]))
        model(x)
        assert all(site.is_substituted for site in sites)
    assert len(seen) == len(sites)


def test_attention_that_somebody_else_computes_is_not_planned() -> None:
    """It may wait for other processes, which a forward without data would do in vain."""
    model, x = small(), images()
    apply_lite3r(model, max_memory="1MB", **SPARSE)
    site: Any = model.get_submodule("aggregator.global_blocks.0.attn")
    with torch.inference_mode(), site.substitute(lambda site, inputs: inputs.v, watches=False):
        with pytest.warns(SlowPathWarning, match="max_memory is not kept: something else takes the place of attention"):
            model(x)
        model(x)
    assert "memory not planned in 2 forwards: something else" in str(describe(model))
    with torch.inference_mode(), pytest.raises(MemoryLimitError):
        model(x)


def test_ratios_are_chosen_by_the_inputs_alone() -> None:
    profiles = []
    for limit in (None, "1GB"):
        model = apply_lite3r(small(), keep_ratio="auto", max_memory=limit, **SPARSE)
        inputs = [torch.rand(1, VIEWS, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
        profiles.append(choose_keep_ratios(model, inputs, mean_keep_ratio=0.5))
    assert profiles[0].making == profiles[1].making
    assert profiles[0] == profiles[1]


def test_what_is_observed_has_a_plan_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that somebody sees is not cut into heads."""
    monkeypatch.setattr(memory, "STEPS", (Chunks(), Chunks(attention=1)))
    model, x = small(), images()
    whole = plan_memory(apply_lite3r(model, max_memory="1GB", attention_backend="naive", **SPARSE), x).peak
    remove_lite3r(model)
    apply_lite3r(model, max_memory=whole - 1, attention_backend="naive", **SPARSE)
    site: Any = model.get_submodule("aggregator.global_blocks.0.attn")
    with torch.inference_mode():
        model(x)
        with site.observe(lambda *_: None), pytest.raises(MemoryLimitError):
            model(x)
        with site.observe(lambda *_: None):
            assert plan_memory(model, x).peak == whole
        model(x)


def test_what_cannot_fit_is_refused_with_the_reason_and_does_not_run() -> None:
    model, x = small(), images()
    apply_lite3r(model, max_memory="1MB")
    with (
        torch.inference_mode(),
        pytest.raises(MemoryLimitError, match=r"predicted peak .* No smaller chunks are left: give fewer views .* weights=\"bf16\""),
    ):
        model(x)
    assert not plan_memory(model, x).fits
    assert all(site.calls.dense == site.calls.sparse == 0 for site in describe(model).sites)
    assert "calls so far: 0 sparse, 0 dense" in str(describe(model))


@pytest.mark.parametrize("fields", [{}, {"precision": "fp8", "fp8_backend": "emulated"}])
def test_a_plan_copies_no_tensor(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = apply_lite3r(small(), max_memory="1GB", **FAST, **fields)
    plan_memory(model, images(2))
    copied: list[Tensor] = []
    monkeypatch.setattr(Tensor, "__deepcopy__", lambda self, memo: copied.append(self))
    clone = Tensor.clone

    def watched(self: Tensor, **options: Any) -> Tensor:
        if self.dtype == E4M3:  # which torch does not copy by itself
            copied.append(self)
        return clone(self, **options)

    monkeypatch.setattr(Tensor, "clone", watched)
    plan_memory(model, images(3))
    assert copied == []


def test_images_of_inference_mode_are_planned_too() -> None:
    model = apply_lite3r(small(), max_memory="1GB")
    with torch.inference_mode():
        x = images(2)
        assert plan_memory(model, x).fits
        model(x)


def test_each_layout_has_its_plan_and_is_planned_once() -> None:
    model = apply_lite3r(small(), max_memory="1GB")
    plans = [plan_memory(model, images(views)) for views in (2, 5, 2)]
    assert plans[0] is plans[2]
    assert plans[0].peak < plans[1].peak
    assert plans[1].shapes == ((1, 5, 3, 64, 64),)
    assert "memory for [1, 5, 3, 64, 64]: predicted peak" in str(describe(model))


def test_forwards_with_gradients_and_in_training_are_not_planned_and_say_so() -> None:
    model = apply_lite3r(small(), max_memory="1MB").requires_grad_(True)
    with pytest.warns(SlowPathWarning, match="max_memory is not kept: gradients are wanted"):
        model(images(1))
    model.requires_grad_(False).train()
    model(images(1))
    text = str(describe(model))
    assert "memory not planned in 1 forwards: gradients are wanted" in text
    assert "memory not planned in 1 forwards: the model is in training mode" in text


@pytest.mark.parametrize("fields", [{}, FAST])
def test_it_is_taken_out_with_the_rest(fields: dict[str, Any]) -> None:
    model, x = small(), images(2)
    expected = model(x)["depth"]
    apply_lite3r(model, max_memory="1MB", **fields)
    with lite3r_disabled(model):
        assert torch.equal(model(x)["depth"], expected)
    remove_lite3r(model)
    assert "forward" not in vars(model)
    assert torch.equal(model(x)["depth"], expected)


@pytest.mark.parametrize("fields", [{}, FAST])
def test_copies_plan_for_themselves(fields: dict[str, Any]) -> None:
    model = apply_lite3r(small(), max_memory="1GB", **fields)
    plan_memory(model, images(2))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.forward.module is copied
        with torch.inference_mode():
            torch.testing.assert_close(copied(images(2))["depth"], model(images(2))["depth"])


def test_a_forward_that_needs_values_cannot_be_planned() -> None:
    class Waits(Testbed):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return super().forward(images * (1 if images.max() > 0 else 2))

    model = apply_lite3r(Waits(TestbedConfig(dim=64, head_dim=32, depth=1, stem=8)).eval().requires_grad_(False), max_memory="1GB")
    with pytest.raises(InputError, match="does not run on tensors without data"), torch.no_grad():
        model(images(2))


@torch.jit.script
def _scripted(x: Tensor) -> Tensor:
    return torch.cat([x, -x], dim=-1)[..., : x.shape[-1]]


@pytest.mark.filterwarnings("ignore:`torch.jit.script")
def test_torchscript_is_not_fused_on_tensors_without_data() -> None:
    class Scripted(Testbed):
        def __init__(self, config: TestbedConfig) -> None:
            super().__init__(config)
            self.scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            optimized.append(torch._C._get_graph_executor_optimize())
            return super().forward(_scripted(images) + 0 * self.scripted(images.mT[..., :3]).mean())

    optimized: list[bool] = []
    model = Scripted(TestbedConfig(dim=64, head_dim=32, depth=1, stem=8)).eval().requires_grad_(False)
    with torch.no_grad():
        expected = [model(images(2))["depth"] for _ in range(3)][-1]
    apply_lite3r(model, max_memory="1GB")
    plan_memory(model, images(2))
    assert optimized.pop() is False
    assert torch._C._get_graph_executor_optimize() is True
    with torch.no_grad():
        torch.testing.assert_close(model(images(2))["depth"], expected)


def test_the_limit_is_checked_and_stored() -> None:
    config = Lite3RConfig(max_memory="7.5GiB")
    assert config.max_memory == 15 * 2**29
    assert Lite3RConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for wrong in ("much", 0, -1, True, 1.5):
        with pytest.raises(ConfigError, match="max_memory is a number of bytes above 0"):
            Lite3RConfig(max_memory=wrong)  # pyright: ignore[reportArgumentType]


def test_the_preset_for_small_cards_plans_for_what_the_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = apply_lite3r(small(), preset="small"), images()
    assert {str(p.dtype) for p in model.aggregator.parameters()} >= {"torch.bfloat16"}
    monkeypatch.setattr("lite3r_plugin.runtime.memory.memory_of", lambda device: 10**9)
    plan = plan_memory(model, x)
    assert plan.fits
    assert plan.limit == 94 * 10**7
    assert "memory at most what the device has" in str(describe(model))
    assert plan_memory(apply_lite3r(small(), preset="small", max_memory="2GB"), x).limit == 2 * 10**9
    monkeypatch.setattr("lite3r_plugin.runtime.memory.memory_of", lambda device: None)
    with pytest.raises(InputError, match="how much memory cpu has is not known: say max_memory"):
        plan_memory(apply_lite3r(small(), preset="small"), x)


def test_without_a_limit_there_is_nothing_to_plan() -> None:
    with pytest.raises(NotAppliedError, match="has no limit to plan for"):
        plan_memory(apply_lite3r(small()), images(1))


def test_a_forward_that_others_exchanged_is_refused() -> None:
    model = small()
    model.forward = lambda images: Testbed.forward(model, images)
    with pytest.raises(ConfigError, match="max_memory cannot be kept"):
        apply_lite3r(model, max_memory="1GB")
