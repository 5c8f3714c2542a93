"""FP8 kernels against their naive twins: on a GPU as compiled, elsewhere in Triton's interpreter at small sizes."""

from __future__ import annotations

import math

import pytest
import torch
from numerics import assert_quantizes
from pairs import grid
from torch import Tensor

from lite3r_plugin.ops.fp8 import naive
from lite3r_plugin.ops.fp8.naive import E4M3, dequantize

kernels = pytest.importorskip("lite3r_plugin.ops.fp8.kernels")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
ROWS = (1, 63, 1374) if GPU else (1, 7)
WIDTHS = (45, 384, 1024, 4096) if GPU else (45, 384)
# Triton's interpreter cuts FP32 off where it should round it to BF16
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if GPU else (torch.float16, torch.float32)

if GPU and torch.cuda.get_device_capability() < (8, 9):
    pytest.skip("these kernels need a GPU with FP8", allow_module_level=True)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize(("rows", "width", "dtype"), grid(ROWS, WIDTHS, DTYPES), ids=str)
class TestPasses:
    def test_quantize(self, rows: int, width: int, dtype: torch.dtype) -> None:
        x = random(2, rows, width, dtype=dtype)
        found = kernels.quantize(x)
        assert (found.data.dtype, found.scale.shape, found.dtype) == (E4M3, (2, rows, 1), dtype)
        assert_quantizes(found, x.double())
        assert_quantizes(kernels.quantize(x.transpose(0, 1)), x.transpose(0, 1).double())

    @pytest.mark.parametrize("affine", ["both", "weight", "none"])
    def test_layer_norm(self, rows: int, width: int, dtype: torch.dtype, affine: str) -> None:
        x = 3 * random(rows, width, dtype=dtype) + 1
        weight = None if affine == "none" else random(width)
        bias = random(width, dtype=dtype) if affine == "both" else None
        found = kernels.layer_norm_quantize(x, weight, bias, 1e-6)
        wide = [None if p is None else p.double() for p in (weight, bias)]
        assert_quantizes(found, torch.nn.functional.layer_norm(x.double(), (width,), wide[0], wide[1], 1e-6))
        assert found.dtype == dtype

    @pytest.mark.parametrize("gain", [True, False])
    def test_residual_norm(self, rows: int, width: int, dtype: torch.dtype, gain: bool) -> None:
        x, update, weight, bias = random(2, rows, width, dtype=dtype), random(2, rows, width, dtype=DTYPES[0]), random(width), random(width)
        g = random(width, dtype=dtype) if gain else None
        total, found = kernels.residual_norm_quantize(x, update, g, weight, bias, 1e-6)
        same, expected = naive.residual_norm_quantize(x, update, g, weight, bias, 1e-6)
        assert total.dtype == found.dtype == same.dtype == expected.dtype
        torch.testing.assert_close(total, same, rtol=2 * torch.finfo(total.dtype).eps, atol=1e-6)
        normed = torch.nn.functional.layer_norm(total.double(), (width,), weight.double(), bias.double(), 1e-6)
        assert_quantizes(found, normed)

    @pytest.mark.parametrize("approximate", ["none", "tanh"])
    def test_gelu(self, rows: int, width: int, dtype: torch.dtype, approximate: str) -> None:
        x = 3 * random(rows, width, dtype=dtype)
        assert_quantizes(kernels.gelu_quantize(x, approximate), torch.nn.functional.gelu(x.double(), approximate=approximate), other=0.02)

    def test_swiglu(self, rows: int, width: int, dtype: torch.dtype) -> None:
        x = 3 * random(rows, 2 * width, dtype=dtype)
        gate, value = x.double().chunk(2, -1)
        assert_quantizes(kernels.swiglu_quantize(x), torch.nn.functional.silu(gate) * value)

    def test_heads(self, rows: int, width: int, dtype: torch.dtype) -> None:
        dim = 32
        together = random(2, rows, 3, 4, dim, dtype=dtype)  # as a view of what one Linear gave, and as kernels write it
        for x in (together[:, :, 0].transpose(1, 2), together[:, :, 0].transpose(1, 2).contiguous()):
            assert_quantizes(kernels.heads_quantize(x), x.double().transpose(1, 2).flatten(2))

    @pytest.mark.parametrize("gain", [True, False])
    def test_residual(self, rows: int, width: int, dtype: torch.dtype, gain: bool) -> None:
        x, update = (
            random(2, rows, width, dtype=dtype),
            random(2, rows, width, dtype=DTYPES[0]).transpose(0, 1).contiguous().transpose(0, 1),
        )
        g = random(width) if gain else None
        found, same = kernels.residual(x, update, g), naive.residual(x, update, g)
        assert found.dtype == same.dtype
        torch.testing.assert_close(found, same, rtol=2 * torch.finfo(found.dtype).eps, atol=1e-6)

    @pytest.mark.parametrize("bias", [True, False])
    def test_scales_of_products(self, rows: int, width: int, dtype: torch.dtype, bias: bool) -> None:
        products, row, column = random(rows, width), random(rows, 1), random(width, 1)
        b = random(width, dtype=dtype) if bias else None
        expected = naive.scale_products(products.double(), row, column, b)
        torch.testing.assert_close(kernels.scale_products(products, row, column, b), expected.float(), rtol=1e-6, atol=1e-6)


