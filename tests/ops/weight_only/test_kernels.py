"""A Linear with FP8 weights alone: the kernel against the definition, on a GPU as compiled, elsewhere interpreted at small sizes."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_as_accurate
from pairs import grid
from torch import Tensor

from lite3r_plugin.ops.fp8 import E4M3, Quantized, quantize
from lite3r_plugin.ops.weight_only import naive

kernels = pytest.importorskip("lite3r_plugin.ops.weight_only.kernels")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# Triton's interpreter cuts FP32 off where it should round it to BF16
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if GPU else (torch.float16, torch.float32)
SIZES = [(1, 5, 16), (37, 130, 45), *([(1374, 1024, 1024)] if GPU else [])]  # rows, outputs, inputs

if GPU and torch.cuda.get_device_capability() < (8, 0):
    pytest.skip("the kernel needs compute capability 8.0", allow_module_level=True)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize(("sizes", "bias", "dtype"), grid(SIZES, (True, False), DTYPES), ids=str)
def test_linear(sizes: tuple[int, int, int], bias: bool, dtype: torch.dtype) -> None:
    rows, outputs, inputs = sizes
    x, weight = random(2, rows, inputs, dtype=dtype), quantize(random(outputs, inputs) * random(outputs, inputs).exp())
    b = random(outputs, dtype=dtype) if bias else None
    found = kernels.linear(x, weight, b)
    assert found.dtype == dtype
    reference = naive.linear(x.double(), weight, None if b is None else b.double())
    same = naive.linear(x, weight, b)
    if GPU and dtype == torch.float32:  # its products are TF32's
        assert ((found.double() - reference).norm() / reference.norm()).item() < 2**-10
    else:
        assert_as_accurate(found, same, reference)


def test_the_kernel_decodes_every_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    codes = codes[codes & 0x7F != 0x7F].view(E4M3).repeat_interleave(16).view(-1, 16)  # all finite numbers, a row each
    weight = Quantized(codes, torch.ones(len(codes), 1, device=DEVICE), torch.float32)
    x = torch.eye(16, device=DEVICE).half()
    assert torch.equal(kernels.linear(x, weight, None), codes.float().half().T.contiguous())
