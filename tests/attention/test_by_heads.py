"""Attention of some heads at a time, where memory is planned: the same, with less held at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import Attention, Separate, Toy, images, toy_adapter

from lite3r_plugin import apply_lite3r
from lite3r_plugin.attention.inputs import AttentionInputs
from lite3r_plugin.attention.module import SparseLinearAttention
from lite3r_plugin.fp8.backends import BACKENDS
from lite3r_plugin.fp8.backends.emulated import Emulated
from lite3r_plugin.fp8.linear import Fp8Linear
from lite3r_plugin.ops.fp8 import quantize
from lite3r_plugin.runtime.chunks import Chunks, Places, in_chunks
from lite3r_plugin.runtime.trace import traced
from lite3r_plugin.testbed import Testbed, TestbedConfig
from lite3r_plugin.testing import TEST_CONFIG

__all__ = ["toy_adapter"]  # the fixture


def made(make: Callable[[int, int], nn.Module] = Attention, **fields: Any) -> Toy:
    torch.manual_seed(0)
    model = Toy(48, 3, make=make).eval().requires_grad_(False)
    return apply_lite3r(model, TEST_CONFIG, **{"linear_branch": "marginal", **fields})


def shapes_seen(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many heads each attention has that is sparse, from now on."""
    seen: list[int] = []
    run = SparseLinearAttention.sparse_linear

    def counted(self: SparseLinearAttention, inputs: AttentionInputs, *others: Any) -> Tensor:
        seen.append(inputs.v.shape[1])
        return run(self, inputs, *others)

    monkeypatch.setattr(SparseLinearAttention, "sparse_linear", counted)
    return seen


@pytest.mark.usefixtures("adapter")
@pytest.mark.parametrize("make", [Attention, Separate])
@pytest.mark.parametrize(("size", "parts"), [(1, [1, 1, 1]), (2, [2, 1]), (8, [3])])
def test_some_heads_at_a_time_are_the_same(
    make: Callable[[int, int], nn.Module], size: int, parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(make)
    nn.init.normal_(model.cross[0].proj_lin.weight)
    whole, calls = model(images()), model.cross[0].calls
    before = calls.sparse
    seen = shapes_seen(model, monkeypatch)
    with in_chunks(model, Places(), Chunks(attention=size)):
        torch.testing.assert_close(model(images()), whole)
    assert seen == 2 * parts
    assert model.cross[0].calls is calls
    assert calls.sparse == before + 1, "it counts as one call"
    model(images())
    assert seen[-1] == 3, "all at once again"


@pytest.mark.usefixtures("adapter")
def test_heads_are_not_taken_apart_where_somebody_is_to_see_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    whole = model(images())
    seen = shapes_seen(model, monkeypatch)
    model.cross[0].qkv.register_forward_hook(lambda module, args, out: 2 * out)
    heads: list[int] = []
    with model.cross[1].observe(lambda site, inputs, out: heads.append(out.shape[1])), in_chunks(model, Places(), Chunks(attention=1)):
        changed = model(images())
    assert heads == [3]
    assert seen == [3, 3]
    assert not torch.allclose(changed, whole), "the hook ran"


@pytest.mark.usefixtures("adapter")
def test_less_is_held_at_once() -> None:
    model, x = made(attention_backend="naive"), images(views=6)

    def held(chunks: Chunks) -> int:
        with torch.no_grad(), in_chunks(model, Places(), chunks), traced(model) as trace:
            model(x)
        return trace.peak

    assert held(Chunks(attention=1)) < 0.6 * held(Chunks())


@pytest.mark.usefixtures("adapter")
def test_whether_sparse_pays_is_asked_of_all_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    asked: list[int] = []
    monkeypatch.setattr(SparseLinearAttention, "pays", lambda self, v, *others: bool(asked.append(v.shape[1])))
    with in_chunks(model, Places(), Chunks(attention=2)):
        model(images())
    assert set(asked) == {3}


@torch.no_grad()
def test_in_fp8_heads_have_their_rows_of_the_weight() -> None:
    torch.manual_seed(0)
    model = Testbed(TestbedConfig(dim=64, head_dim=32, depth=1, stem=8)).eval().requires_grad_(False)
    fields: dict[str, Any] = {"dense_below": 0, "block_q": 16, "block_k": 16, "fp8_backend": "emulated"}
    apply_lite3r(model, precision="fp8", **fields)
    x = torch.rand(1, 3, 3, 64, 64)
    whole = model(x)
    with in_chunks(model, Places(), Chunks(attention=1)):
        for name, value in model(x).items():
            torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_part_of_an_fp8_linear_makes_some_of_its_outputs() -> None:
    torch.manual_seed(0)
    linear = Fp8Linear.quantized(nn.Linear(16, 12), "emulated")
    x = torch.randn(2, 5, 16)
    rows = [slice(8, 10), slice(1, 4)]
    expected = torch.cat([linear(x)[..., row] for row in rows], -1)
    assert torch.equal(linear.part(rows)(x), expected)
    assert torch.equal(linear.part(rows)(linear.as_input(x)), expected)
    assert torch.equal(linear.part(rows)(quantize(x)), expected)
    x[0, 0, 0] = torch.inf
    kept = linear.as_input(x)
    for row in rows:
        linear.part([row])(kept)
    assert linear.infinities.item() == 1, "counted once"


@pytest.mark.usefixtures("adapter")
def test_a_hook_for_all_modules_sees_the_linears_called() -> None:
    model, x = made(), images()

    def doubled(module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        return 2 * out if module is model.cross[0].qkv else None

    with torch.no_grad():
        plain = model(x)
        handle = nn.modules.module.register_module_forward_hook(doubled)
        try:
            expected = model(x)
            with in_chunks(model, Places(), Chunks(attention=1)):
                torch.testing.assert_close(model(x), expected)
        finally:
            handle.remove()
    assert not torch.allclose(expected, plain)


@torch.no_grad()
@pytest.mark.usefixtures("adapter")
@pytest.mark.parametrize(("make", "taken"), [(Attention, 24), (Separate, 8)])
def test_fp8_units_are_not_given_parts_that_they_do_not_take(
    make: Callable[[int, int], nn.Module], taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"linear_branch": "none", "precision": "fp8", "fp8_backend": "emulated"}
    model = apply_lite3r(Toy(48, 6, make=make).eval().requires_grad_(False), TEST_CONFIG, **fields)  # heads of 8
    seen = shapes_seen(model, monkeypatch)
    for multiple, heads in ((taken, 1), (16, 6)):
        monkeypatch.setattr(Emulated, "multiple", multiple)
        with in_chunks(model, Places(), Chunks(attention=1)):
            model(images())
        assert seen[-1] == heads
    assert not Fp8Linear.quantized(nn.Linear(48, 144), "scaled_mm").splits(24)
    assert Fp8Linear.quantized(nn.Linear(48, 144), "scaled_mm").splits(48)


@torch.no_grad()
@pytest.mark.usefixtures("adapter")
def test_linears_of_which_one_takes_no_input_in_fp8_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    class OfTensors(Emulated):
        name = "weight_only"
        takes_fp8 = False

    monkeypatch.setitem(BACKENDS, "weight_only", OfTensors)
    model = made(Separate, precision="fp8", fp8_backend="emulated")
    model.cross[0].k_proj.backend = "weight_only"
    whole = model(images())
    with in_chunks(model, Places(), Chunks(attention=1)):
        torch.testing.assert_close(model(images()), whole)
