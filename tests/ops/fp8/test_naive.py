"""The definition of FP8 rows against a search over all 256 codes, and what comes before it against torch in FP64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_quantizes
from torch import Tensor

from lite3r_plugin.ops.fp8 import E4M3, E5M2, dequantize, fake_quantize, naive, quantize

FORMATS = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])


def nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of each entry of x (already divided by its scale) to the closest finite FP8 number."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    return (x.double()[..., None] - codes[codes.isfinite()]).abs().amin(-1)


@FORMATS
@pytest.mark.parametrize("spread", [0.0, 4.0], ids=["alike", "over many magnitudes"])
def test_rows_round_to_the_nearest_code(dtype: torch.dtype, spread: float) -> None:
    x = torch.randn(7, 45) * torch.exp(spread * torch.randn(7, 45))
    data, scale, _ = quantize(x, dtype)
    assert (data.dtype, scale.dtype, scale.shape) == (dtype, torch.float32, (7, 1))
    torch.testing.assert_close(scale[:, 0], x.abs().amax(-1) / torch.finfo(dtype).max)
    scaled = x.double() / scale
    # A tie between two codes may fall either way when the scale is rounded, but never farther than the closest code.
    torch.testing.assert_close((data.double() - scaled).abs(), nearest(scaled, dtype), rtol=1e-5, atol=1e-5)
    assert data.float().abs().amax(-1).eq(torch.finfo(dtype).max).all()


def test_ties_round_to_even() -> None:
    # Between 16 and 32 the codes are 2 apart; 448 sets the scale to 1.
    assert quantize(torch.tensor([448.0, 17.0, 19.0, -21.0, 23.0])).data.tolist() == [448, 16, 20, -20, 24]


@FORMATS
def test_a_row_of_zeros_stays_zero(dtype: torch.dtype) -> None:
    data, scale, _ = quantize(torch.zeros(2, 8), dtype)
    assert not data.float().any()
    assert (scale > 0).all()


def test_tiny_rows_do_not_divide_by_nothing() -> None:
    x = quantize(torch.full((1, 4), 1e-30))
    assert torch.equal(dequantize(x), torch.zeros(1, 4))


def test_infinity_saturates_to_the_largest_finite_entry_and_is_counted() -> None:
    count = torch.zeros((), dtype=torch.int64)
    x = torch.tensor([[1.0, math.inf, -2.0, -math.inf], [1.0, 2.0, 3.0, 4.0]])
    assert torch.equal(dequantize(quantize(x, infinities=count))[0], torch.tensor([1.0, 2.0, -2.0, -2.0]))
    assert count.item() == 2
    quantize(x, infinities=count)
    assert count.item() == 4


def test_a_row_of_infinities_is_finite() -> None:
    x = dequantize(quantize(torch.tensor([[math.inf, -math.inf, 0.0]])))
    assert x.isfinite().all()
    assert x[0, 0] > 0 > x[0, 1]


@FORMATS
def test_nan_stays_nan_and_spoils_nothing_else(dtype: torch.dtype) -> None:
    x = torch.randn(3, 16)
    x[:, 4] = 0
    expected = dequantize(quantize(x, dtype))
    x[1:, 4] = math.nan
    found = dequantize(quantize(x, dtype))
    assert torch.equal(found.isnan(), x.isnan())
    assert torch.equal(found.nan_to_num(0), expected)
    assert dequantize(quantize(torch.full((1, 4), math.nan), dtype)).isnan().all()


@FORMATS
@pytest.mark.parametrize("shape", [(0, 16), (3, 0), (0,), (2, 0, 8)], ids=str)
def test_empty(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    data, scale, _ = quantize(torch.empty(shape), dtype)
    assert data.shape == shape
    assert scale.shape == (*shape[:-1], 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_fake_quantize(dtype: torch.dtype) -> None:
    x = torch.randn(5, 33, dtype=dtype, requires_grad=True)
    out = fake_quantize(x)
    assert out.dtype == dtype
    assert torch.equal(out, dequantize(quantize(x.detach())))
    assert (out - x).norm() / x.norm() < 0.04
    grad = torch.randn_like(x)
    out.backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad, grad)


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    x, w = quantize(torch.randn(2, 9, 24)), quantize(torch.randn(10, 24))
    b = torch.randn(10) if bias else None
    exact = torch.einsum("bnc,oc->bno", dequantize(x, torch.float64), dequantize(w, torch.float64)) + (0 if b is None else b.double())
    torch.testing.assert_close(naive.linear(x, w, b, torch.float32), exact.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(naive.linear(x, w, b, torch.bfloat16), exact.bfloat16(), rtol=2**-7, atol=1e-5)
    assert naive.linear(quantize(torch.randn(0, 24)), w, b, torch.float32).shape == (0, 10)


def test_linear_is_not_touched_by_autocast() -> None:
    x, w = quantize(torch.randn(9, 24)), quantize(torch.randn(10, 24))
    with torch.autocast("cpu", torch.bfloat16):
        inside = naive.linear(x, w, None, torch.float32)
    assert torch.equal(inside, naive.linear(x, w, None, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_layer_norm_quantize(affine: bool, dtype: torch.dtype) -> None:
    x = (3 * torch.randn(2, 5, 40) + 1).to(dtype)
    w, b = (torch.randn(40), torch.randn(40)) if affine else (None, None)
    exact = F.layer_norm(x.double(), (40,), None if w is None else w.double(), None if b is None else b.double(), 1e-5)
    assert_quantizes(naive.layer_norm_quantize(x, w, b, 1e-5), exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert_quantizes(naive.layer_norm_quantize(x, w, b, 1e-5), exact)


@pytest.mark.parametrize("gain", [True, False])
def test_residual_norm_quantize(gain: bool) -> None:
    x, update, w, b = torch.randn(5, 40), torch.randn(5, 40).bfloat16(), torch.randn(40), torch.randn(40)
    g = torch.randn(40) if gain else None
    total, normed = naive.residual_norm_quantize(x, update, g, w, b, 1e-6)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, x + update.float() * (1 if g is None else g))
    assert_quantizes(normed, F.layer_norm(total.double(), (40,), w.double(), b.double(), 1e-6))
    total, normed = naive.residual_norm_quantize(x.bfloat16(), update, None if g is None else g.bfloat16(), w, b, 1e-6)
    assert total.dtype == normed.dtype == torch.bfloat16
    assert_quantizes(normed, F.layer_norm(total.double(), (40,), w.double(), b.double(), 1e-6))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_quantize(approximate: str) -> None:
    x = 3 * torch.randn(6, 50)
    assert_quantizes(naive.gelu_quantize(x, approximate), F.gelu(x.double(), approximate=approximate))


def test_swiglu_quantize() -> None:
    x = torch.randn(6, 50)
    assert_quantizes(naive.swiglu_quantize(x), F.silu(x[:, :25].double()) * x[:, 25:].double())


def test_heads_quantize() -> None:
    x = torch.randn(2, 3, 7, 8)
    assert_quantizes(naive.heads_quantize(x), x.double().transpose(1, 2).reshape(2, 7, 24))


def test_infinities_before_an_activation_are_taken_at_its_limits() -> None:
    count = torch.zeros((), dtype=torch.int64)
    x = torch.tensor([[math.inf, -math.inf, math.nan, 2.0]]).repeat(1, 8)
    for approximate in ("none", "tanh"):
        out = dequantize(naive.gelu_quantize(x, approximate, infinities=count))
        assert torch.equal(out[0, [0, 1]], torch.tensor([1.0, 0.0]) * out[0, 3])
        assert torch.equal(out.isnan(), x.isnan())
    out = dequantize(naive.swiglu_quantize(torch.cat((x, torch.ones(1, 32)), -1), infinities=count))
    assert torch.equal(out[0, [0, 1]], torch.tensor([1.0, 0.0]) * out[0, 3])
    assert count.item() == 3 * 8
