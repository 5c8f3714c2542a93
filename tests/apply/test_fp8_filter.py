"""`fp8_filter`: which Linears FP8 takes, in training, converted, and out of a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from checkpoints import edit
from interruptions import Full, full_after
from torch import Tensor, nn
from toys import Adapter, Attention, Separate, Toy, images, sites, toy_adapter

from lite3r_plugin import Lite3RConfig, SeparateQKV, apply_lite3r, convert, describe, load_lite3r, remove_lite3r, save_lite3r
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.errors import CheckpointError, ConfigError, NoSitesError, WeightsError
from lite3r_plugin.fp8.blocks import inner_blocks
from lite3r_plugin.fp8.linear import Fp8Linear
from lite3r_plugin.fp8.qat import FakeQuantLinear
from lite3r_plugin.peft import Lite3RPeftConfig, add_lora, merge_lora

__all__ = ["toy_adapter"]  # the fixture
pytestmark = pytest.mark.usefixtures("adapter")
SPARSE: dict[str, Any] = dict(keep_ratio=0.3, dense_below=0, block_q=16, block_k=16)
LEFT = "4 Linears left as they are: not taken by fp8_filter"


def names_of(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


def only_qkv(module: nn.Module, fqn: str) -> bool:
    return fqn.endswith("qkv") and isinstance(module, nn.Linear)


QKV = ["frame.0.qkv", "frame.1.qkv", "cross.0.qkv", "cross.1.qkv"]
FILTERS = pytest.mark.parametrize(
    "fp8_filter", [("*.qkv",), ("frame.*.qkv", "cross.0.qkv", "cross.1.qkv"), only_qkv], ids=["pattern", "names", "function"]
)


@FILTERS
def test_converted_at_once(fp8_filter: Any) -> None:
    model = apply_lite3r(Toy().eval(), **SPARSE, precision="fp8", fp8_filter=fp8_filter)
    assert names_of(model, Fp8Linear) == QKV
    assert describe(model).linears == {"in FP8 (emulated)": 4, "in full precision": 4}
    assert LEFT in describe(model).notes
    assert LEFT in str(describe(model))
    assert model(images()).isfinite().all()


@FILTERS
def test_trained_and_then_converted(fp8_filter: Any) -> None:
    model = apply_lite3r(Toy().eval(), **SPARSE, precision="fp8_qat", fp8_filter=fp8_filter)
    assert names_of(model, FakeQuantLinear) == QKV
    assert describe(model).linears == {"rounded to FP8 in training": 4, "in full precision": 4}
    assert LEFT in describe(model).notes
    convert(model)
    assert names_of(model, Fp8Linear) == QKV
    assert describe(model).notes == (LEFT,)
    assert describe(convert(model)).notes == (LEFT,)


@FILTERS
def test_converted_later(fp8_filter: Any) -> None:
    model = apply_lite3r(Toy().eval(), **SPARSE, fp8_filter=fp8_filter)
    assert describe(model).notes == ()
    assert names_of(convert(model), Fp8Linear) == QKV


@pytest.mark.parametrize("precision", ["fp8", "fp8_qat"])
def test_out_of_a_checkpoint(precision: Any, tmp_path: Path) -> None:
    dense = Toy().eval()
    model = Toy().eval()
    model.load_state_dict(dense.state_dict())
    save_lite3r(apply_lite3r(model, **SPARSE, precision=precision, fp8_filter=only_qkv), tmp_path)
    loaded = load_lite3r(dense, tmp_path)
    assert names_of(loaded, Fp8Linear if precision == "fp8" else FakeQuantLinear) == QKV
    assert describe(loaded).config == describe(model).config
    assert describe(loaded).notes == describe(model).notes == (LEFT,)
    assert torch.equal(loaded(images()), model(images()))


def test_what_a_function_chose_is_data() -> None:
    model = apply_lite3r(Toy(), fp8_filter=only_qkv)
    assert describe(model).config.fp8_filter == tuple(QKV)
    assert json.loads(json.dumps(describe(model).config.to_dict()))["fp8_filter"] == QKV


def test_a_function_sees_each_linear_of_the_blocks_with_its_name() -> None:
    seen: dict[str, nn.Module] = {}
    model = Toy()
    apply_lite3r(model, fp8_filter=lambda module, fqn: bool(seen.setdefault(fqn, module)))
    assert seen == {name: model.get_submodule(name) for name in (*QKV, *(name.replace("qkv", "proj") for name in QKV))}


def test_patterns_that_match_nothing_are_named_and_the_model_is_unchanged() -> None:
    model = Toy()
    keys = list(model.state_dict())
    message = (
        r"fp8_filter names \['\*\.mlp\.\*'\], which match no Linear in the transformer blocks of this Toy; those are like 'frame\.0\.qkv'"
    )
    with pytest.raises(ConfigError, match=message):
        apply_lite3r(model, fp8_filter=("*.qkv", "*.mlp.*"))
    assert list(model.state_dict()) == keys
    with pytest.raises(ConfigError, match="'head'"):
        apply_lite3r(model, fp8_filter=("head",))  # a Linear outside of the blocks


INNER = [f"{name}.{i}.qkv" for name in ("frame", "cross") for i in (1, 2, 3)]


@pytest.mark.parametrize("precision", ["fp8", "fp8_qat"])
def test_inner_leaves_the_blocks_at_both_ends_of_each_list_and_output_projections(precision: Any, tmp_path: Path) -> None:
    def toy() -> Toy:
        torch.manual_seed(0)
        return Toy(depth=5).eval()

    kind = Fp8Linear if precision == "fp8" else FakeQuantLinear
    model = apply_lite3r(toy(), **SPARSE, precision=precision)
    assert names_of(model, kind) == INNER
    report = describe(model)
    assert report.config.fp8_filter == "inner"
    assert f"{20 - len(INNER)} Linears left as they are: not taken by fp8_filter" in report.notes
    save_lite3r(model, tmp_path)
    assert names_of(load_lite3r(toy(), tmp_path), kind) == INNER


class ProjectionFirst(Attention):
    """Its output projection is registered before its input projection."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.qkv = self._modules.pop("qkv")


