"""LoRA around projections: where it goes, what it computes, and that it comes out or is folded in without a trace."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from interruptions import contents, interrupted, lines_of
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn.utils import prune
from toys import Adapter, Attention, Separate, Toy, images, sites, toy_adapter

from lite3r_plugin import Routed, apply_lite3r, convert, describe, lite3r_disabled, remove_lite3r, save_lite3r
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.errors import (
    AlreadyAppliedError,
    CheckpointError,
    ConfigError,
    ConvertedError,
    Lite3RError,
    ModelTypeError,
    NoSitesError,
    NotAppliedError,
    WeightsError,
)
from lite3r_plugin.fp8 import qat
from lite3r_plugin.fp8.qat import FakeQuantLinear
from lite3r_plugin.ops.fp8 import fake_quantize, quantize
from lite3r_plugin.peft import add_lora, lora_disabled, merge_lora
from lite3r_plugin.peft.qat_lora import QatLora, made_around
from lite3r_plugin.wrapper import Changes

__all__ = ["toy_adapter"]  # the fixture
pytestmark = pytest.mark.usefixtures("adapter")
SPARSE: dict[str, Any] = dict(keep_ratio=0.3, dense_below=0, block_q=16, block_k=16)
FUSED = ["frame.0.qkv", "frame.0.proj", "frame.1.qkv", "frame.1.proj", "cross.0.qkv", "cross.0.proj", "cross.1.qkv", "cross.1.proj"]
precisions = pytest.mark.parametrize("precision", ["full", "fp8_qat"])


def learned(model: nn.Module, std: float = 0.1) -> nn.Module:
    """`model` with LoRA and branches that do something."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "proj_lin" in name:
            nn.init.normal_(parameter, std=std)
    return model


def sparse(precision: Any = "full", **fields: Any) -> Any:
    return apply_lite3r(Toy().eval(), **SPARSE, precision=precision, **fields)


def with_lora(precision: Any = "full", **fields: Any) -> Any:
    model = sparse(precision)
    add_lora(model, rank=4, **fields)
    return learned(model)


# Where it goes.


def test_projections_of_the_sites_and_nothing_else() -> None:
    model = sparse()
    assert add_lora(model, rank=4) == FUSED
    assert [name for name, module in model.named_modules() if isinstance(module, lora.LoraLayer)] == FUSED
    assert not isinstance(model.head, lora.LoraLayer)


@pytest.mark.parametrize(("scopes", "expected"), [(("global",), FUSED[4:]), (("frame",), FUSED[:4])])
def test_scopes(scopes: Any, expected: list[str]) -> None:
    assert add_lora(sparse(), rank=4, scopes=scopes) == expected


def test_three_linears() -> None:
    model = apply_lite3r(Toy(make=Separate).eval(), **SPARSE)
    names = [f"cross.{i}.{name}" for i in range(2) for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    assert add_lora(model, rank=4, scopes=("global",)) == names


def test_linears_of_a_routed_site(adapter: Adapter) -> None:
    adapter.answer = lambda model: [dataclasses.replace(site, projections=Routed(2)) for site in sites(model)]  # pyright: ignore[reportArgumentType]
    model = sparse()
    before = model(images())
    assert add_lora(model, rank=4, scopes=("global",)) == FUSED[4:]
    assert not torch.allclose(learned(model)(images()), before)


def test_in_a_wrapper_names_are_those_of_the_wrapped_model() -> None:
    model = nn.Sequential(sparse())
    assert add_lora(model, rank=4) == [f"0.{name}" for name in FUSED]


def test_a_shared_linear_has_one_lora(adapter: Adapter) -> None:
    model = Toy().eval()
    model.cross[1].qkv = model.cross[0].qkv
    apply_lite3r(model, **SPARSE)
    assert len(add_lora(model, rank=4, scopes=("global",))) == 4
    assert model.cross[1].qkv is model.cross[0].qkv
    assert describe(model).lora_layers == 3
    merge_lora(model)
    assert type(model.cross[1].qkv) is nn.Linear
    assert model.cross[1].qkv is model.cross[0].qkv


def test_only_a_and_b_train_and_what_trained_before() -> None:
    model = sparse().requires_grad_(False)
    model.head.requires_grad_()
    add_lora(model, rank=4)
    trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name for name in trains if "lora_" not in name} == {"head.weight", "head.bias"}
    assert len([name for name in trains if "lora_" in name]) == 2 * len(FUSED)


def test_an_error_of_the_caller_takes_it_out() -> None:
    model = sparse()
    keys = list(model.state_dict())

    def interrupted() -> None:
        with Changes() as changes:
            add_lora(model, rank=4, changes=changes)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(model.state_dict()) == keys
    add_lora(model, rank=4)


