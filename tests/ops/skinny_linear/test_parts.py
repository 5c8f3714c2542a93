"""FP32 Linears by weights in BF16 on BF16 matrix units, against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import assert_as_accurate
from torch import Tensor

from lite3r_plugin.ops import skinny_linear
from lite3r_plugin.ops.skinny_linear import naive, parts

INF, NAN = float("inf"), float("nan")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 3, 9, 37])
@pytest.mark.parametrize("sizes", [(5, 16), (130, 600), (2048, 588)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(rows: int, sizes: tuple[int, int], bias: bool, device: str) -> None:
    outputs, inputs = sizes
    x, weight = torch.randn(1, rows, inputs, device=device), torch.randn(outputs, inputs, device=device).bfloat16()
    b = torch.randn(outputs, device=device) if bias else None
    found = parts.linear(x, weight, b)
    reference = naive.linear(x.double(), weight.double(), None if b is None else b.double())
    assert found.dtype == torch.float32
    assert_as_accurate(found, naive.linear(x, weight, b), reference)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_of_a_number_is_lost(device: str) -> None:
    generator = torch.Generator("cpu").manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (64, 1024), generator=generator, dtype=torch.int32).to(device)
    x = bits.view(torch.float32)
    x = torch.where(x.isfinite() & (x.abs() > 1e-30), x, 1.0)
    high, middle, low = parts.in_parts(x).double().chunk(3)
    assert torch.equal(high + middle + low, x.double())
    found = parts.in_parts(torch.tensor([[INF, -INF, NAN, 0.0, -0.0, 3.4e38]], device=device)).float()
    assert torch.equal(found.sum(0).isnan(), torch.tensor([False, False, True, False, False, False], device=device))
    assert found.sum(0)[:2].tolist() == [INF, -INF]
    odd = torch.tensor([[0x7F800001]], dtype=torch.int32, device=device).view(torch.float32)  # NaN by its last digit alone
    assert parts.in_parts(odd).float().sum(0).isnan()


@pytest.mark.parametrize("device", DEVICES)
def test_infinities_give_what_they_do_in_fp32(device: str) -> None:
    x = torch.tensor([[INF, 1.0], [NAN, 1.0], [-INF, 1.0], [1.0, 1.0]], device=device)
    weight = torch.tensor([[2.0, 1.0], [-1.0, 1.0]], device=device).bfloat16()
    torch.testing.assert_close(parts.linear(x, weight, None), naive.linear(x, weight, None), equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiler_does_not_leave_the_parts_out(device: str) -> None:
    """Inductor drops roundings to BF16 between operators that it fuses."""
    x, weight = torch.randn(9, 64, device=device), torch.randn(24, 64, device=device).bfloat16()
    graphs: list[str] = []

    def norm_and_linear(x: Tensor) -> Tensor:
        return parts.linear(torch.nn.functional.layer_norm(x, (64,)), weight, None)

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward if device == "cpu" else torch._inductor.compile(graph, inputs)  # pyright: ignore

    found = torch.compile(norm_and_linear, backend=backend, fullgraph=True, dynamic=True)(x)
    reference = torch.nn.functional.layer_norm(x.double(), (64,)) @ weight.double().t()
    assert_as_accurate(found, norm_and_linear(x), reference)
    assert all("products_in_fp32" in code for code in graphs)
    torch.library.opcheck(parts.products_operator, (parts.in_parts(x), weight))


@pytest.mark.parametrize("device", DEVICES)
def test_it_runs_for_more_rows_than_the_kernel(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    own = parts.linear
    monkeypatch.setattr(parts, "linear", lambda x, *rest: seen.append(len(x)) or own(x, *rest))
    weight = torch.randn(24, 64, device=device)
    for rows in (1, skinny_linear.MAX_ROWS, skinny_linear.MAX_ROWS + 1, 100):
        x = torch.randn(rows, 64, device=device)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            narrow = weight.to(dtype)
            if skinny_linear.takes(x, narrow, None):
                torch.testing.assert_close(skinny_linear.linear(x, narrow, None), naive.linear(x, narrow, None), rtol=1e-5, atol=1e-5)
    assert seen == ([] if device == "cpu" else [skinny_linear.MAX_ROWS + 1, 100])
