"""The choice of the dense attention backend."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lite3r_plugin.runtime.sdpa import BACKENDS, DenseKernels, fastest_sdpa, sdpa_backend


def test_there_is_no_choice_on_the_cpu() -> None:
    q = torch.randn(1, 2, 16, 8)
    assert fastest_sdpa(q) == ("default", {})
    before = F.scaled_dot_product_attention(q, q, q)
    with sdpa_backend("default"):
        assert torch.equal(F.scaled_dot_product_attention(q, q, q), before)


@pytest.mark.parametrize("name", BACKENDS)
def test_where_the_preferred_backend_cannot_run_others_do(name: str) -> None:
    q = torch.randn(1, 2, 16, 8)
    with sdpa_backend(name):
        torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q), (q @ q.mT / 8**0.5).softmax(-1) @ q)


def test_dense_kernels_are_those_that_ran() -> None:
    q, k = torch.randn(1, 2, 16, 8), torch.randn(1, 2, 24, 8)
    flash, mathematical, nothing = DenseKernels(), DenseKernels(), DenseKernels()
    with torch.no_grad():
        with flash:
            F.scaled_dot_product_attention(q, q, q)
        with flash, torch.autocast("cpu", torch.bfloat16):  # read off what ran, so casts are seen
            F.scaled_dot_product_attention(query=q, key=k, value=k)
        with mathematical, sdpa_kernel(SDPBackend.MATH):
            F.scaled_dot_product_attention(q, q, q)
        with nothing:
            F.scaled_dot_product_attention(q, q, q, torch.ones(16, 16, dtype=torch.bool))
            (q @ q.mT).softmax(-1)
    assert flash.ran == {(q.shape, q.shape): {"flash float32"}, (q.shape, k.shape): {"flash bfloat16"}}
    assert mathematical.names == ["math float32"]
    assert nothing.names == []
    assert flash.agree(flash) is True
    assert flash.agree(mathematical) is False
    assert flash.agree(nothing) is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash", "cudnn", "efficient"])
def test_the_preferred_kernel_runs(name: str) -> None:
    q = torch.randn(1, 8, 256, 64, device="cuda", dtype=torch.bfloat16)
    kernels = DenseKernels()
    with sdpa_backend(name), kernels, torch.no_grad():
        F.scaled_dot_product_attention(q, q, q)
    assert kernels.names == [f"{name} bfloat16"]


FIRST = """
import sys, torch, torch.nn.functional as F
from lite3r_plugin.runtime.sdpa import DenseKernels, sdpa_backend

q = torch.randn(1, 8, 256, 64, device="cuda", dtype=torch.bfloat16)
for backend in sys.argv[1:]:
    with torch.no_grad(), sdpa_backend(backend), DenseKernels() as kernels:
        F.scaled_dot_product_attention(q, q, q)
    print(*kernels.names)
"""


@pytest.mark.gpu
def test_the_first_attention_of_a_process_runs_as_preferred_and_leaves_torch_its_order() -> None:
    def ran(*backends: str) -> list[str]:
        return subprocess.run([sys.executable, "-c", FIRST, *backends], capture_output=True, text=True, check=True).stdout.splitlines()

    assert ran("efficient", "default") == ["efficient bfloat16", *ran("default")]


@pytest.mark.gpu
def test_the_choice_is_one_that_runs() -> None:
    name, times = fastest_sdpa(torch.randn(1, 8, 1000, 64, device="cuda", dtype=torch.bfloat16))
    assert isinstance(times[name], float)
    assert times[name] <= min(t for t in times.values() if isinstance(t, float)) / 0.95
    assert fastest_sdpa(torch.randn(1, 8, 1000, 64, device="cuda", dtype=torch.float64))[0] == "default"