# What it computes.


@precisions
def test_nothing_at_the_start(precision: Any) -> None:
    model = sparse(precision)
    before = model(images())
    add_lora(model, rank=4)
    assert torch.equal(model(images()), before)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (2.0, 0.5)])
@pytest.mark.parametrize("make", [Attention, Separate])
def test_the_sum_of_both_matrices_reaches_q_k_and_v(alpha: float | None, scale: float, make: Any) -> None:
    """A model whose weights are the sums computes the same."""
    model = apply_lite3r(Toy(make=make).eval(), **SPARSE)
    add_lora(model, rank=4, alpha=alpha)
    learned(model)
    other = apply_lite3r(Toy(make=make).eval(), **SPARSE)
    weights = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    for name, layer in model.named_modules():
        if isinstance(layer, lora.LoraLayer):
            a, b = (weights.pop(f"{name}.lora_{which}.default.weight") for which in "AB")
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + scale * b @ a
    other.load_state_dict(weights)
    torch.testing.assert_close(model(images()), other(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["full", "fp8_qat"])
def test_compiled_equals_eager_with_gradients(precision: Any) -> None:
    model = with_lora(precision)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "proj_lin" in name)
    expected = model(images())
    expected.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    out = compiled(images())
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    out.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert grads[name].abs().sum() > 0
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-2, atol=1e-3)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@precisions
def test_half_precision_hosts_have_lora_in_fp32(dtype: torch.dtype, precision: Any) -> None:
    model = apply_lite3r(Toy().eval().to(dtype), **SPARSE, precision=precision)
    add_lora(model, rank=4)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    out = learned(model, 0.02)(images(dtype=dtype))
    assert out.dtype == dtype
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "lora_" in name)
    with torch.no_grad():
        before = model(images(dtype=dtype))
        merge_lora(model)
        assert {p.dtype for name, p in model.named_parameters() if "proj_lin" not in name} == {dtype}
        after = model(images(dtype=dtype))
    if precision == "fp8_qat":
        assert torch.equal(after, before)
    else:
        torch.testing.assert_close(after, before, rtol=0.05, atol=0.05)


# While training for FP8.


def rounding(frozen: bool = True) -> tuple[FakeQuantLinear, Any]:
    """A Linear that rounds to FP8, and LoRA around it."""
    linear = nn.Linear(24, 10)
    linear.requires_grad_(not frozen)
    base = FakeQuantLinear(linear)
    base.join(Changes())
    layer: Any = made_around(base, "default", 4, 4)
    nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return base, layer


def another(layer: Any, name: str) -> None:
    """A second adapter."""
    layer.update_layer(name, 2, lora_alpha=4, config=peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False), **before_0_19(False))


def before_0_19(init: bool) -> dict[str, Any]:
    """What PEFT 0.18 wants of a configuration, one by one."""
    old = "lora_dropout" in inspect.signature(lora.LoraLayer.update_layer).parameters
    return dict(lora_dropout=0.0, init_lora_weights=init, use_rslora=False) if old else {}


@pytest.mark.parametrize("frozen", [True, False])
def test_the_product_is_with_the_rounded_sum(frozen: bool) -> None:
    base, layer = rounding(frozen)
    x = torch.randn(2, 5, 24, requires_grad=True)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    rounded_x, rounded_w = fake_quantize(x.detach()), fake_quantize((base.weight + b @ a).detach())
    y = layer(x)
    assert torch.equal(y, F.linear(rounded_x, rounded_w, base.bias))
    grad = torch.randn_like(y)
    y.backward(grad)
    of_sum = grad.flatten(0, 1).T @ rounded_x.flatten(0, 1)
    torch.testing.assert_close(x.grad, grad @ rounded_w)
    torch.testing.assert_close(b.grad, of_sum @ a.T)
    torch.testing.assert_close(a.grad, b.T @ of_sum)
    if frozen:
        assert base.weight.grad is None
    else:
        torch.testing.assert_close(base.weight.grad, of_sum)


def test_several_active_adapters_are_summed() -> None:
    base, layer = rounding()
    another(layer, "other")
    layer.set_adapter(["default", "other"])
    x = torch.randn(3, 24)
    total = base.weight + layer.get_delta_weight("default") + layer.get_delta_weight("other")
    assert torch.equal(layer(x), F.linear(fake_quantize(x), fake_quantize(total), base.bias))
    trained = layer(x)
    layer.merge()
    assert torch.equal(layer(x), trained)
    layer.unmerge()
    layer.set_adapter("other")
    assert not torch.allclose(layer(x), trained)


