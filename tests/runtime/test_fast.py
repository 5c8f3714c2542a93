"""A preset for the whole model: each part by itself and all together, and the way back."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import contents, interrupted, lines_of
from numerics import relative_error
from recording import Tape
from torch import Tensor, nn

from lite3r_plugin import (
    apply_lite3r,
    calibrate,
    convert,
    describe,
    distill,
    lite3r_disabled,
    load_lite3r,
    remove_lite3r,
    save_lite3r,
)
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.errors import CheckpointError, ConfigError, WeightsError
from lite3r_plugin.ops.dispatch import SlowPathWarning
from lite3r_plugin.runtime import fast
from lite3r_plugin.runtime.graphs import Graphs
from lite3r_plugin.testbed import Testbed, TestbedConfig

SPARSE: dict[str, Any] = {"keep_ratio": 0.25, "block_q": 16, "block_k": 16}  # dense on a CPU
ALWAYS_SPARSE: dict[str, Any] = {"dense_below": 0, "pin": "none"}
FAST: dict[str, Any] = SPARSE | {"preset": "fast", "compile_blocks": False}
GRAPHS: dict[str, Any] = SPARSE | {"cuda_graphs": True}
HALF: dict[str, Any] = SPARSE | {"weights": "bf16"}
EMULATED: dict[str, Any] = {"precision": "fp8", "fp8_backend": "emulated"}
SIZES = TestbedConfig(dim=32, head_dim=32, depth=1, stem=8)
Outputs = dict[str, Tensor]


def small() -> Testbed:
    torch.manual_seed(0)
    return Testbed(SIZES).eval()


def images(views: int = 2, seed: int = 1) -> Tensor:
    return torch.rand(1, views, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def run(model: nn.Module, views: int = 2, seed: int = 1) -> Outputs:
    with torch.inference_mode():
        return {name: x.clone() for name, x in model(images(views, seed).to(next(model.parameters()).device)).items()}


def same(a: Outputs, b: Outputs) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a: Outputs, b: Outputs, most: float = 0.03) -> bool:
    return all(a[name].dtype == b[name].dtype and relative_error(a[name], b[name]) < most for name in b)


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Models record on tapes, without a GPU."""
    Tape.made.clear()
    monkeypatch.setattr(fast, "Graphs", functools.partial(Graphs, recorder=Tape))
    return Tape.made


# Weights in BF16


def test_weights_become_bf16_and_outputs_stay_as_they_were() -> None:
    model, sparse = apply_lite3r(small(), **HALF), run(apply_lite3r(small(), **SPARSE))
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert dtypes["aggregator.global_blocks.0.attn.qkv.weight"] == torch.bfloat16
    assert dtypes["depth_head.out.weight"] == torch.bfloat16
    assert dtypes["camera_head.out.1.weight"] == torch.float32
    assert {dtype for name, dtype in dtypes.items() if "proj_lin" in name} == {torch.float32}
    assert close(run(model), sparse)
    with torch.autocast("cpu", torch.bfloat16):  # is of no account inside
        assert same(run(model), run(model))
    assert "camera_head: arithmetic in FP32 whatever the other weights are" in describe(model).rewritten


def test_bf16_everywhere_takes_the_camera_head_too() -> None:
    model = apply_lite3r(small(), **SPARSE, weights="bf16_everywhere")
    assert {p.dtype for p in model.camera_head.parameters()} == {torch.bfloat16}
    assert run(model)["pose_enc"].dtype == torch.float32


def test_removing_gives_the_old_weights_back_bit_for_bit() -> None:
    model = small()
    before, dense = contents(model), run(model)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    apply_lite3r(model, **FAST)
    run(model)
    with lite3r_disabled(model):
        assert same(run(model), dense)
    assert model.depth_head.out.weight.dtype == torch.bfloat16
    remove_lite3r(model)
    assert contents(model) == before
    assert all(torch.equal(x, weights[name]) and x.dtype == weights[name].dtype for name, x in model.state_dict().items())
    assert same(run(model), dense)


