"""Which backend a Linear gets, and what happens where none fits."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from lite3r_plugin.costs.linear import fp8_pays
from lite3r_plugin.errors import BackendError, ConfigError
from lite3r_plugin.fp8 import backends
from lite3r_plugin.fp8.backends import te
from lite3r_plugin.fp8.linear import Fp8Linear

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """Makes `gpu(major, minor)`, which pretends that there is such a GPU."""

    def pretend(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    te._library.cache_clear()
    yield pretend
    te._library.cache_clear()


@pytest.mark.parametrize(
    ("capability", "size", "backend"),
    [
        ((9, 0), (1024, 4096), "scaled_mm"),
        ((8, 9), (64, 64), "scaled_mm"),
        ((9, 0), (1024, 1001), "weight_only"),
        ((9, 0), (45, 1024), "weight_only"),
        ((8, 0), (1024, 4096), "weight_only"),
        ((7, 5), (1024, 4096), "emulated"),
    ],
    ids=str,
)
def test_auto(gpu, capability: tuple[int, int], size: tuple[int, int], backend: str) -> None:
    gpu(*capability)
    assert backends.choose("auto", CUDA, *size) == backend
    assert backends.choose(backend, CUDA, *size) == backend  # pyright: ignore[reportArgumentType]
    assert backends.choose("auto", CPU, *size) == "emulated"


@pytest.mark.parametrize(
    ("backend", "capability", "size", "reason"),
    [
        ("scaled_mm", (8, 0), (64, 64), "older than compute capability 8.9"),
        ("scaled_mm", (9, 0), (64, 45), "multiples of 16, not 64 -> 45"),
        ("te", (9, 0), (40, 64), "multiples of 16"),
        ("weight_only", (7, 5), (64, 64), r"older than compute capability 8\.0"),
    ],
)
def test_what_cannot_run_is_refused(gpu, backend, capability, size, reason: str) -> None:
    gpu(*capability)
    with pytest.raises(BackendError, match=reason):
        backends.choose(backend, CUDA, *size)
    with pytest.raises(BackendError, match='fp8_backend="auto"') if backend != "emulated" else pytest.raises(ConfigError):
        backends.choose(backend, CPU, *size)


@pytest.mark.parametrize("error", [ImportError("no libnccl"), RuntimeError("empty meta package"), OSError("libnccl.so.2")], ids=repr)
def test_a_broken_transformer_engine_is_a_reason(gpu, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    gpu(9, 0)

    class Broken(types.ModuleType):
        def __getattr__(self, name: str):
            raise error

    monkeypatch.setitem(sys.modules, "transformer_engine", Broken("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", Broken("transformer_engine.pytorch"))
    assert str(error) in str(te.why_no_library())
    with pytest.raises(BackendError, match=type(error).__name__):
        backends.choose("te", CUDA, 64, 64)
    assert backends.choose("auto", CUDA, 64, 64) == "scaled_mm"


def test_transformer_engine_is_not_looked_for_without_a_gpu() -> None:
    statement = "import sys; from lite3r_plugin.fp8.backends import te; te.why_no_library(); print('transformer_engine' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True, check=True)
    assert torch.cuda.is_available() or done.stdout.strip() == "False"


@pytest.mark.parametrize("backend", ["scaled_mm", "weight_only", "te"])
@torch.no_grad()
def test_a_tensor_on_another_device_than_at_conversion(backend) -> None:
    linear = Fp8Linear.quantized(nn.Linear(16, 16), backend)
    with pytest.raises(BackendError, match=r"convert\(model\) again"):
        linear(torch.randn(3, 16))


def test_fp8_pays_for_many_tokens_only(gpu) -> None:
    gpu(9, 0)
    assert fp8_pays(CUDA, 43_968, 1024, 4096, fused=True)
    assert fp8_pays(CUDA, 43_968, 1024, 4096, fused=False)
    assert not fp8_pays(CUDA, 256, 1024, 4096, fused=True)
    assert not fp8_pays(CUDA, 43_968, 1024, 1024, fused=False)  # the pass over the input costs what the product saves
    assert fp8_pays(CUDA, 43_968, 1024, 1024, fused=True)
    assert not fp8_pays(CPU, 43_968, 1024, 4096, fused=True)
    gpu(8, 0)
    assert not fp8_pays(CUDA, 43_968, 1024, 4096, fused=True)


@pytest.mark.parametrize("tokens", [1000, 4000, 16_000, 64_000])
def test_fusing_never_makes_it_pay_less(gpu, tokens: int) -> None:
    gpu(9, 0)
    for outputs in (256, 1024, 3072, 4096):
        assert fp8_pays(CUDA, tokens, 1024, outputs, fused=True) >= fp8_pays(CUDA, tokens, 1024, outputs, fused=False)


def test_nothing_that_was_measured_slower_is_said_to_pay(gpu) -> None:
    gpu(9, 0)
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "h100_fp8.json"
    paying = 0
    for record in json.loads(results.read_text())["linears"]:
        for name, fused in (("fp8 fused", True), ("fp8", False)):
            pays = fp8_pays(CUDA, record["tokens"], record["inputs"], record["outputs"], fused=fused)
            assert not pays or record["ms"][name] < record["ms"]["bf16"], (record, name)
            paying += pays
    assert paying >= 14
