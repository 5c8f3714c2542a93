"""Whatever interrupts a verb, and wherever: the model is as it was, or it says what it is, runs, and can be finished or undone.

A call is interrupted before every so many lines of the package; ``pytest --every-line`` takes each (half an hour).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import Full, contents, full_after, interrupted, lines_of, say
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from toys import Adapter, toy_adapter

from lite3r_plugin import (
    AttentionSite,
    FusedQKV,
    PreNormBlock,
    TokenSource,
    apply_lite3r,
    calibrate,
    convert,
    describe,
    lite3r_disabled,
    load_lite3r,
    remove_lite3r,
    save_lite3r,
)
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.attention.branch import write_branch
from lite3r_plugin.attention.module import SparseLinearAttention
from lite3r_plugin.errors import ConvertedError, WeightsError
from lite3r_plugin.fp8.block import Fp8Block
from lite3r_plugin.fp8.linear import Fp8Linear
from lite3r_plugin.fp8.qat import FakeQuantLinear
from lite3r_plugin.wrapper import Changes

__all__ = ["toy_adapter"]  # the fixture
SPARSE: dict[str, Any] = dict(keep_ratio=0.3, dense_below=0, block_q=16, block_k=16)
STEP = 317
Lines = Callable[..., Iterator[int]]


@pytest.fixture(autouse=True)
def _blocks(adapter: Adapter) -> None:
    """A ViT whose blocks are described, so that convert fuses them."""

    def sites(model: nn.Module) -> list[AttentionSite]:
        tokens = TokenSource("patch_embed.proj", (4, 4), 1)
        blocks = [PreNormBlock(f"blocks.{i}", "mlp.fc1", "mlp.fc2") for i in range(2)]
        return [AttentionSite(f"{block.fqn}.attn", "global", 32, FusedQKV(1), tokens, block) for block in blocks]

    adapter.answer = sites


@pytest.fixture
def lines(request: pytest.FixtureRequest, x: Tensor) -> Lines:
    """The lines before which to interrupt a call."""
    model = applied()  # what is found once a process, such as the adapters and what pays
    calibrate(model, [x, 1 - x])
    convert(model)

    def chosen(call: Callable[[], object], step: int = STEP) -> Iterator[int]:
        return iter(range(1, lines_of(call) + 1, 1 if request.config.getoption("--every-line") else step))

    return chosen


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def vit() -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=1, num_classes=4, norm_layer=nn.LayerNorm).eval()


def applied(precision: str = "full") -> nn.Module:
    """A model with Lite3R and linear branches that learned something."""
    model = apply_lite3r(vit(), **SPARSE, precision=precision)
    for site in lite3r_modules(model).values():
        nn.init.normal_(site.proj_lin.weight, std=0.1)
    return model


def summary(model: nn.Module) -> dict[str, Any]:
    """What a converted model is."""
    found = describe(model)
    return {
        "values": {name: value for name, value in contents(model)["values"].items() if "infinities" not in name},
        "linears": found.linears,
        "config": found.config,
        "phase": found.phase,
        "notes": found.notes,
        "fused": sum(isinstance(module, Fp8Block) for module in model.modules()),
        "keys": list(model.state_dict()),
        "learns": {name: p.requires_grad for name, p in model.named_parameters()},
    }


def outcome(model: nn.Module, dense: dict[str, Any], x: Tensor, converted: dict[str, Any] | None = None) -> str:
    """What became of `model`; fails where it is not usable, or not what it says. It is dense or wholly converted in the end.

    Args:
        model: The model, after an interruption.
        dense: The contents of the dense one.
        x: An input.
        converted: The `summary` of the model when it is converted.
    """
    if not lite3r_modules(model):
        assert contents(model) == dense
        return "dense"
    assert str(describe(model))
    assert model(x).isfinite().all()
    if not any(isinstance(module, Fp8Linear) for module in model.modules()):
        assert describe(model).phase != "fp8"
        remove_lite3r(model)
        assert contents(model) == dense
        return "with Lite3R"
    done = describe(model)
    assert done.phase == "fp8"
    with pytest.raises(ConvertedError, match="remove_lite3r needs the weights"):
        remove_lite3r(model)
    with pytest.raises(ConvertedError, match="lite3r_disabled needs the weights"), lite3r_disabled(model):
        pass
    finished = not any("did not finish" in note for note in done.notes)
    assert finished or f"{done.linears['in FP8 (emulated)']} of {sum(done.linears.values())} Linears are in FP8" in str(done)
    convert(model)
    assert summary(model) == converted
    assert model(x).isfinite().all()
    return "converted" if finished else "half converted"


@pytest.mark.parametrize("precision", ["full", "fp8_qat", pytest.param("fp8", marks=pytest.mark.slow)])
def test_apply(lines: Lines, x: Tensor, precision: str) -> None:
    def apply() -> None:
        apply_lite3r(model, **SPARSE, precision=precision)

    model = vit()
    steps = lines(apply)
    converted = summary(model) if precision == "fp8" else None
    model = vit()
    dense, seen = contents(model), Counter[str]()
    for line in steps:
        assert interrupted(apply, line)
        seen[became := outcome(model, dense, x, converted)] += 1
        if became not in ("dense", "with Lite3R"):
            model = vit()
            dense = contents(model)
    say(f"apply, {precision}", seen)
    assert seen["dense"] > 0.3 * seen.total()
    assert precision == "fp8" or set(seen) <= {"dense", "with Lite3R"}


@pytest.mark.parametrize("precision", [pytest.param("full", marks=pytest.mark.slow), "fp8_qat"])
def test_remove(lines: Lines, x: Tensor, precision: str) -> None:
    model = applied(precision)
    steps = lines(lambda: remove_lite3r(model))
    dense, seen = contents(model), Counter[str]()
    for line in steps:
        apply_lite3r(model, **SPARSE, precision=precision)
        before = contents(model)
        assert interrupted(lambda: remove_lite3r(model), line)
        if lite3r_modules(model):  # as before, but that hooks may have moved
            assert {**contents(model), "tables": None} == {**before, "tables": None}
        seen[outcome(model, dense, x)] += 1
    say(f"remove, {precision}", seen)
    assert set(seen) <= {"dense", "with Lite3R"}


@pytest.mark.parametrize(
    ("precision", "step"),
    [("fp8_qat", 3 * STEP), *(pytest.param(precision, STEP, marks=pytest.mark.slow) for precision in ("full", "fp8_qat"))],
)
def test_convert(lines: Lines, x: Tensor, precision: str, step: int) -> None:
    """Before the first Linear is in FP8 nothing has changed, the linear branches and the output included."""

    def run() -> None:
        convert(model)

    model = applied(precision)
    steps = lines(run, step)
    converted, seen = summary(model), Counter[str]()
    assert converted["fused"] == 2
    model = applied(precision)
    before, output = contents(model), model(x)
    for line in steps:
        assert interrupted(run, line)
        if contents(model) == before:
            assert torch.equal(model(x), output)
            seen["as before"] += 1
            continue
        seen[outcome(model, {}, x, converted)] += 1
        model = applied(precision)
        before = contents(model)
    say(f"convert, {precision}", seen)
    assert set(seen) <= {"as before", "half converted", "converted"}
    assert seen["half converted"] > 0.2 * seen.total()


def test_converting_again(lines: Lines, x: Tensor) -> None:
    """A converted model stays one: what is chosen again is chosen whole or not."""
    model = convert(applied())
    converted, output = summary(model), model(x)
    for line in lines(lambda: convert(model)):
        assert interrupted(lambda: convert(model), line)
        assert summary(model) == converted
        assert torch.equal(model(x), output)


@pytest.mark.parametrize("precision", ["full", "fp8_qat"])
@pytest.mark.parametrize("gap", [1, *(pytest.param(gap, marks=pytest.mark.slow) for gap in (2, 3, 5))])
def test_interrupted_again_and_again(lines: Lines, precision: str, gap: int) -> None:
    """Also while changes are undone, so that something may stay half in: remove_lite3r takes that out."""
    model = vit()
    dense = contents(model)
    steps = list(lines(lambda: apply_lite3r(model, **SPARSE, precision=precision), 5 * STEP))
    remove_lite3r(model)
    for line in steps:
        interrupted(lambda: apply_lite3r(model, **SPARSE, precision=precision), line, *range(line + gap, line + 60 * gap, gap))
        if lite3r_modules(model):
            assert str(describe(model))
            interrupted(lambda: remove_lite3r(model), line % 97 + 300, *range(line % 97 + 300, 3000, gap))
        if lite3r_modules(model):
            remove_lite3r(model)
        assert contents(model) == dense


def test_disabled(lines: Lines, x: Tensor) -> None:
    """The model is sparse again, wherever the context was interrupted."""

    def run() -> None:
        with lite3r_disabled(model):
            pass

    model = applied("fp8_qat")
    switched = [module for module in model.modules() if isinstance(module, (SparseLinearAttention, FakeQuantLinear))]
    for line in lines(run, 7):
        assert interrupted(run, line)
        assert all(module.enabled for module in switched)


@pytest.mark.parametrize("precision", ["full", pytest.param("fp8_qat", marks=pytest.mark.slow)])
def test_load(lines: Lines, x: Tensor, tmp_path: Path, precision: str) -> None:
    save_lite3r(applied(precision), tmp_path)
    model = vit()
    dense = contents(model)
    steps = lines(lambda: load_lite3r(model, tmp_path))
    remove_lite3r(model)
    for line in steps:
        assert interrupted(lambda: load_lite3r(model, tmp_path), line)
        assert outcome(model, dense, x) in ("dense", "with Lite3R")


def test_save(lines: Lines, tmp_path: Path) -> None:
    """The model is what it was, and what is saved after it is whole."""
    model = applied()
    before = contents(model)
    for line in lines(lambda: save_lite3r(model, tmp_path)):
        assert interrupted(lambda: save_lite3r(model, tmp_path), line)
        assert contents(model) == before
    save_lite3r(model, tmp_path)
    loaded = load_lite3r(vit(), tmp_path)
    assert contents(loaded)["values"] == before["values"]


def test_calibrate(lines: Lines, x: Tensor) -> None:
    """Nothing of it stays at the sites but what it found, and what it found can be taken out."""

    def run() -> None:
        calibrate(model, [x, 1 - x], judged=1)

    model = vit()
    dense = contents(model)
    apply_lite3r(model, **SPARSE)
    sites = lite3r_modules(model).values()
    run()  # the first of several takes some lines more: orders of tokens are remembered
    for line in lines(run, 30 * STEP):
        assert interrupted(run, line)
        assert not any(site._substitutes or site._observers for site in sites)
    assert contents(remove_lite3r(model)) == dense


@pytest.mark.parametrize("step", [16, pytest.param(4, marks=pytest.mark.slow)])
def test_calibrate_writes_all_sites_or_none(request: pytest.FixtureRequest, x: Tensor, step: int) -> None:
    """Interrupted from the first write on."""

    def run() -> None:
        calibrate(model, [x, 1 - x], judged=1)

    def branches() -> dict[str, bytes]:
        return {name: value for name, value in contents(model)["values"].items() if "proj_lin" in name}

    model = applied()
    for site in lite3r_modules(model).values():  # anything is better than these
        nn.init.normal_(site.proj_lin.weight, std=10.0)
    before, weights = branches(), {name: value.clone() for name, value in model.state_dict().items()}
    run()  # what is found once
    model.load_state_dict(weights)  # what was fitted already is left alone
    first = lines_of(run, before=write_branch)
    model.load_state_dict(weights)
    last = lines_of(run)
    fitted, seen = branches(), Counter[str]()
    assert all(fitted[name] != value for name, value in before.items())
    step = 1 if request.config.getoption("--every-line") else step
    for line in range(first, last + 1, step):
        model.load_state_dict(weights)
        assert interrupted(run, line)
        found = branches()
        assert found in (before, fitted)
        seen["as before" if found == before else "fitted"] += 1
    say("calibrate, while it writes", seen)
    assert seen["as before"] > len(before) * 10 / step
    assert seen["fitted"]


# Errors instead of interruptions.


def test_a_conversion_that_runs_out_of_memory_goes_on(x: Tensor) -> None:
    model = applied("fp8_qat")
    converted = summary(convert(copy.deepcopy(model)))
    with full_after(5), pytest.raises(Full):
        convert(model)
    report = describe(model)
    assert (report.phase, report.linears) == ("fp8", {"in FP8 (emulated)": 5, "rounded to FP8 in training": 3})
    assert "the conversion to FP8 did not finish, 5 of 8 Linears are in FP8; convert(model) goes on" in str(report)
    assert model(x).isfinite().all()
    assert summary(convert(model)) == converted


def test_half_a_conversion_is_not_saved(tmp_path: Path) -> None:
    model = vit()
    with full_after(0), pytest.raises(Full):
        apply_lite3r(model, **SPARSE, precision="fp8")
    assert describe(model).phase == "full"  # it says what is, not what was asked for
    with pytest.raises(WeightsError, match=r"0 of 8 Linears are in FP8; convert\(model\) goes on: finish that before save_lite3r"):
        save_lite3r(model, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
    save_lite3r(convert(model), tmp_path / "checkpoint")


@pytest.mark.parametrize("precision", ["full", "fp8_qat"])
def test_nothing_is_put_in_before_everything_is_made(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    model = vit()
    dense = contents(model)
    real, made = SparseLinearAttention.__init__, []

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        assert contents(model) == dense
        if kwargs:  # in a trial, of a copy
            return real(self, *args, **kwargs)
        if made:
            raise Full
        real(self, *args)
        made.append(self)
        return None

    monkeypatch.setattr(SparseLinearAttention, "__init__", init)
    with pytest.raises(Full):
        apply_lite3r(model, **SPARSE, precision=precision)
    assert contents(model) == dense


def test_changes_are_undone_in_turn_and_once() -> None:
    table = {"a": 1, "b": 2}
    changes = Changes()

    def change() -> None:
        with changes:
            changes.put(table, "a", 3)
            changes.put(table, "c", 4)
            changes.put(table, "a", 5)
            changes.drop(table, "b")
            changes.drop(table, "nothing")
            assert table == {"a": 5, "c": 4}
            raise Full

    with pytest.raises(Full):
        change()
    assert table == {"a": 1, "b": 2}
    with Changes() as others:
        others.put(table, "a", 3)
    assert table == {"a": 3, "b": 2}