def test_without_originals_there_is_no_way_back_and_that_is_said_before(tmp_path: Path) -> None:
    model = small()
    with pytest.warns(UserWarning, match="keep_originals=False frees what they were: remove_lite3r and lite3r_disabled will refuse"):
        apply_lite3r(model, **HALF, keep_originals=False)
    assert "no originals are kept: remove_lite3r is refused" in str(describe(model))
    with pytest.raises(WeightsError, match="remove_lite3r needs the weights that became BF16, and keep_originals=False freed them"):
        remove_lite3r(model)
    with pytest.raises(WeightsError, match="lite3r_disabled needs"), lite3r_disabled(model):
        pass
    with pytest.raises(CheckpointError, match="there is no whole model to save"):
        save_lite3r(model, tmp_path, whole=True)
    save_lite3r(model, tmp_path)


def test_weights_that_were_loaded_since_stay() -> None:
    model, other = small(), small()
    with torch.no_grad():
        other.depth_head.out.weight.add_(1)
    apply_lite3r(model, **HALF)
    model.load_state_dict(other.state_dict(), strict=False)
    assert "were changed since, and stay so" in str(describe(model))
    remove_lite3r(model)
    assert torch.equal(model.depth_head.out.weight, other.depth_head.out.weight.bfloat16().float())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_has_the_way_back_too(copied: Callable[[nn.Module], Any]) -> None:
    model, dense = apply_lite3r(small(), **HALF), small()
    with torch.no_grad():
        model.depth_head.out.weight.add_(1)
    twin = copied(model)
    assert "1 were changed since" in str(describe(twin))
    with lite3r_disabled(twin):
        pass
    remove_lite3r(twin)
    differing = [name for name, x in twin.state_dict().items() if not torch.equal(x, dense.state_dict()[name])]
    assert differing == ["depth_head.out.weight"]
    assert model.depth_head.out.weight.dtype == torch.bfloat16


def test_weights_that_others_took_the_place_of_get_their_dtype_back() -> None:
    """Memory for a model that had none makes all of them anew."""
    with torch.device("meta"):
        model = Testbed(SIZES).eval()
    dtypes = {name: x.dtype for name, x in model.state_dict().items()}
    apply_lite3r(model, **HALF).to_empty(device="cpu").load_state_dict(small().state_dict(), strict=False)
    assert close(run(model), run(apply_lite3r(small(), **SPARSE)))
    remove_lite3r(model)
    assert {name: x.dtype for name, x in model.state_dict().items()} == dtypes


def test_removing_inside_of_lite3r_disabled_is_removing() -> None:
    model, dense = apply_lite3r(small(), **HALF), small()
    with lite3r_disabled(model):
        remove_lite3r(model)
    assert same(run(model), run(dense))
    assert all(torch.equal(x, dense.state_dict()[name]) for name, x in model.state_dict().items())


def test_a_model_that_was_made_for_inference_alone() -> None:
    """Nobody counts what is written to its weights."""
    with torch.inference_mode():
        model = small()
    apply_lite3r(model, **HALF)
    assert close(run(model), run(apply_lite3r(small(), **SPARSE)))
    with torch.inference_mode():
        model.depth_head.out.weight.add_(1)
    remove_lite3r(model)
    differing = [name for name, x in model.state_dict().items() if not torch.equal(x, small().state_dict()[name])]
    assert differing == ["depth_head.out.weight"]


def test_a_model_in_bf16_keeps_its_dtype() -> None:
    model = small().bfloat16()
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    apply_lite3r(model, **HALF)
    with torch.inference_mode():
        model(images().bfloat16())
    remove_lite3r(model)
    assert all(torch.equal(x, weights[name]) and x.dtype == torch.bfloat16 for name, x in model.state_dict().items())