def test_gelu_everywhere() -> None:
    x = torch.linspace(-12, 12, 4096 if GPU else 512, device=DEVICE)[:, None].expand(-1, 2).contiguous()
    x[:, 1] = 0  # each entry sets the scale of its own row, so that its relative error shows
    found = dequantize(kernels.gelu_quantize(x))[:, 0]
    expected = torch.nn.functional.gelu(x[:, 0].double())
    shown = x[:, 0] > -5.4
    assert ((found - expected).abs() <= 0.002 * expected.abs())[shown].all()
    assert (found[~shown].abs() < 1e-6).all()


@pytest.mark.parametrize("infinite", [(3,), (0, 11, 40)], ids=str)
def test_infinities_and_nan(infinite: tuple[int, ...]) -> None:
    x = random(5, 45)
    x[1, list(infinite)] = math.inf
    x[2, list(infinite)] = -math.inf
    x[2:4, 7] = math.nan
    x[4] = math.nan
    x[0] = 0
    count = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    found, expected = kernels.quantize(x, count), naive.quantize(x)
    assert torch.equal(dequantize(found).nan_to_num(99), dequantize(expected).nan_to_num(99))
    assert count.item() == 2 * len(infinite)
    for op in ("gelu_quantize", "swiglu_quantize"):
        found, expected = (dequantize(getattr(module, op)(x[:, :44])) for module in (kernels, naive))
        assert torch.equal(found.isnan(), expected.isnan())
        torch.testing.assert_close(found.nan_to_num(0), expected.nan_to_num(0), rtol=0.13, atol=1e-3)


def test_codes_of_all_sizes() -> None:
    x = torch.cat([torch.tensor([448.0]), torch.linspace(-448, 448, 301), torch.linspace(-0.03, 0.03, 210)]).to(DEVICE)[None]
    assert torch.equal(kernels.quantize(x).data.view(torch.uint8) & 0x7F, naive.quantize(x).data.view(torch.uint8) & 0x7F)


def test_compiled_for_any_size() -> None:
    """One opaque operator in the graph, which serves any number of rows, and counts infinities there too."""
    torch._dynamo.reset()
    gain, weight, bias = (random(64) for _ in range(3))
    counter = torch.zeros(1, dtype=torch.int64, device=DEVICE)

    def block(x: Tensor, update: Tensor, attended: Tensor) -> tuple[Tensor, ...]:
        total, rows = kernels.residual_norm_quantize(x, update, gain, weight, bias, 1e-5, infinities=counter)
        wide = kernels.gelu_quantize(torch.cat((total, total), -1), infinities=counter)
        return total, *rows[:2], *wide[:2], *kernels.heads_quantize(attended, infinities=counter)[:2]

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    for i, rows in enumerate((7, 12, 30)):
        inputs = random(2, rows, 64), random(2, rows, 64), random(2, 4, rows, 16)
        inputs[2][0, 3, 5, 1] = math.inf
        counter.zero_()
        expected = block(*inputs)
        seen = counter.clone()
        counter.zero_()
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            found = compiled(*inputs)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one.float(), other.float())
        assert torch.equal(counter, seen)
        assert seen.item() > 0
    torch._dynamo.reset()


def test_the_operator_is_what_it_says() -> None:
    arguments = (random(2, 5, 64), random(2, 5, 64), None, random(64), None, torch.zeros(1, dtype=torch.int64, device=DEVICE))
    torch.library.opcheck(kernels.rows_operator, (*arguments, True, 1e-5, None, False), test_utils=("test_schema", "test_faketensor"))
