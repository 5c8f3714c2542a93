"""Training for FP8 beside torchao's: the same numbers where both are defined, and none of its traps. Needs torchao."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lite3r_plugin.fp8 import qat
from lite3r_plugin.fp8.qat import FakeQuantLinear
from lite3r_plugin.ops.fp8 import fake_quantize, quantize
from lite3r_plugin.wrapper import Changes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the import itself
    quantization: Any = pytest.importorskip("torchao.quantization")
    torchao_qat: Any = pytest.importorskip("torchao.quantization.qat")


LOSS_SCALE = 2.0**10  # torchao cuts gradients to FP8, of which small ones do not survive


def pair(frozen: bool = False, **granularity: Any) -> tuple[FakeQuantLinear, Any]:
    """The same Linear, rounding in both libraries."""
    linear = nn.Linear(48, 32)
    other = nn.Sequential(nn.Linear(48, 32))
    other.load_state_dict({f"0.{name}": value for name, value in linear.state_dict().items()})
    base = quantization.Float8DynamicActivationFloat8WeightConfig(**(granularity or dict(granularity=quantization.PerRow())))
    quantization.quantize_(other, torchao_qat.QATConfig(base, step="prepare"))
    ours = FakeQuantLinear(linear.requires_grad_(not frozen))
    ours.join(Changes())
    theirs = other[0].requires_grad_(not frozen)
    assert type(theirs) is not nn.Linear
    return ours, theirs


def gradients(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of the input and of the weight, for a fixed gradient of the output, scaled."""
    x = x.clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    out = module(x)
    of_input, of_weight = torch.autograd.grad(out, (x, module.weight), LOSS_SCALE * torch.randn(out.shape, generator=generator))
    return of_input, of_weight


def error(found: Tensor, expected: Tensor, where: Tensor) -> float:
    return float((found - expected)[where].norm() / expected[where].norm())


def largest(x: Tensor) -> Tensor:
    """Where the largest magnitude of each row is."""
    return x.abs() == x.abs().amax(-1, keepdim=True)


def test_forward() -> None:
    ours, theirs = pair()
    x = torch.randn(64, 48)
    assert torch.equal(ours(x), theirs(x))


def test_gradients() -> None:
    """But for those through the maximum they are the same, as exactly as FP8 can have them."""
    ours, theirs = pair()
    x = torch.randn(64, 48)
    for source, own, other in zip((x, ours.weight), gradients(ours, x), gradients(theirs, x), strict=True):
        elsewhere = error(other, own, ~largest(source))
        assert elsewhere < 0.05
        assert error(other, own, largest(source)) > 2 * elsewhere


def test_no_gradient_through_the_maximum_and_none_cut_to_fp8() -> None:
    ours, _ = pair()
    x = torch.randn(64, 48)
    rounded_x, rounded_w = fake_quantize(x), fake_quantize(ours.weight.detach())
    grad = LOSS_SCALE * torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    of_input, of_weight = gradients(ours, x)
    torch.testing.assert_close(of_input, grad @ rounded_w)
    torch.testing.assert_close(of_weight, grad.T @ rounded_x)


def test_a_row_of_zeros_is_nan_in_torchao_alone() -> None:
    ours, theirs = pair()
    x = torch.randn(4, 48)
    x[1] = 0
    assert theirs(x).isnan().any(1).tolist() == [False, True, False, False]
    assert torch.equal(ours(x)[1], ours.bias)


def test_frozen_weights_are_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair(frozen=True)
    own: list[Tensor] = []
    other: list[Any] = []
    monkeypatch.setattr(qat, "quantize", lambda x, *args: own.append(x) or quantize(x, *args))
    theirs.weight_fake_quantizer.register_forward_hook(lambda *args: other.append(args))
    for _ in range(3):
        ours(torch.randn(4, 48))
        theirs(torch.randn(4, 48))
    assert (len(own), len(other)) == (1, 3)


def test_one_scale_for_a_tensor_is_the_default_of_torchao() -> None:
    ours, theirs = pair(granularity=quantization.Float8DynamicActivationFloat8WeightConfig().granularity)
    x = torch.randn(64, 48) * torch.logspace(-6, 0, 64)[:, None]
    assert not torch.equal(ours(x), theirs(x))
    exact = x @ ours.weight.T + ours.bias
    few = slice(0, 8)
    assert (theirs(x) - exact)[few].norm() > 2 * (ours(x) - exact)[few].norm()