def test_a_frozen_weight_is_not_rounded_beside_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    _, layer = rounding()
    seen: list[Tensor] = []
    monkeypatch.setattr(qat, "quantize", lambda x, *args: seen.append(x) or quantize(x, *args))
    layer(torch.randn(3, 24))
    assert not seen
    with lora_disabled(layer):
        for _ in range(3):
            layer(torch.randn(3, 24))
    assert len(seen) == 1  # and is, once, where it runs alone


def test_infinities_are_counted_and_hooks_are_called() -> None:
    base, layer = rounding()
    seen = []
    base.register_forward_hook(lambda module, args, out: seen.append(out))
    x = torch.randn(3, 24)
    x[0, 1] = torch.inf
    out = layer(x)
    assert out.isfinite().all()
    assert base.infinities.item() == 1
    assert torch.equal(seen[0], out)


def test_autocast_does_not_reach_the_sum() -> None:
    _, layer = rounding()
    x = torch.randn(3, 24)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    layer.merge()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), out)


@pytest.mark.parametrize("wrong", [dict(lora_dropout=0.1), dict(lora_bias=True), dict(use_dora=True)])
def test_what_cannot_be_rounded_as_one_weight_is_refused(wrong: dict[str, Any]) -> None:
    base, _ = rounding()
    config = peft.LoraConfig(r=2, **wrong)
    with pytest.raises(ConfigError, match=r'rounded as one weight.*precision="full"'):
        QatLora(base, "default", config=config, r=2, lora_alpha=2, **wrong)  # pyright: ignore[reportArgumentType]


def test_adapters_by_sample_are_refused() -> None:
    _, layer = rounding()
    with pytest.raises(ConfigError, match="adapter_names cannot be used"):
        layer(torch.randn(3, 24), adapter_names=["default"] * 3)


def test_lora_of_peft_that_rounds_apart_is_named() -> None:
    model: Any = peft.get_peft_model(sparse("fp8_qat"), peft.LoraConfig(r=2, target_modules=["qkv"]))
    assert any("4 Linears round W to FP8 in training and not W + BA" in note for note in describe(model).notes)
    assert not describe(with_lora("fp8_qat")).notes


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_and_b_are_never_rounded(order: str) -> None:
    config = peft.LoraConfig(r=4, target_modules=["qkv", "proj"])
    model: Any = Toy().eval()
    if order == "before":
        model = apply_lite3r(peft.get_peft_model(model, config), **SPARSE, precision="fp8_qat")
    else:
        model = peft.get_peft_model(apply_lite3r(model, **SPARSE, precision="fp8_qat"), config)
    rounded = [name for name, module in model.named_modules() if isinstance(module, FakeQuantLinear)]
    assert len(rounded) == 8
    assert all(name.endswith(".base_layer") for name in rounded)


# The dense model, with everything in.


@precisions
def test_the_teacher_is_the_dense_model_bit_for_bit(precision: Any) -> None:
    model = Toy().eval()
    dense = model(images())
    apply_lite3r(model, **SPARSE, precision=precision)
    add_lora(model, rank=4)
    learned(model)
    model.cross[0].qkv.lora_A.requires_grad_(False)
    student, trains = model(images()), [p.requires_grad for p in model.parameters()]
    with torch.no_grad(), lite3r_disabled(model), lora_disabled(model):
        assert torch.equal(model(images()), dense)
    assert torch.equal(model(images()), student)
    assert [p.requires_grad for p in model.parameters()] == trains


@precisions
def test_lora_stays_on_where_lite3r_is_off(precision: Any) -> None:
    model = with_lora(precision)
    with lite3r_disabled(model):
        out = model(images())
        with lora_disabled(model):
            assert not torch.allclose(model(images()), out)
        merge_lora(model)
        torch.testing.assert_close(model(images()), out, rtol=1e-4, atol=1e-5)


def test_modules_to_save_are_switched_off_too() -> None:
    toy = Toy().eval()
    dense = toy(images())
    model: Any = peft.get_peft_model(toy, peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"]))
    nn.init.zeros_(model.base_model.model.head.modules_to_save["default"].weight)
    with lora_disabled(model):
        assert torch.equal(model(images()), dense)
    assert not torch.equal(model(images()), dense)


def test_switching_off_what_is_not_there_does_nothing() -> None:
    model = sparse()
    before = model(images())
    with lora_disabled(model):
        assert torch.equal(model(images()), before)
    with pytest.raises(ModelTypeError), lora_disabled(None):  # pyright: ignore[reportArgumentType]
        pass


@precisions
def test_removal_gives_the_untouched_dense_model(precision: Any) -> None:
    model = Toy().eval()
    before, dense = copy.deepcopy(model.state_dict()), model(images())
    modules = dict(model.named_modules())
    apply_lite3r(model, **SPARSE, precision=precision)
    add_lora(model, rank=4)
    learned(model)(images()).sum().backward()
    remove_lite3r(model)
    assert dict(model.named_modules()) == modules
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(images()), dense)


