"""Quantisation-aware training: what the Linears compute, what they remember, and that it trains."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from toys import Toy, images, toy_adapter

from lite3r_plugin import apply_lite3r, describe, lite3r_disabled, remove_lite3r
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.fp8 import qat
from lite3r_plugin.fp8.qat import FakeQuantLinear
from lite3r_plugin.ops.dispatch import SlowPathWarning
from lite3r_plugin.ops.fp8 import fake_quantize, quantize
from lite3r_plugin.wrapper import Changes

__all__ = ["toy_adapter"]  # the fixture
QAT = dict(precision="fp8_qat", keep_ratio=0.3, dense_below=0, block_q=16, block_k=16)


@pytest.fixture
def linear() -> nn.Linear:
    return nn.Linear(24, 10)


def rounding(linear: nn.Linear) -> FakeQuantLinear:
    """What takes the place of `linear`, put in."""
    module = FakeQuantLinear(linear)
    module.join(Changes())
    return module


@pytest.fixture
def quantisations(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights that are quantised, in order."""
    seen: list[Tensor] = []

    def counted(x: Tensor, *args: object):
        seen.append(x)
        return quantize(x)

    monkeypatch.setattr(qat, "quantize", counted)
    return seen


@pytest.mark.parametrize("frozen", [True, False])
def test_forward_and_gradients(linear: nn.Linear, frozen: bool) -> None:
    linear.weight.requires_grad_(not frozen)
    x = torch.randn(2, 5, 24, requires_grad=True)
    y = rounding(linear)(x)
    rounded_x, rounded_w = fake_quantize(x.detach()), fake_quantize(linear.weight.detach())
    assert torch.equal(y, F.linear(rounded_x, rounded_w, linear.bias))
    assert not torch.equal(y, linear(x))
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.testing.assert_close(x.grad, grad @ rounded_w)
    if frozen:
        assert linear.weight.grad is None
    else:
        torch.testing.assert_close(linear.weight.grad, grad.flatten(0, 1).T @ rounded_x.flatten(0, 1))


def test_a_frozen_weight_is_quantised_once_until_it_changes(linear: nn.Linear, quantisations: list[Tensor]) -> None:
    linear.requires_grad_(False)
    fake, x = rounding(linear), torch.randn(3, 24)
    before = [fake(x) for _ in range(3)]
    assert len(quantisations) == 1
    assert torch.equal(before[0], before[2])
    linear.weight.mul_(-1)
    assert not torch.equal(fake(x), before[0])
    fake.load_state_dict(nn.Linear(24, 10).state_dict())
    fake(x)
    fake.double()(x.double())
    assert len(quantisations) == 4


def test_copies_remember_nothing(linear: nn.Linear, quantisations: list[Tensor]) -> None:
    fake, x = rounding(linear.requires_grad_(False)), torch.randn(3, 24)
    expected = fake(x)
    for other in (copy.deepcopy(fake), pickle.loads(pickle.dumps(fake))):
        quantisations.clear()
        assert torch.equal(other(x), expected)
        assert len(quantisations) == 1
        with torch.no_grad():
            other.weight.zero_()
        assert torch.equal(other(x), other.bias.expand(3, -1))
    assert torch.equal(fake(x), expected)


def test_autocast(linear: nn.Linear) -> None:
    fake, x = rounding(linear.requires_grad_(False)), torch.randn(3, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = fake(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), fake(x), rtol=0.02, atol=0.02)


def test_infinities_are_counted(linear: nn.Linear) -> None:
    fake = rounding(linear)
    x = torch.randn(3, 24)
    x[0, 1] = torch.inf
    assert fake(x).isfinite().all()
    assert fake.infinities.item() == 1
    assert "infinities" not in fake.state_dict()


def test_release(linear: nn.Linear) -> None:
    before, added = dict(linear.named_buffers()), set(linear._non_persistent_buffers_set)
    fake = FakeQuantLinear(linear)
    assert dict(linear.named_buffers()) == before  # until it is put in
    fake.join(Changes())
    assert linear.infinities is fake.infinities
    assert isinstance(fake, nn.Linear)  # so that PEFT knows what it is
    assert fake.weight is linear.weight
    assert (fake.in_features, fake.out_features) == (24, 10)
    assert fake.release() is linear
    fake.leave(Changes())
    assert (dict(linear.named_buffers()), linear._non_persistent_buffers_set) == (before, added)


