"""Lite3R as a method of PEFT: what `get_peft_model` puts in, adapters that are switched, saved, loaded and merged."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners import lora
from torch import nn
from toys import Adapter, Attention, Separate, Toy, images, sites, toy_adapter

from lite3r_plugin import (
    Lite3RConfig,
    apply_lite3r,
    calibrate,
    choose_keep_ratios,
    convert,
    describe,
    distill,
    lite3r_disabled,
    load_lite3r,
    remove_lite3r,
    save_lite3r,
)
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.attention.branch import BranchLinear
from lite3r_plugin.errors import AlreadyAppliedError, CheckpointError, ConfigError, ConvertedError, UnknownModelError, WeightsError
from lite3r_plugin.peft import Lite3RPeftConfig, Lite3RTuner, add_lora, lora_disabled
from lite3r_plugin.peft.qat_lora import QatLora

__all__ = ["toy_adapter"]  # the fixture
pytestmark = pytest.mark.usefixtures("adapter")
SPARSE: dict[str, Any] = dict(keep_ratio=0.3, dense_below=0, block_q=16, block_k=16)
FORMS = {"branches": dict(lora_scopes=()), "LoRA beside them": dict(r=4), "LoRA alone": dict(r=4, linear_branch="none")}
forms = pytest.mark.parametrize("form", FORMS)
precisions = pytest.mark.parametrize("precision", ["full", "fp8_qat"])


def config(form: str = "LoRA beside them", **fields: Any) -> Lite3RPeftConfig:
    return Lite3RPeftConfig(**{**SPARSE, **FORMS[form], **fields})


def learned(model: Any, adapter: str = "default", seed: int = 0) -> Any:
    """`model` with an adapter that does something."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name and ("lora_B" in name or "proj_lin" in name):
            parameter.data.normal_(std=0.1, generator=generator)
    return model


def adapted(form: str = "LoRA beside them", toy: Toy | None = None, **fields: Any) -> Any:
    return learned(get_peft_model((toy or Toy()).eval(), config(form, **fields)).eval())


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_fields_are_those_of_the_configuration() -> None:
    """Each with its default, so that a new field is not forgotten."""
    ours = {field.name: field.default for field in dataclasses.fields(Lite3RPeftConfig)}
    for field in dataclasses.fields(Lite3RConfig):
        assert ours[field.name] == field.default
    assert Lite3RPeftConfig().lite3r() == Lite3RConfig()


# What goes in.