def test_what_is_said_of_a_model_that_nobody_knows_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lite3r_plugin.runtime.rewrites.find_rewrites", lambda model: None)
    model = small()
    with pytest.warns(SlowPathWarning, match="asked for, and left out: weights in BF16, because the adapter 'vggt' does not say"):
        apply_lite3r(model, **HALF)
    assert "left out: weights in BF16" in str(describe(model))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_forward_that_was_exchanged_is_left() -> None:
    model = small()
    model.forward = own = model.forward
    with pytest.warns(SlowPathWarning, match="left out: all of it, because the forward of the model was exchanged by somebody else"):
        apply_lite3r(model, **FAST)
    assert vars(model)["forward"] is own
    remove_lite3r(model)


# Graphs


def test_forwards_are_recorded(tapes: list[Tape]) -> None:
    model, plain = apply_lite3r(small(), **GRAPHS), apply_lite3r(small(), **SPARSE)
    for views in (2, 3, 2, 3):
        assert same(run(model, views), run(plain, views))
    assert tapes[0].recorded == 2
    assert "CUDA graphs: 2 layouts of inputs, at most 8; 4 replays" in str(describe(model))
    before = lite3r_modules(model)["aggregator.global_blocks.0.attn"].calls.dense
    run(model)
    assert lite3r_modules(model)["aggregator.global_blocks.0.attn"].calls.dense == before  # no Python runs


@pytest.mark.slow
def test_what_calibration_learns_is_seen(tapes: list[Tape]) -> None:
    model = apply_lite3r(small(), **GRAPHS, **ALWAYS_SPARSE)
    before = run(model)
    calibrate(model, [images(2, seed) for seed in range(3)], progress=False)
    for site in lite3r_modules(model).values():
        if "proj_lin" in site._modules:
            nn.init.normal_(site.proj_lin.weight, std=0.5)
    after = run(model)
    assert not same(before, after)
    fast_of(model).forget()
    assert same(run(model), after)