def test_output_projections_are_found() -> None:
    """Where the adapter says, and else at the end of the attention, also in an adapter of PEFT that was there before."""

    def taken(make: Any, wrap: Any = lambda model: model) -> list[str]:
        model = apply_lite3r(wrap(Toy(depth=4, make=make).eval()), **SPARSE, precision="fp8_qat")
        return [name.partition("cross.1.")[2] for name in names_of(model, FakeQuantLinear) if "cross.1." in name and "lin" not in name]

    assert list(dict(ProjectionFirst(4, 1).named_children())) == ["attn_drop", "proj", "qkv"]
    for make in (Attention, ProjectionFirst, lambda dim, heads: Attention(dim, heads, "dropout")):
        assert taken(make) == ["qkv"]
    assert taken(Separate) == ["q_proj", "k_proj", "v_proj"]
    lora = peft.LoraConfig(target_modules=["qkv", "proj"], r=2)
    assert taken(Attention, lambda model: peft.get_peft_model(model, lora)) == ["qkv.base_layer"]


class Mixed(Separate):
    """Does more than what is said of it, so that its own forward runs."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads)
        self.mix, self.last = self._modules.pop("out_proj"), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.last(self.mix(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


def test_a_projection_that_an_adapter_names_is_left_where_the_trial_failed(adapter: Adapter) -> None:
    adapter.answer = lambda model: [dataclasses.replace(site, projections=SeparateQKV(2, out="mix")) for site in sites(model)]
    model = apply_lite3r(Toy(depth=4, make=Mixed).eval(), **SPARSE, precision="fp8_qat")
    assert list(next(iter(lite3r_modules(model).values())).state.routed) == ["cross.0", "cross.1", "cross.2", "cross.3"]
    taken = [name.removeprefix("cross.1.") for name in names_of(model, FakeQuantLinear) if name.startswith("cross.1.")]
    assert taken == ["q_proj", "k_proj", "v_proj", "last"]


def test_which_projections_are_left_does_not_change_with_what_is_put_around_them(tmp_path: Path) -> None:
    """Also where it is not the last Linear, and where a trial of projections failed."""
    for options in ({}, {"fuse": False}):
        model = apply_lite3r(Toy(depth=4, make=ProjectionFirst).eval(), **SPARSE, precision="fp8_qat", **options)
        for block in (*model.frame, *model.cross):
            block.proj = torch.compile(block.proj, backend="eager")
        trained = names_of(model, FakeQuantLinear)
        assert trained == [f"{name}.{i}.qkv" for name in ("frame", "cross") for i in (1, 2)]
        assert names_of(convert(model), Fp8Linear) == trained
        save_lite3r(model, tmp_path / str(len(options)))
        assert names_of(load_lite3r(Toy(depth=4, make=ProjectionFirst).eval(), tmp_path / str(len(options))), Fp8Linear) == trained


def test_inner_takes_short_lists_and_single_blocks_whole() -> None:
    model = apply_lite3r(Toy(), **SPARSE, precision="fp8")
    assert describe(model).linears == {"in FP8 (emulated)": 8}
    few, many = [f"a.{i}" for i in range(3)], [f"b.c.{i}.block" for i in range(11)]
    assert inner_blocks([*few, "single", *many[::-1]]) == dict.fromkeys([*few, "single"], False) | dict.fromkeys(many[1:-1], True)
    with pytest.raises(ConfigError, match="depends on the blocks of a model"):
        Lite3RConfig(fp8_filter="inner").takes_fp8(nn.Linear(1, 1), "a.0")


def test_an_adapter_of_peft_rounds_the_same_linears() -> None:
    model = peft.get_peft_model(Toy(depth=5).eval(), Lite3RPeftConfig(**SPARSE, precision="fp8_qat"))
    rounded = [name for name in names_of(model, FakeQuantLinear) if "lora" not in name and "proj_lin" not in name]
    assert [name.removeprefix("base_model.model.").removesuffix(".base_layer") for name in rounded] == INNER
    assert Lite3RPeftConfig.of(model).fp8_filter == "inner"


def test_half_a_conversion_counts_the_linears_that_the_filter_takes() -> None:
    model = apply_lite3r(Toy(depth=5).eval(), **SPARSE)
    with full_after(4), pytest.raises(Full):
        convert(model)
    assert f"the conversion to FP8 did not finish, 4 of {len(INNER)} Linears are in FP8; convert(model) goes on" in describe(model).notes
    assert names_of(convert(model), Fp8Linear) == INNER


def test_lora_in_linears_that_stay_in_full_precision_is_saved_whole(tmp_path: Path) -> None:
    def merged(fp8_filter: Any) -> Toy:
        torch.manual_seed(0)
        model = apply_lite3r(Toy(depth=5).eval(), **SPARSE, precision="fp8_qat", fp8_filter=fp8_filter)
        add_lora(model, rank=2)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
        return convert(merge_lora(model))

    model = merged("inner")
    with pytest.raises(CheckpointError, match=r"whole=True\). Of merged LoRA alone .* the Linears that fp8_filter takes"):
        save_lite3r(model, tmp_path)
    save_lite3r(model, tmp_path, whole=True)
    assert torch.equal(load_lite3r(Toy(depth=5).eval(), tmp_path)(images()), model(images()))
    save_lite3r(merged(("*",)), tmp_path / "all")


def test_training_for_fp8_that_would_round_nothing() -> None:
    """As where another tool has quantised all but the first and the last blocks."""

    class Other(nn.modules.linear.NonDynamicallyQuantizableLinear):
        pass

    model = Toy(depth=4)
    for block in (*model.frame[1:-1], *model.cross[1:-1]):
        for name in ("qkv", "proj"):
            linear = getattr(block, name)
            setattr(block, name, Other(linear.in_features, linear.out_features))
    for precision in ("fp8", "fp8_qat"):
        with pytest.raises(NoSitesError, match=r"fp8_filter takes none of the 8 Linears .* of this Toy: let it take .*, or all of them"):
            apply_lite3r(model, **SPARSE, precision=precision)
        assert not lite3r_modules(model)
    assert describe(apply_lite3r(model, **SPARSE)).linears == {"in full precision": 8}


@pytest.mark.parametrize("precision", ["full", "fp8", "fp8_qat"])
@pytest.mark.parametrize("fp8_filter", [(), lambda module, fqn: False], ids=["no patterns", "function"])
def test_a_filter_that_takes_nothing(precision: Any, fp8_filter: Any) -> None:
    model = Toy()
    with pytest.raises(NoSitesError, match=r"takes none of the 8 Linears .* of this Toy: let it take names like 'frame\.0\.qkv', or all"):
        apply_lite3r(model, precision=precision, fp8_filter=fp8_filter)
    assert not lite3r_modules(model)


def test_a_model_without_linears_needs_no_filter(adapter: Adapter) -> None:
    class Other(nn.modules.linear.NonDynamicallyQuantizableLinear):
        pass

    model = Toy()
    for block in (*model.frame, *model.cross):
        for name in ("qkv", "proj"):
            linear = getattr(block, name)
            setattr(block, name, Other(linear.in_features, linear.out_features))
    apply_lite3r(model, fp8_filter=only_qkv)
    assert describe(model).config.fp8_filter == ()
    with pytest.raises(NoSitesError, match=r"no transformer block of this Toy has a torch\.nn\.Linear to convert"):
        convert(model)


def test_one_name_of_several_is_enough() -> None:
    def shared() -> Toy:
        toy = Toy().eval()
        toy.cross[1] = toy.cross[0]
        return toy

    model = apply_lite3r(shared(), **SPARSE, precision="fp8", fp8_filter=("cross.1.qkv",))
    assert model.cross[0].qkv is model.cross[1].qkv
    assert names_of(model, Fp8Linear) == ["cross.0.qkv"]
    assert names_of(convert(apply_lite3r(shared(), **SPARSE, fp8_filter=("cross.0.proj",))), Fp8Linear) == ["cross.0.proj"]


def test_names_are_those_of_the_model_that_was_given() -> None:
    """Also when the model is inside another one, or adapters are around its Linears, at the time of conversion."""
    model = nn.Sequential(apply_lite3r(Toy().eval(), **SPARSE, fp8_filter=only_qkv))
    assert names_of(convert(model), Fp8Linear) == [f"0.{name}" for name in QKV]
    model = apply_lite3r(Toy().eval(), **SPARSE, fp8_filter=("frame.0.proj",))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["proj"]))  # pyright: ignore[reportArgumentType]
    with pytest.raises(WeightsError, match=r"frame\.0\.proj is inside of an adapter"):
        convert(adapted)
    assert describe(adapted).linears == {"in full precision": 8}  # nothing of the adapters among them


def test_a_checkpoint_with_other_linears_than_its_filter_takes(tmp_path: Path) -> None:
    save_lite3r(apply_lite3r(Toy(), **SPARSE, precision="fp8", fp8_filter=only_qkv), tmp_path)
    edit(tmp_path, record=lambda r: r["config"].update(fp8_filter=["*.proj"]))
    dense = Toy()
    with pytest.raises(CheckpointError, match=r"for 'frame\.0\.qkv', but this model has no such Linear in its transformer blocks"):
        load_lite3r(dense, tmp_path)
    assert not lite3r_modules(dense)
    edit(tmp_path, record=lambda r: r["config"].update(fp8_filter=["*.mlp"]))
    with pytest.raises(CheckpointError, match=r"does not fit this Toy: fp8_filter names \['\*\.mlp'\]"):
        load_lite3r(dense, tmp_path)


def test_the_dense_model_comes_back() -> None:
    model = Toy().eval()
    dense = model(images())
    remove_lite3r(apply_lite3r(model, **SPARSE, precision="fp8_qat", fp8_filter=only_qkv))
    assert torch.equal(model(images()), dense)
    assert not names_of(model, FakeQuantLinear)