@forms
def test_what_trains(form: str) -> None:
    model = adapted(form)
    assert isinstance(model.base_model, Lite3RTuner)
    kinds = tuple(any(kind in name for name in trainable(model)) for kind in ("proj_lin", "lora_A", "lora_B"))
    assert kinds == (form != "LoRA alone", form != "branches", form != "branches")
    assert describe(model).lora_layers == (0 if form == "branches" else 8)
    model(images()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("make", [Attention, Separate])
def test_lora_goes_around_projections(make: Any) -> None:
    expected = Toy(make=make).eval()
    names = add_lora(apply_lite3r(expected, **SPARSE), rank=4)
    model = adapted(toy=Toy(make=make))
    found = [name for name, module in model.base_model.model.named_modules() if isinstance(module, lora.LoraLayer)]
    assert found == names


def test_a_name_that_ends_alike_is_not_taken(adapter: Adapter) -> None:
    """PEFT takes names for the ends of names."""
    toy = Toy().eval()
    toy.other = nn.ModuleDict(dict(frame=nn.ModuleList([Attention(32, 2)])))
    adapter.answer = lambda model: sites(model) if isinstance(model, Toy) else None
    model = adapted(toy=toy)
    assert type(toy.other["frame"][0].qkv) is nn.Linear
    assert isinstance(model.base_model.model.frame[0].qkv, lora.LoraLayer)


def test_scopes_and_targets_of_ones_own() -> None:
    assert describe(adapted(lora_scopes=("global",))).lora_layers == 4
    assert describe(adapted(target_modules=["qkv"])).lora_layers == 4
    model = adapted(target_modules="all-linear")
    assert {type(site.proj_lin.original_module) for site in lite3r_modules(model).values()} == {BranchLinear}


def test_on_a_model_that_carries_lite3r() -> None:
    model = apply_lite3r(Toy().eval(), **SPARSE)
    nn.init.normal_(model.cross[0].proj_lin.weight)  # as calibrated
    expected = model(images())
    with pytest.raises(ConfigError, match=r"carries Lite3R with keep_ratio=0\.3, dense_below=0, .*Lite3RPeftConfig\.of\(model"):
        get_peft_model(model, Lite3RPeftConfig())
    assert not any(isinstance(module, lora.LoraLayer) for module in model.modules())
    own: Any = get_peft_model(model, Lite3RPeftConfig.of(model, r=4))
    assert torch.equal(own(images()), expected)


def test_modules_to_save() -> None:
    toy = Toy().eval()
    dense = toy(images())
    model: Any = get_peft_model(toy, config(modules_to_save=["head"]))
    assert {"base_model.model.head.modules_to_save.default.weight"} <= trainable(model)
    nn.init.zeros_(model.base_model.model.head.modules_to_save["default"].weight)
    assert not torch.equal(model(images()), dense)
    with model.disable_adapter():
        assert torch.equal(model(images()), dense)


def test_injection_without_a_peft_model() -> None:
    toy = Toy().eval()
    expected = adapted(toy=copy.deepcopy(toy))
    model: Any = peft.inject_adapter_in_model(config(), toy)
    model.load_state_dict({name.removeprefix("base_model.model."): value for name, value in expected.state_dict().items()})
    assert torch.equal(model(images()), expected(images()))


@precisions
def test_lora_rounds_with_the_weight(precision: Any) -> None:
    model = adapted(precision=precision)
    kinds = {type(module) for module in model.modules() if isinstance(module, lora.LoraLayer)}
    assert kinds == ({QatLora} if precision == "fp8_qat" else {lora.Linear})


def test_half_precision_hosts_train_in_fp32() -> None:
    model = learned(get_peft_model(Toy().eval().to(torch.bfloat16), config()))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    out = model(images(dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# Switching.


@forms
@precisions
def test_without_adapters_it_is_the_dense_model(form: str, precision: Any) -> None:
    toy = Toy().eval()
    dense = toy(images())
    model = adapted(form, toy, precision=precision)
    student = model(images())
    assert not torch.equal(student, dense)
    for context in (model.disable_adapter(), lite3r_disabled(model)):
        with context, lora_disabled(model):
            assert torch.equal(model(images()), dense)
    with model.disable_adapter():
        assert torch.equal(model(images()), dense)
    assert torch.equal(model(images()), student)


def test_switching_off_leaves_what_trains() -> None:
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    before = trainable(model)
    with model.disable_adapter():
        pass
    assert trainable(model) == before


def test_inside_of_the_disabled_context_it_stays_off() -> None:
    model = adapted("branches")
    with lite3r_disabled(model):
        with model.disable_adapter():
            dense = model(images())
        assert torch.equal(model(images()), dense)
    assert not torch.equal(model(images()), dense)


@forms
@pytest.mark.filterwarnings("ignore:Adapter one was active which is now deleted")
def test_several_adapters(form: str) -> None:
    model: Any = get_peft_model(Toy().eval(), config(form), adapter_name="one").eval()
    model.add_adapter("two", config(form))
    learned(learned(model, "one", 1), "two", 2)
    outs = {}
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        out = model(images())
        assert torch.equal(outs.setdefault(name, out), out)
        assert {parameter.split(".")[-2] for parameter in trainable(model)} == {name}
    assert not torch.allclose(outs["one"], outs["two"])
    model.delete_adapter("one")
    assert model.active_adapter == "two"
    assert torch.equal(model(images()), outs["two"])


def test_adapters_of_one_model_share_the_configuration() -> None:
    model = adapted()
    with pytest.raises(ConfigError, match=r"carries Lite3R with keep_ratio=0\.3, which all of its adapters share"):
        model.add_adapter("two", config(keep_ratio=0.5))
    with pytest.raises(ConfigError, match=r"carries Lite3R with block_choice='error'"):
        model.add_adapter("two", config(block_choice="mean"))
    assert list(model.peft_config) == ["default"]
    model.add_adapter("two", config(block_choice="error"))  # what "auto" comes to
    assert list(model.peft_config) == ["default", "two"]


# Files.


@forms
@precisions
def test_saved_and_loaded(form: str, precision: Any, tmp_path: Path) -> None:
    toy = Toy().eval()
    dense, fresh, without = copy.deepcopy(toy), copy.deepcopy(toy), toy(images())
    model = adapted(form, toy, precision=precision)
    expected = model(images())
    model.save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(dense, str(tmp_path)).eval()
    assert torch.equal(loaded(images()), expected)
    assert describe(loaded).config == describe(model).config
    assert not trainable(loaded)
    frugal: Any = PeftModel.from_pretrained(fresh, str(tmp_path), low_cpu_mem_usage=True, is_trainable=True).eval()
    assert torch.equal(frugal(images()), expected)
    assert trainable(frugal) == trainable(model)
    frugal.load_adapter(str(tmp_path), "second")
    frugal.set_adapter("second")
    assert torch.equal(frugal(images()), expected)
    with frugal.disable_adapter():
        assert torch.equal(frugal(images()), without)


def test_what_the_file_says(tmp_path: Path) -> None:
    adapted(keep_ratio={"cross.0": 0.5, "*": 0.3}, scopes=("global",)).save_pretrained(tmp_path)
    record = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (record["peft_type"], record["model_adapter"], record["version"]) == ("LITE3R", "toy", 1)
    assert record["keep_ratio"] == [["cross.0", 0.5], ["*", 0.3]]  # in this order
    loaded: Any = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, Lite3RPeftConfig)
    assert loaded.lite3r() == Lite3RConfig(**{**SPARSE, "keep_ratio": {"cross.0": 0.5, "*": 0.3}, "scopes": ("global",)})


def test_from_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy().eval()
    dense = copy.deepcopy(toy)
    model = adapted(toy=toy)
    folder = tmp_path / "models--me--toy"
    model.save_pretrained(folder / "snapshots" / ("0" * 40))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    loaded: Any = PeftModel.from_pretrained(dense, "me/toy", cache_dir=str(tmp_path)).eval()
    assert torch.equal(loaded(images()), model(images()))


def edited(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    edited(tmp_path, version=2)
    with pytest.raises(ConfigError, match="version 2 is not 1"):
        PeftModel.from_pretrained(Toy(), str(tmp_path))
    edited(tmp_path, version=1, model_adapter="vggt")
    toy = Toy()
    with pytest.raises(CheckpointError, match="adapter 'vggt' knows, but this Toy is known to 'toy'"):
        PeftModel.from_pretrained(toy, str(tmp_path))
    assert not lite3r_modules(toy)


# Merging, and what comes after.


@forms
@precisions
def test_merging(form: str, precision: Any, tmp_path: Path) -> None:
    toy = Toy().eval()
    dense = copy.deepcopy(toy)
    model = adapted(form, toy, precision=precision)
    expected = model(images())
    merged: Any = model.merge_and_unload()
    assert merged is toy
    assert not any(isinstance(module, lora.LoraLayer) for module in merged.modules())
    assert all(type(site.proj_lin) is BranchLinear for site in lite3r_modules(merged).values() if form != "LoRA alone")
    if precision == "fp8_qat":
        assert torch.equal(merged(images()), expected)
    else:
        torch.testing.assert_close(merged(images()), expected, rtol=1e-5, atol=1e-6)
    if form != "branches":  # whose weights are those of the host
        with pytest.raises(CheckpointError, match="weights of the model itself were trained, or had LoRA merged"):
            save_lite3r(merged, tmp_path)
    save_lite3r(merged, tmp_path, whole=form != "branches")
    assert torch.equal(load_lite3r(dense, tmp_path)(images()), merged(images()))


def test_merging_in_two_steps_is_remembered(tmp_path: Path) -> None:
    toy = Toy().eval()
    dense, model = copy.deepcopy(toy), adapted(toy=toy)
    model.merge_adapter()
    bare = model.unload()
    with pytest.raises(CheckpointError, match="weights of the model itself were trained, or had LoRA merged"):
        save_lite3r(bare, tmp_path)
    save_lite3r(bare, tmp_path, whole=True)
    assert torch.equal(load_lite3r(dense, tmp_path)(images()), bare(images()))
    save_lite3r(adapted().unload(), tmp_path)  # whose weights are those of the host


@pytest.mark.parametrize("merged", [True, False])
def test_lora_of_peft_that_distill_trained_is_remembered_once_it_is_merged(merged: bool, tmp_path: Path) -> None:
    model: Any = get_peft_model(Toy().eval(), peft.LoraConfig(r=2, target_modules=["qkv"]))
    apply_lite3r(model, **SPARSE)
    distill(model, [images()], trainable="proj+lora", steps=2, learning_rate=1e-2)
    save_lite3r(model, tmp_path)  # PEFT saves the LoRA
    bare = model.merge_and_unload() if merged else model.unload()
    if merged:
        with pytest.raises(CheckpointError, match="weights of the model itself were trained, or had LoRA merged"):
            save_lite3r(bare, tmp_path)
    save_lite3r(bare, tmp_path, whole=merged)


@precisions
def test_unloading_and_removing_gives_the_dense_model(precision: Any) -> None:
    toy = Toy().eval()
    keys, dense = list(toy.state_dict()), toy(images())
    model = adapted(toy=toy, precision=precision)
    with pytest.raises(WeightsError, match="is held by an adapter"):
        remove_lite3r(model)
    assert remove_lite3r(model.unload()) is toy
    assert list(toy.state_dict()) == keys
    assert torch.equal(toy(images()), dense)


@precisions
def test_converting_wants_it_merged(precision: Any) -> None:
    model = adapted(precision=precision)
    with pytest.raises(WeightsError, match=r"merge_and_unload\(\)"):
        convert(model)
    with torch.no_grad():
        expected = model(images())
        out = convert(model.merge_and_unload())(images())
    assert (out - expected).norm() < (0.01 if precision == "fp8_qat" else 0.1) * expected.norm()


def test_branches_can_be_switched_over_fp8_weights() -> None:
    """Without LoRA and without training for FP8 nothing of the adapter goes into the weights."""
    model = adapted("branches")
    with torch.no_grad():
        before = model(images())
        convert(model)
        assert (model(images()) - before).norm() < 0.1 * before.norm()


def test_copies() -> None:
    model = adapted()
    expected = model(images())
    other = copy.deepcopy(model)
    learned(other, seed=1)
    assert torch.equal(model(images()), expected)
    assert not torch.allclose(other(images()), expected)
    with other.disable_adapter():
        assert torch.equal(model(images()), expected)


def test_calibration_fits_the_active_adapter() -> None:
    model: Any = get_peft_model(Toy().eval(), config("branches")).eval()
    model.add_adapter("two", config("branches"))
    model.set_adapter("two")
    site = lite3r_modules(model)["base_model.model.cross.0"]
    with torch.no_grad():
        for copied in site.proj_lin.modules_to_save.values():
            copied.weight.fill_(0.5)
    calibrate(model, [images(), images(height=24)])
    copies = site.proj_lin.modules_to_save
    assert (copies["default"].weight == 0.5).all()
    assert not (copies["two"].weight == 0.5).any()
    assert (site.proj_lin.original_module.weight == 0).all()


# What is refused, and that nothing is left then.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(keep_ratio=2.0), "keep_ratio"),
        (dict(keep_ratio=[1, 2]), "keep_ratio is a number or ratios by patterns"),
        (dict(precision="fp8"), r'"full" or "fp8_qat".*convert\(model\)'),
        (dict(fp8_filter=lambda module, name: True), "fp8_filter of an adapter"),
        (dict(lora_scopes="global"), "lora_scopes is a tuple"),
        (dict(lora_scopes=("globe",)), "lora_scopes"),
        (dict(bias="all"), "bias='all'"),
        (dict(version=0), "version 0 is not 1"),
        (dict(linear_branch="none", lora_scopes=()), "nothing that the adapter could hold"),
    ],
)
def test_wrong_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Lite3RPeftConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (dict(target_modules=["nothing"]), ValueError, "target"),
        (dict(precision="fp8_qat", lora_dropout=0.1), ConfigError, "rounded as one weight"),
        (dict(keep_ratio={"nothing": 0.5}), ConfigError, "match no site"),
    ],
)
def test_a_failure_leaves_the_model_as_it_was(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    toy = Toy().eval()
    modules, dense = dict(toy.named_modules()), toy(images())
    with pytest.raises(error, match=message):
        get_peft_model(toy, config(**fields))
    assert dict(toy.named_modules()) == modules
    assert torch.equal(toy(images()), dense)
    assert all(parameter.requires_grad for parameter in toy.parameters())
    adapted(toy=toy)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_models_that_take_no_adapter() -> None:
    with pytest.raises(UnknownModelError):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), config())
    with pytest.raises(ConvertedError, match=r"before convert\(model\)"):
        get_peft_model(apply_lite3r(Toy(), **SPARSE, precision="fp8"), config())
    model = apply_lite3r(Toy(), **SPARSE)
    add_lora(model, rank=4)
    with pytest.raises(AlreadyAppliedError, match=r"merge_lora\(model\)"):
        get_peft_model(model, config())


@pytest.mark.parametrize("keep_ratio", ["auto", 0.5])
def test_ratios_that_are_chosen_are_in_its_files(keep_ratio: Any, tmp_path: Path) -> None:
    """And further adapters share them."""
    toy = Toy()
    model = adapted(toy=copy.deepcopy(toy), keep_ratio=keep_ratio)
    given = [images() * (1 + i) for i in range(2)]
    with pytest.raises(ConfigError, match="nothing can be left out"):
        choose_keep_ratios(model, given, max_rel_error=1e-9, progress=False)
    assert model.peft_config["default"].lite3r().keep_ratio == keep_ratio
    profile = choose_keep_ratios(model, given, mean_keep_ratio=0.4, progress=False)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(toy), str(tmp_path)).eval()
    assert describe(loaded).config.keep_ratio == profile
    torch.testing.assert_close(loaded(images()), model(images()))
    model.add_adapter("second", Lite3RPeftConfig.of(model, r=4))