@pytest.mark.usefixtures("adapter")
class TestModel:
    def test_dense_bit_for_bit(self) -> None:
        model = Toy().eval()
        keys, dense = list(model.state_dict()), model(images())
        apply_lite3r(model, **QAT)
        student = model(images())
        assert not torch.equal(student, dense)
        assert [key for key in model.state_dict() if "proj_lin" not in key] == keys
        with lite3r_disabled(model):
            assert torch.equal(model(images()), dense)
        assert torch.equal(model(images()), student)
        remove_lite3r(model)
        assert torch.equal(model(images()), dense)
        assert list(model.state_dict()) == keys
        assert not any(isinstance(m, FakeQuantLinear) for m in model.modules())
        assert "infinities" not in dict(model.named_buffers())

    def test_rounds_to_fp8_where_the_sites_stay_dense(self) -> None:
        model = Toy().eval()
        dense = model(images())
        apply_lite3r(model, precision="fp8_qat", keep_ratio=1.0)
        assert 1e-3 < ((model(images()) - dense).norm() / dense.norm()).item() < 0.1

    def test_the_projection_has_an_fp32_master_and_is_rounded(self) -> None:
        model = apply_lite3r(Toy().bfloat16(), **QAT)
        sites = lite3r_modules(model).values()
        assert {site.proj_lin.weight.dtype for site in sites if site.sparse} == {torch.float32}
        site = next(site for site in sites if site.sparse)
        nn.init.normal_(site.proj_lin.weight)
        x = images(dtype=torch.bfloat16)
        with torch.no_grad():
            before, learnt = model(x), site.proj_lin.weight.clone()
            site.proj_lin.weight.copy_(fake_quantize(learnt))
            assert not torch.equal(site.proj_lin.weight, learnt)
            assert torch.equal(model(x), before)
            site.proj_lin.weight.copy_(2 * learnt)
            assert not torch.equal(model(x), before)

    def test_it_trains(self) -> None:
        teacher, model = Toy().eval(), Toy().eval().requires_grad_(False)
        model.load_state_dict(teacher.state_dict())
        apply_lite3r(model, **QAT)
        model.requires_grad_(False)
        projections = [site.proj_lin.weight.requires_grad_() for site in lite3r_modules(model).values() if site.sparse]
        optimizer = torch.optim.Adam(projections, lr=3e-3)
        x = images(batch=2)
        target = teacher(x).detach()
        losses = []
        for _ in range(15):
            optimizer.zero_grad()
            losses.append(F.mse_loss(model(x), target))
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < 0.9 * losses[0]
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projections)

    def test_deep_copy_and_pickle(self) -> None:
        model = apply_lite3r(Toy().eval().requires_grad_(False), **QAT)
        expected = model(images())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(images()), expected)
            with lite3r_disabled(other):
                assert not torch.equal(other(images()), expected)
            assert torch.equal(model(images()), expected)

    @pytest.mark.slow
    def test_compiled_equals_eager(self) -> None:
        model = apply_lite3r(Toy().eval().requires_grad_(False), **QAT)
        expected = model(images())
        torch._dynamo.reset()
        model.compile(backend="aot_eager")
        torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-4)
        torch._dynamo.reset()

    @pytest.mark.slow
    def test_compiled_gradients(self) -> None:
        model = apply_lite3r(Toy().eval(), **QAT)
        model(images()).sum().backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        torch._dynamo.reset()
        model.compile(backend="aot_eager")
        model(images()).sum().backward()
        torch._dynamo.reset()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)

    def test_transformer_engine_falls_back_and_says_why(self) -> None:
        with pytest.warns(SlowPathWarning, match="emulated FP8, not in TransformerEngine: the model is on cpu"):
            model = apply_lite3r(Toy(), **QAT, fp8_backend="te", linear_branch="all")
        assert "the model is on cpu" in str(describe(model))
        with pytest.warns(SlowPathWarning, match="which 'marginal' never makes"):
            apply_lite3r(Toy(), **QAT, fp8_backend="te", linear_branch="marginal")


@pytest.mark.parametrize("fused", [False, True])
def test_a_weight_that_learns_is_never_remembered(linear: nn.Linear, fused: bool) -> None:
    """Fused optimisers change a tensor without counting a version of it."""
    module, x = rounding(linear), torch.randn(3, 24)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=fused)
    for _ in range(2):
        with torch.no_grad():
            before = module(x)
        module(x).square().sum().backward()
        for _ in range(2):  # the second time without a forward with gradients between
            optimizer.step()
            with torch.no_grad():
                assert torch.equal(module(x), copy.deepcopy(module)(x))
                assert not torch.equal(module(x), before)


def test_what_is_written_to_the_data_of_a_frozen_weight_counts(linear: nn.Linear) -> None:
    module, x = rounding(linear.requires_grad_(False)), torch.randn(3, 24)
    before = module(x)
    module.weight.data += 1.0  # as peft merges
    assert torch.equal(module(x), copy.deepcopy(module)(x))
    assert not torch.equal(module(x), before)


def test_frozen_again_after_a_fused_optimiser(linear: nn.Linear) -> None:
    module, x = rounding(linear.requires_grad_(False)), torch.randn(3, 24)
    module(x)
    linear.requires_grad_()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    module(x).sum().backward()
    optimizer.step()
    linear.requires_grad_(False)
    assert torch.equal(module(x), copy.deepcopy(module)(x))


@pytest.mark.parametrize("make", [lambda m: prune.l1_unstructured(m, "weight", 0.5), torch.nn.utils.parametrizations.weight_norm])
def test_weights_that_are_made_from_others_train(linear: nn.Linear, make: Any) -> None:
    module = rounding(linear)
    make(module)
    module(torch.randn(3, 24)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
