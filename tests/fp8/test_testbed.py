"""FP8 in a trained model on what it sees: the definition on a CPU, the matrix units on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from numerics import relative_error
from torch import Tensor, nn

from lite3r_plugin import apply_lite3r, convert, describe
from lite3r_plugin.apply.lookup import block_linears
from lite3r_plugin.config import Fp8Backend
from lite3r_plugin.fp8 import backends
from lite3r_plugin.fp8.linear import Fp8Linear
from lite3r_plugin.scene.procedural import ARCS, ProcScenes, TextureBank
from lite3r_plugin.testbed import Testbed


@pytest.fixture(params=["emulated", pytest.param("scaled_mm", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Fp8Backend:
    if request.param == "scaled_mm" and (reason := backends.why_not("scaled_mm", torch.device("cuda"), 384, 384)):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def device(backend: Fp8Backend) -> str:
    return "cpu" if backend == "emulated" else "cuda"


@pytest.fixture
def scene(device: str) -> Tensor:
    """Images ``[1, 4, 3, H, W]`` of a rendered scene."""
    return ProcScenes(TextureBank.procedural(12, 32), seed=3, arcs=ARCS[:2])(1, 4, 64, 80)["rgb"].to(device)


@torch.no_grad()
def test_layers_on_real_activations(scene: Tensor, device: str, backend: Fp8Backend) -> None:
    """At most 4 % from BF16 in every Linear."""
    model = apply_lite3r(Testbed.from_pretrained(device=device), keep_ratio=0.5, dense_below=0)
    inputs: dict[nn.Linear, Tensor] = {}
    linears = block_linears(model)
    hooks = [m.register_forward_pre_hook(lambda module, args: inputs.update({module: args[0]})) for m in linears]
    model(scene)
    for hook in hooks:
        hook.remove()
    assert len(inputs) == len(linears) == 8 * 6  # of a frame and a global block in each of six pairs
    for linear, x in inputs.items():
        fp8 = Fp8Linear.quantized(linear, backend)
        error = relative_error(fp8(x), F.linear(x.bfloat16(), linear.weight.bfloat16(), linear.bias.bfloat16()))
        assert 0.005 < error <= 0.04


@torch.no_grad()
def test_as_trained_and_as_converted(scene: Tensor, device: str, backend: Fp8Backend) -> None:
    model = apply_lite3r(Testbed.from_pretrained(device=device), keep_ratio=0.5, dense_below=0, precision="fp8_qat")
    trained = model(scene)
    convert(model, fp8_backend=backend)
    report = describe(model)
    assert report.linears == {f"in FP8 ({backend})": 24, "in full precision": 24}  # of four pairs of blocks out of six, three each
    assert report.fp8_bytes[0] <= 0.52 * report.fp8_bytes[1]
    found = model(scene)
    for name in found:
        assert relative_error(found[name], trained[name]) < 1e-2, name
