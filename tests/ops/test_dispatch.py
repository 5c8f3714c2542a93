"""Which backend runs, and that falling back on a GPU is never silent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from operators import Seen

from lite3r_plugin.errors import BackendError
from lite3r_plugin.ops import fp8, qk_norm_rope, weight_only
from lite3r_plugin.ops.dispatch import SlowPathWarning, triton_installed, use_triton, why_not_on, why_not_triton
from lite3r_plugin.ops.sla import sparse_linear_attention


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes `gpu(dtype, head_dim)`, which looks like a tensor on an H100, one that is not there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return lambda dtype=torch.bfloat16, dim=64: SimpleNamespace(
        is_cuda=True, device=torch.device("cuda", 99), dtype=dtype, shape=(1, 2, 9, dim)
    )


def test_a_gpu_tensor_runs_triton(gpu: Any) -> None:
    assert use_triton("auto", gpu())
    assert use_triton("triton", gpu())
    assert not use_triton("naive", gpu())


@pytest.mark.parametrize(
    ("dtype", "dim", "needs_grad", "reason"),
    [
        (torch.float64, 64, False, "the dtype is torch.float64"),
        (torch.bfloat16, 72, False, "the head dimension is 72"),
        (torch.float32, 96, True, "gradients need more shared memory for torch.float32 and head dimension 96"),
    ],
)
def test_falling_back_on_a_gpu_warns(gpu: Any, dtype: torch.dtype, dim: int, needs_grad: bool, reason: str) -> None:
    with pytest.warns(SlowPathWarning, match=reason):
        assert not use_triton("auto", gpu(dtype, dim), needs_grad)
    with pytest.raises(BackendError, match='"triton" backend of attention cannot run here'):
        use_triton("triton", gpu(dtype, dim), needs_grad)


@pytest.mark.parametrize(
    ("capability", "dtype", "dim", "needs_grad", "runs"),
    [
        ((9, 0), torch.float32, 128, False, True),
        ((9, 0), torch.float32, 64, True, True),
        ((8, 0), torch.float32, 64, True, False),
        ((8, 0), torch.bfloat16, 128, True, True),
        ((8, 9), torch.bfloat16, 128, True, False),
        ((8, 9), torch.bfloat16, 128, False, True),
        ((8, 6), torch.bfloat16, 64, True, True),
        ((12, 0), torch.float32, 64, False, False),
    ],
)
def test_small_gpus(capability: tuple[int, int], dtype: torch.dtype, dim: int, needs_grad: bool, runs: bool) -> None:
    assert (why_not_on(capability, dtype, dim, needs_grad) is None) == runs


def test_an_old_gpu() -> None:
    assert why_not_on((7, 5), torch.bfloat16, 64, False) == "the GPU is older than compute capability 8.0"


def test_a_cpu_falls_back_without_a_warning() -> None:
    assert why_not_triton(torch.rand(1, 1, 4, 64)) == "the tensors are on cpu, not on a CUDA GPU"
    assert not use_triton("auto", torch.rand(1, 1, 4, 64))


@pytest.mark.gpu
def test_tensors_on_another_gpu() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    q, k, v = torch.randn(3, 1, 2, 500, 64, dtype=torch.bfloat16).unbind(0)
    options: dict[str, Any] = dict(keep_ratio=0.3, linear="all", proj=torch.eye(64), block_means=True)
    first, second = (
        sparse_linear_attention(*(x.to(device) for x in (q, k, v)), **options | dict(proj=options["proj"].to(device)))
        for device in ("cuda:0", "cuda:1")
    )
    assert torch.equal(first.cpu(), second.cpu())


def _launches() -> dict[str, Any]:
    """Calls that launch a kernel, interpreted on a CPU, by the operator that they are under a mode."""
    from lite3r_plugin.ops.fp8 import kernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, weight = torch.randn(1, 2, 16, 32, device=device), fp8.quantize(torch.randn(24, 32, device=device))
    column = torch.rand(32, 1, device=device)
    norm = dict(q_norm=qk_norm_rope.HeadNorm("layer", None, None, 1e-6), k_norm=None, positions=None, rope_base=None)
    calls: dict[str, Any] = {
        "norm_rope": lambda: qk_norm_rope.norm_rope(q, q, triton=True, **norm)[0],
        "fp8_rows": lambda: kernels.quantize(q).data.float(),
        "residual": lambda: kernels.residual(q, q, None),
        "fp8_scale_products_": lambda: kernels.scale_products(q[0, 0].clone(), q[0, 0, :, 0].clone(), column, None),
        "weight_only_linear": lambda: weight_only.linear(q, weight, None, triton=True),
    }
    if device == "cuda":
        calls["sparse_linear_attention"] = lambda: sparse_linear_attention(q, q, q, keep_ratio=1.0)
    return calls


@pytest.mark.skipif(not triton_installed(), reason="needs triton")
def test_a_launch_is_an_operator_for_what_looks_at_operators() -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    for name, call in _launches().items():
        expected, seen = call(), Seen()
        with seen:
            found = call()
        assert f"lite3r::{name}" in seen.names
        assert torch.equal(found, expected)
        with FakeTensorMode(allow_non_fake_inputs=True):
            imagined = call()
        assert isinstance(imagined, FakeTensor)
        assert (imagined.shape, imagined.dtype, imagined.device) == (found.shape, found.dtype, found.device)
