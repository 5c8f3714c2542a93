"""FP32 Linears on few rows: the kernels against the definition, on a GPU as compiled, elsewhere interpreted at small sizes."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_as_accurate
from pairs import grid

from lite3r_plugin.ops import skinny_linear
from lite3r_plugin.ops.skinny_linear import MAX_ROWS, MAX_ROWS_NARROW, naive

kernels = pytest.importorskip("lite3r_plugin.ops.skinny_linear.kernels")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SIZES = [(5, 16), (130, 600), *([(2048, 8192)] if GPU else [])]  # outputs, inputs

if GPU and torch.cuda.get_device_capability() < (8, 0):
    pytest.skip("the kernels need compute capability 8.0", allow_module_level=True)


NARROW = (torch.bfloat16, torch.float16)


def test_a_row_has_the_same_bits_whatever_is_beside_it() -> None:
    x, weight = torch.randn(19, 600, device=DEVICE), torch.randn(13, 600, device=DEVICE).bfloat16()
    whole = kernels.linear(x, weight, None)
    for rows in (1, 8, 9):
        assert torch.equal(kernels.linear(x[-rows:], weight, None), whole[-rows:])


@pytest.mark.parametrize(
    ("rows", "sizes", "bias", "dtype"), grid((1, 3, 8, 9, 16, 37), SIZES, (True, False), (torch.float32, *NARROW)), ids=str
)
def test_linear(rows: int, sizes: tuple[int, int], bias: bool, dtype: torch.dtype) -> None:
    outputs, inputs = sizes
    x, weight = torch.randn(1, rows, inputs, device=DEVICE), torch.randn(outputs, inputs, device=DEVICE).to(dtype)
    b = torch.randn(outputs, device=DEVICE) if bias else None
    found = kernels.linear(x, weight, b)
    reference = naive.linear(x.double(), weight.double(), None if b is None else b.double())
    assert found.shape == reference.shape
    assert found.dtype == torch.float32
    assert_as_accurate(found, naive.linear(x, weight, b), reference)
    assert torch.equal(found, kernels.linear(x, weight, b))


@pytest.mark.parametrize("dtype", NARROW)
def test_only_what_is_stored_is_rounded(dtype: torch.dtype) -> None:
    """Nothing of the input, of the bias or of the sums, all of which would show: terms cancel."""
    half = torch.tensor([[1.0, 1.0, -1.0]], device=DEVICE).to(dtype)
    x, bias = torch.tensor([[1 + 2**-20, 2.0**-18, 1.0]], device=DEVICE), torch.tensor([2.0**-22], device=DEVICE)
    exact = torch.tensor([[2**-20 + 2**-18 + 2**-22]], device=DEVICE)
    assert torch.equal(kernels.linear(x, half, bias), exact)
    assert torch.equal(naive.linear(x, half, bias), exact)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(naive.linear(x, half, bias), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_with_strides(dtype: torch.dtype) -> None:
    x, weight = torch.randn(4, 3, 40, device=DEVICE)[:, 0], torch.randn(20, 80, device=DEVICE).to(dtype)[:, ::2]
    torch.testing.assert_close(kernels.linear(x, weight, None), naive.linear(x, weight, None))


def test_it_takes_few_rows_in_fp32_alone() -> None:
    x, weight, bias = torch.randn(2, 4, 16, device=DEVICE), torch.randn(5, 16, device=DEVICE), torch.randn(5, device=DEVICE)
    assert skinny_linear.takes(x, weight, bias)
    assert skinny_linear.takes(x[0, 0], weight, None)
    torch.testing.assert_close(skinny_linear.linear(x, weight, bias), naive.linear(x, weight, bias))
    assert not skinny_linear.takes(torch.randn(MAX_ROWS + 1, 16, device=DEVICE), weight, bias)
    assert not skinny_linear.takes(x[:0], weight, bias)
    assert not skinny_linear.takes(x[..., :8], weight, bias)  # torch says what is wrong
    assert not skinny_linear.takes(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    assert not skinny_linear.takes(x, weight, bias.double())
    assert not skinny_linear.takes(x.to("meta"), weight.to("meta"), None)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert not skinny_linear.takes(x, weight, bias)
    weight.requires_grad_()
    assert not skinny_linear.takes(x, weight, bias)
    with torch.no_grad():
        assert skinny_linear.takes(x, weight, bias)


@pytest.mark.parametrize("dtype", NARROW)
def test_it_takes_weights_that_are_stored_in_less(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(2, 16, device=DEVICE), torch.randn(5, 16, device=DEVICE).to(dtype), torch.randn(5, device=DEVICE)
    assert skinny_linear.is_narrow(x, weight)
    assert skinny_linear.takes(x, weight, bias)
    torch.testing.assert_close(skinny_linear.linear(x, weight, bias), naive.linear(x, weight, bias))
    assert not skinny_linear.takes(x, weight, bias.to(dtype))
    assert not skinny_linear.takes(x.to(dtype), weight, None)
    assert not skinny_linear.takes(x, weight.to(torch.float8_e4m3fn), None)  # it has a scale somewhere
    assert not skinny_linear.takes(x.double(), weight, None)
    many = torch.randn(MAX_ROWS_NARROW + 1, 16, device=DEVICE)
    assert skinny_linear.takes(many[1:], weight, bias)
    assert skinny_linear.takes(many, weight, bias) is (dtype == torch.bfloat16)
    assert skinny_linear.fits(many, weight, bias)
    for rows in (x, many, many[:0], x[0]):  # what is compiled does not know how many they are
        found = skinny_linear.linear_operator(rows, weight, bias)
        assert found.shape == (*rows.shape[:-1], 5)
        torch.testing.assert_close(found, naive.linear(rows, weight, bias))
    torch.library.opcheck(skinny_linear.linear_operator, (x, weight, bias))


@pytest.mark.gpu
def test_what_a_user_lets_round_stays_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(2, 16, device="cuda"), torch.randn(5, 16, device="cuda")
    assert skinny_linear.takes(x, weight, None)
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        monkeypatch.setattr(matmul, "fp32_precision", "tf32")
    else:
        monkeypatch.setattr(matmul, "allow_tf32", True)
    assert not skinny_linear.takes(x, weight, None)
    assert skinny_linear.takes(x, weight.bfloat16(), None)  # of which torch's product would need a copy