@precisions
def test_lora_of_peft_outlives_removal(precision: Any) -> None:
    toy = Toy().eval()
    model: Any = peft.get_peft_model(apply_lite3r(toy, **SPARSE, precision=precision), peft.LoraConfig(r=2, target_modules=["qkv"]))
    remove_lite3r(model)
    assert not lite3r_modules(model)
    learned(model)
    with_both = model(images())
    with model.disable_adapter():
        assert not torch.allclose(model(images()), with_both)
    expected: Any = peft.get_peft_model(Toy().eval(), peft.LoraConfig(r=2, target_modules=["qkv"]))
    expected.load_state_dict(model.state_dict())
    assert torch.equal(expected(images()), with_both)


def test_branches_that_peft_holds_are_not_lost() -> None:
    model: Any = peft.get_peft_model(sparse(), peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["proj_lin"]))
    before = learned(model)(images())
    with pytest.raises(WeightsError, match=r"cross\.0\.proj_lin is held by an adapter .*unload\(\)"):
        remove_lite3r(model)
    assert torch.equal(model(images()), before)
    assert not lite3r_modules(remove_lite3r(model.unload()))


@precisions
def test_copies_are_whole(precision: Any) -> None:
    model = with_lora(precision)
    expected = model(images())
    other = copy.deepcopy(model)
    assert torch.equal(other(images()), expected)
    merge_lora(other)
    assert describe(model).lora_layers == 8
    assert torch.equal(model(images()), expected)


# Folding it in.


@precisions
def test_merging(precision: Any) -> None:
    model = with_lora(precision)
    trained, branch = model(images()), model.cross[0].proj_lin.weight.clone()
    trains = {name.replace(".base_layer", ""): p.requires_grad for name, p in model.named_parameters() if "lora_" not in name}
    assert merge_lora(model) is model
    if precision == "fp8_qat":
        assert torch.equal(model(images()), trained)
    else:
        torch.testing.assert_close(model(images()), trained, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.cross[0].proj_lin.weight, branch)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains
    assert list(model.state_dict()) == list(sparse(precision).state_dict())
    assert describe(model).lora_layers == 0
    with pytest.raises(NotAppliedError, match="has no LoRA"):
        merge_lora(model)


def test_what_peft_merged_already_is_not_added_again() -> None:
    model = with_lora()
    expected = model(images())
    model.cross[0].qkv.merge()
    torch.testing.assert_close(merge_lora(model)(images()), expected, rtol=1e-5, atol=1e-6)