def test_weights_that_were_loaded_are_seen(tapes: list[Tape]) -> None:
    model, other = apply_lite3r(small(), **FAST), small()
    run(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.load_state_dict(other.state_dict(), strict=False)
    expected = run(apply_lite3r(other, **FAST | {"cuda_graphs": False}))
    assert same(run(model), expected)
    assert tapes[0].recorded == 1


@pytest.mark.slow
def test_lora_is_seen(tapes: list[Tape]) -> None:
    pytest.importorskip("peft")
    from lite3r_plugin.peft import add_lora, merge_lora

    model = apply_lite3r(small(), **GRAPHS)
    before = run(model)
    add_lora(model, rank=2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    with torch.no_grad():
        added = run(model)
    assert not same(added, before)
    merge_lora(model)
    assert close(run(model), added, 1e-3)
    assert tapes[0].recorded == 3


def test_what_is_converted_is_recorded_anew(tapes: list[Tape]) -> None:
    model, plain = apply_lite3r(small(), **GRAPHS), apply_lite3r(small(), **SPARSE)
    run(model)
    for each in (model, plain):
        convert(each, fp8_backend="emulated")
    assert same(run(model), run(plain))
    assert tapes[0].released == 1


def test_training_and_gradients_go_past(tapes: list[Tape]) -> None:
    model = apply_lite3r(small(), **GRAPHS)
    with pytest.warns(SlowPathWarning, match=r"gradients are wanted: call the model under torch.inference_mode\(\)"):
        model(images())["depth"].mean().backward()
    assert lite3r_modules(model)["aggregator.global_blocks.0.attn"].qkv.weight.grad is not None
    model.train()
    model(images())
    model.eval()
    assert tapes[0].recorded == 0
    assert "no CUDA graph in 1 forwards: the model is in training mode" in str(describe(model))
    model.requires_grad_(False)
    model(images())
    assert tapes[0].recorded == 1


def test_who_watches_sees_everything(tapes: list[Tape]) -> None:
    model, seen = apply_lite3r(small(), **GRAPHS), []
    run(model)
    site = lite3r_modules(model)["aggregator.global_blocks.0.attn"]
    with site.observe(lambda *args: seen.append(1)):
        run(model)
    assert seen == [1]
    assert tapes[0].recorded == 1


@pytest.mark.parametrize("watches", [True, False])
def test_what_takes_the_place_of_attention_is_never_in_a_recording(watches: bool, tapes: list[Tape]) -> None:
    torch._dynamo.reset()
    model, plain = apply_lite3r(small(), **GRAPHS, compile_blocks=True), apply_lite3r(small(), **SPARSE)
    runs: list[int] = []
    fast_of(model).blocks.backend = lambda graph, inputs: lambda *args: runs.append(1) or graph(*args)
    assert close(run(model), run(plain), 1e-4)
    torch._dynamo.reset()  # torch before 2.14 never compiles again what it met in a dispatch mode, which a tape is
    runs.clear()
    sites = [lite3r_modules(one)["aggregator.global_blocks.0.attn"] for one in (model, plain)]
    with sites[0].substitute(lambda site, inputs: 2 * inputs.v, watches), sites[1].substitute(lambda site, inputs: 2 * inputs.v):
        expected = run(plain)
        assert close(run(model), expected, 1e-4)
    assert not close(run(model), expected, 1e-4)
    assert bool(runs) is not watches
    assert tapes[0].recorded == 1
    torch._dynamo.reset()


def test_who_watches_all_modules_sees_everything(tapes: list[Tape]) -> None:
    model, seen = apply_lite3r(small(), **GRAPHS), []
    run(model)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        run(model)
    finally:
        handle.remove()
    assert model.depth_head.out in seen
    assert "no CUDA graph in 1 forwards: a hook for all modules sees each call" in str(describe(model))


class Twice(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("by", ["forward", pytest.param("class", marks=pytest.mark.slow)])
def test_code_that_is_exchanged_later_runs(by: str, tapes: list[Tape]) -> None:
    model, plain = apply_lite3r(small(), **GRAPHS), apply_lite3r(small(), **SPARSE)
    before = run(model)
    for each in (model, plain):
        out = each.get_submodule("depth_head.project")
        if by == "class":
            out.__class__ = Twice
        else:
            out.forward = lambda input, own=out.forward: 2 * own(input)
    with pytest.warns(SlowPathWarning, match="was exchanged by somebody else") if by == "forward" else contextlib.nullcontext():
        after = run(model)
    assert same(after, run(plain))
    assert not same(after, before)


def test_threads_share_a_model(tapes: list[Tape]) -> None:
    model, plain = apply_lite3r(small(), **FAST), apply_lite3r(small(), **FAST | {"cuda_graphs": False})
    wanted = {seed: run(plain, 2, seed) for seed in range(6)}
    start = threading.Barrier(3)

    def work(first: int) -> bool:
        start.wait()
        return all(same(run(model, 2, seed), wanted[seed]) for seed in (first, first + 3))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, range(3)))
    assert tapes[0].recorded == 1


# All of it


def test_compiled_blocks_give_the_same() -> None:
    torch._dynamo.reset()
    model, plain = apply_lite3r(small(), **SPARSE, compile_blocks=True), apply_lite3r(small(), **SPARSE)
    fast_of(model).blocks.backend = "aot_eager"
    for views in (2, 3):
        assert close(run(model, views), run(plain, views), 1e-4)
    assert "2 blocks compiled" in str(describe(model))
    assert all(module._compiled_call_impl is None for module in model.modules())
    torch._dynamo.reset()


def test_a_compiler_that_fails_is_said() -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler today")

    torch._dynamo.reset()
    model, plain = apply_lite3r(small(), **SPARSE, compile_blocks=True), apply_lite3r(small(), **SPARSE)
    fast_of(model).blocks.backend = broken
    assert same(run(model), run(plain))
    assert "blocks not compiled: " in str(describe(model))
    assert "no compiler today" in str(describe(model))
    torch._dynamo.reset()


def fast_of(model: nn.Module) -> Any:
    return next(iter(lite3r_modules(model).values())).state.fast


@pytest.mark.slow
def test_the_whole_preset_under_the_users_own_compile(tapes: list[Tape]) -> None:
    torch._dynamo.reset()
    model = apply_lite3r(small(), **FAST)
    expected = run(model)
    compiled = torch.compile(model, backend="aot_eager")
    assert close(run(compiled), expected, 1e-2)
    torch._dynamo.reset()


def test_a_wrapped_model_is_found(tapes: list[Tape]) -> None:
    model = torch.compile(small(), backend="eager")
    apply_lite3r(model, **FAST)
    assert isinstance(vars(model._orig_mod)["forward"], fast.FastForward)
    remove_lite3r(model)
    assert "forward" not in vars(model._orig_mod)
    torch._dynamo.reset()


def test_fp8_and_the_preset(tapes: list[Tape], tmp_path: Path) -> None:
    model = apply_lite3r(small(), **FAST, **EMULATED)
    plain = apply_lite3r(small(), **SPARSE, **EMULATED)
    linear, other = (each.aggregator.global_blocks[0].mlp[0] for each in (model, plain))
    assert torch.equal(linear.weight_data.view(torch.uint8), other.weight_data.view(torch.uint8))  # made of the weights as they came
    assert linear.dtype == torch.bfloat16
    assert close(run(model), run(plain), 0.1)
    save_lite3r(model, tmp_path)
    loaded = load_lite3r(small(), tmp_path)
    assert same(run(loaded), run(model))


@pytest.mark.slow
def test_converting_later_quantises_the_weights_as_they_came(tapes: list[Tape]) -> None:
    model, plain = apply_lite3r(small(), **FAST), apply_lite3r(small(), **SPARSE)
    run(model)
    for each in (model, plain):
        convert(each, fp8_backend="emulated")
    linear, other = (each.aggregator.global_blocks[0].mlp[0] for each in (model, plain))
    assert torch.equal(linear.weight_data.view(torch.uint8), other.weight_data.view(torch.uint8))
    assert model.depth_head.out.weight.dtype == torch.bfloat16
    assert close(run(model), run(plain), 0.1)


def test_a_whole_checkpoint_holds_the_weights_as_they_came(tmp_path: Path) -> None:
    model = small()
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    apply_lite3r(model, **FAST)
    expected = run(model)
    save_lite3r(model, tmp_path, whole=True)
    with torch.device("meta"):
        empty = Testbed(SIZES).eval()
    load_lite3r(empty, tmp_path)
    assert same(run(empty), expected)
    remove_lite3r(empty)
    assert all(torch.equal(x, weights[name]) and x.dtype == weights[name].dtype for name, x in empty.state_dict().items())


def test_a_checkpoint_may_be_loaded_with_a_preset(tmp_path: Path) -> None:
    model = apply_lite3r(small(), **SPARSE)
    for site in lite3r_modules(model).values():
        if "proj_lin" in site._modules:
            nn.init.normal_(site.proj_lin.weight, std=0.1)
    save_lite3r(model, tmp_path)
    loaded = load_lite3r(small(), tmp_path, preset="fast", compile_blocks=False)
    assert close(run(loaded), run(model))
    assert describe(loaded).config.preset == "fast"
    with pytest.raises(ConfigError, match=r"load_lite3r takes fields about how the whole model runs, .* not \['keep_ratio'\]"):
        load_lite3r(small(), tmp_path, keep_ratio=0.5)


def test_calibration_works_and_distillation_says_what_to_do(tapes: list[Tape]) -> None:
    model = apply_lite3r(small(), **FAST, **ALWAYS_SPARSE)
    assert len(calibrate(model, [images(2, seed) for seed in range(3)], progress=False).sites) == 1
    with pytest.raises(ConfigError, match='distill without preset="fast"'):
        distill(model, [images()], steps=1)


def saved_and_loaded(model: nn.Module) -> Any:
    """By `torch.save`."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        pytest.param(lambda model: pickle.loads(pickle.dumps(model)), marks=pytest.mark.slow),
        pytest.param(saved_and_loaded, marks=pytest.mark.slow),
    ],
    ids=["deepcopy", "pickle", "file"],
)
def test_copies_run_by_themselves(copied: Callable[[nn.Module], Any], tapes: list[Tape]) -> None:
    model = apply_lite3r(small(), **FAST)
    expected, twin = run(model), copied(model)
    assert fast_of(twin).module is twin
    assert fast_of(twin) is not fast_of(model)
    assert same(run(twin), expected)
    remove_lite3r(twin)
    assert same(run(model), expected)


def test_moving_the_model_afterwards(tapes: list[Tape]) -> None:
    model = apply_lite3r(small(), **FAST)
    expected = run(model)
    model.to(torch.device("cpu"))
    assert same(run(model), expected)
    model.double()
    assert close(run(model), expected, 0.03)
    remove_lite3r(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.95])
def test_an_interruption_leaves_the_model_as_it_was(share: float) -> None:
    model = small()
    before, weights = contents(model), {name: x.clone() for name, x in model.state_dict().items()}
    lines = lines_of(lambda: apply_lite3r(small(), **FAST))
    assert interrupted(lambda: apply_lite3r(model, **FAST), int(share * lines))
    assert contents(model) == before
    assert all(torch.equal(x, weights[name]) and x.dtype == weights[name].dtype for name, x in model.state_dict().items())


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["full", "fp8"])
@pytest.mark.parametrize("compile_blocks", [False, True])
def test_a_gpu_replays_what_runs_without_graphs(precision: Any, compile_blocks: bool) -> None:
    fields = FAST | ALWAYS_SPARSE | {"compile_blocks": compile_blocks, "precision": precision}
    model = apply_lite3r(small().cuda(), **fields)
    plain = apply_lite3r(small().cuda(), **fields, cuda_graphs=False)
    for views in (2, 3, 2, 3):
        assert same(run(model, views), run(plain, views))
    assert "CUDA graphs: 2 layouts of inputs, at most 8; 4 replays" in str(describe(model))
    with torch.autocast("cuda", torch.bfloat16):
        assert same(run(model), run(plain))


@pytest.mark.gpu
def test_a_gpu_sees_what_changes_between_calls() -> None:
    fields = FAST | ALWAYS_SPARSE
    model, plain = apply_lite3r(small().cuda(), **fields), apply_lite3r(small().cuda(), **fields, cuda_graphs=False)
    run(model)
    for each in (model, plain):
        torch.manual_seed(3)
        each.load_state_dict({name: x + 0.01 * torch.randn_like(x) for name, x in each.state_dict().items() if x.is_floating_point()})
    assert same(run(model), run(plain))
    for each in (model, plain):
        calibrate(each, [images(2, seed).cuda() for seed in range(3)], progress=False)
    assert close(run(model), run(plain), 1e-2)
    model.cpu()
    torch.cuda.empty_cache()
    run(model)
    model.cuda()
    assert close(run(model), run(plain), 1e-2)


@pytest.mark.gpu
def test_a_gpu_serves_threads() -> None:
    model = apply_lite3r(small().cuda(), **FAST, **ALWAYS_SPARSE)
    plain = apply_lite3r(small().cuda(), **FAST | ALWAYS_SPARSE | {"cuda_graphs": False})
    wanted = {(views, seed): run(plain, views, seed) for views in (2, 3) for seed in range(6)}

    def work(first: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [same(run(model, views, seed), wanted[views, seed]) for views in (2, 3) for seed in (first, first + 3)]
            torch.cuda.current_stream().synchronize()
        return all(found)

    torch.cuda.synchronize()
    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, range(3)))


@pytest.mark.gpu
def test_a_second_gpu() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    first = run(apply_lite3r(small().to("cuda:0"), **FAST))
    second = run(apply_lite3r(small(), **FAST).to("cuda:1"))
    assert close({name: x.cpu() for name, x in second.items()}, {name: x.cpu() for name, x in first.items()}, 1e-2)