def test_a_broken_sum_changes_nothing() -> None:
    model = with_lora()
    nn.init.constant_(model.cross[1].proj.lora_B["default"].weight, math.inf)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=r"cross\.1\.proj: W \+ BA has infinities or NaN"):
        merge_lora(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("precision", [pytest.param("full", marks=pytest.mark.slow), "fp8_qat"])
@pytest.mark.parametrize("verb", ["add_lora", "merge_lora", "remove_lite3r"])
def test_an_interruption_changes_nothing(verb: str, precision: Any, request: pytest.FixtureRequest) -> None:
    """Anywhere: before its last lines, when all is done, the model is as it was."""

    def prepared() -> Any:
        torch.manual_seed(0)
        return sparse(precision) if verb == "add_lora" else with_lora(precision)

    call: Any = dict(add_lora=functools.partial(add_lora, rank=4), merge_lora=merge_lora, remove_lite3r=remove_lite3r)[verb]
    total = lines_of(functools.partial(call, prepared()))
    for line in range(1, total + 1, 1 if request.config.getoption("--every-line") else 97):
        model = prepared()
        before = contents(model)
        assert interrupted(functools.partial(call, model), line)
        now = contents(model)
        if now["keys"] == before["keys"]:
            assert {**now, "tables": None} == {**before, "tables": None}  # but that hooks may have moved
            call(model)
        else:
            assert line > 0.8 * total
            done = prepared()
            call(done)
            assert now["values"] == contents(done)["values"] or verb == "add_lora"
            assert now["keys"] == list(done.state_dict())


def test_lora_of_peft_is_merged_by_peft() -> None:
    model: Any = peft.get_peft_model(sparse(), peft.LoraConfig(r=2, target_modules=["qkv"]))
    with pytest.raises(NotAppliedError, match=r"put in by PEFT.*\.merge_and_unload\(\)"):
        merge_lora(model)


@precisions
def test_neither_converted_nor_saved_before(precision: Any, tmp_path: Path) -> None:
    model = with_lora(precision)
    with pytest.raises(WeightsError, match=r"cross\.0|frame\.0.* is inside of an adapter.*merge_lora\(model\)"):
        convert(model)
    with pytest.raises(CheckpointError, match=r"merge_lora\(model\)"):
        save_lite3r(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    merge_lora(model)
    with pytest.raises(CheckpointError, match="weights of the model itself were trained, or had LoRA merged"):
        save_lite3r(model, tmp_path / "x")
    assert describe(convert(model)).linears == {"in FP8 (emulated)": 8}
    save_lite3r(model, tmp_path / "x")


# What is said, and what is refused.


def test_describe() -> None:
    model = sparse()
    before = describe(model)
    assert (before.lora_layers, before.lora_parameters, before.lora_active) == (0, 0, ())
    add_lora(model, rank=4)
    found = describe(model)
    expected = 4 * (4 * (32 + 96) + 4 * (32 + 32))
    assert (found.lora_layers, found.lora_parameters, found.lora_active) == (8, expected, ("default",))
    assert (found.parameters, found.branch_parameters) == (before.parameters, before.branch_parameters)
    assert f"LoRA around 8 Linears, {expected:,} parameters; active: default" in str(found)
    with lora_disabled(model):
        assert "parameters; none active" in str(describe(model))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(rank=0), "rank of LoRA is a positive integer"),
        (dict(rank=2.0), "rank of LoRA is a positive integer"),
        (dict(alpha=0), "alpha of LoRA is a positive number"),
        (dict(alpha=math.nan), "alpha of LoRA is a positive number"),
        (dict(scopes="global"), r"scopes of LoRA is a tuple"),
        (dict(scopes=()), r"scopes of LoRA is a tuple"),
        (dict(scopes=("globe",)), "scopes"),
    ],
)
def test_wrong_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        add_lora(sparse(), **fields)


def converted() -> nn.Module:
    return convert(sparse())


def adapted() -> Any:
    return peft.get_peft_model(sparse(), peft.LoraConfig(r=2, target_modules=["proj"]))


def pruned() -> nn.Module:
    model = sparse()
    prune.l1_unstructured(model.cross[0].qkv, "weight", 0.5)
    return model


def parametrized() -> nn.Module:
    model = sparse()
    nn.utils.parametrizations.weight_norm(model.cross[0].qkv)
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: 1, ModelTypeError, "takes a torch.nn.Module"),
        (Toy, NotAppliedError, "carries no Lite3R"),
        (lambda: sparse().cross[0], NotAppliedError, "holds 1 of the 2 attention modules"),
        (converted, ConvertedError, r"before convert\(model\)"),
        (with_lora, AlreadyAppliedError, "has LoRA already"),
        (adapted, AlreadyAppliedError, r"frame\.0\.proj is inside of an adapter already \(Linear\)"),
        (pruned, WeightsError, r"cross\.0\.qkv\.weight is no parameter"),
        (parametrized, WeightsError, r"cross\.0\.qkv is a ParametrizedLinear"),
    ],
)
def test_models_that_take_no_lora(make: Callable[[], Any], error: type[Lite3RError], message: str) -> None:
    model = make()
    with pytest.raises(error, match=message):
        add_lora(model, rank=4)


def test_scopes_that_are_not_there() -> None:
    with pytest.raises(NoSitesError, match=r"no attention site of the scopes \['encoder'\], but of \['frame', 'global'\]"):
        add_lora(sparse(), scopes=("encoder",))


# Whoever reads the weight.


@pytest.mark.parametrize("kind", [nn.Linear, FakeQuantLinear])
def test_the_weight_that_is_read_is_what_merging_gives(kind: type[nn.Module]) -> None:
    linear = nn.Linear(24, 10).requires_grad_(False)
    layer: Any = made_around(linear if kind is nn.Linear else FakeQuantLinear(linear), "default", 4, 8)
    assert torch.equal(layer.weight, linear.weight)
    nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    read = layer.weight
    assert torch.autograd.grad(read.sum(), layer.lora_B["default"].weight)[0].abs().sum() > 0
    layer.enable_adapters(False)
    assert torch.equal(layer.weight, linear.weight)
    layer.enable_adapters(True)
    layer.merge()
    assert torch.equal(linear.weight, read)
    assert torch.equal(layer.weight, read)
