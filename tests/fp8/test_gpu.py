"""The FP8 backends on a GPU: against the definition, in graphs, under compilation, and what they hold in memory."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from numerics import relative_error
from torch import Tensor, nn
from toys import Toy, images, toy_adapter

from lite3r_plugin import apply_lite3r, convert, describe, load_lite3r, save_lite3r
from lite3r_plugin.apply.lookup import block_linears
from lite3r_plugin.errors import BackendError
from lite3r_plugin.fp8 import backends
from lite3r_plugin.fp8.backends import te
from lite3r_plugin.fp8.block import mlp
from lite3r_plugin.fp8.linear import Fp8Linear
from lite3r_plugin.ops.fp8 import passes, quantize

__all__ = ["toy_adapter"]  # the fixture
pytestmark = pytest.mark.gpu
SPARSE: dict[str, Any] = dict(keep_ratio=0.3, dense_below=0)
SIZES = [(1024, 3072), (1024, 1024), (4096, 1024), (48, 16)]


def needs(backend: str) -> None:
    if reason := backends.why_not(backend, torch.device("cuda"), 1024, 1024):  # pyright: ignore[reportArgumentType]
        pytest.skip(f"{backend}: {reason}")


def pair(inputs: int, outputs: int, backend: str, bias: bool = True) -> tuple[Fp8Linear, Fp8Linear]:
    """The same FP8 weight, run by the definition and by `backend`."""
    linear = nn.Linear(inputs, outputs, bias=bias, device="cuda")
    emulated = Fp8Linear.quantized(linear, "emulated")
    other = copy.deepcopy(emulated)
    other.backend = backend  # pyright: ignore[reportAttributeAccessIssue]
    return emulated, other


@pytest.mark.parametrize("backend", ["scaled_mm", "weight_only", "te"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rows", [1, 37, 2748])
@torch.no_grad()
def test_backends_agree(rows: int, size: tuple[int, int], bias: bool, backend: str) -> None:
    needs(backend)
    emulated, other = pair(*size, backend, bias)
    x = torch.randn(1, rows, size[0], device="cuda", dtype=torch.bfloat16)
    expected, found = emulated(x), other(x)
    assert (found.shape, found.dtype) == (expected.shape, torch.bfloat16)
    # The same FP8 numbers for "scaled_mm"; the others round the input or the weight in another way, or not at all.
    assert relative_error(found, expected) < (5e-3 if backend == "scaled_mm" else 0.05)
    assert other(x[:, :0]).shape == (1, 0, size[1])
    for dtype in (torch.float16, torch.float32):
        assert relative_error(other(x.to(dtype)), expected) < 0.05
        assert other(x.to(dtype)).dtype == dtype
    with torch.autocast("cuda", torch.bfloat16):
        assert other(x.float()).dtype == torch.bfloat16


@torch.no_grad()
def test_infinities_and_nan() -> None:
    needs("scaled_mm")
    emulated, fp8 = pair(64, 32, "scaled_mm")
    x = torch.randn(5, 64, device="cuda")
    x[1, 3], x[2, 4], x[3, 0] = math.inf, -math.inf, math.nan
    found = fp8(x)
    assert found[3].isnan().all()
    assert relative_error(found[[0, 1, 2, 4]], emulated(x)[[0, 1, 2, 4]]) < 1e-2
    assert fp8.infinities.item() == 2


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu"])
@torch.no_grad()
def test_mlp_in_a_graph(activation: str) -> None:
    needs("scaled_mm")
    hidden = 512 if activation == "swiglu" else 1024
    up, down = pair(256, 1024, "scaled_mm")[1], pair(hidden, 256, "scaled_mm")[1]
    emulated = [copy.deepcopy(m) for m in (up, down)]
    for linear in emulated:
        linear.backend = "emulated"
    x = torch.randn(3, 333, 256, device="cuda", dtype=torch.bfloat16)

    def run() -> Tensor:
        return mlp(passes(x).quantize(x), up, down, activation)

    expected = mlp(quantize(x), emulated[0], emulated[1], activation)
    assert relative_error(run(), expected) < 2e-2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(captured, run())


@pytest.mark.usefixtures("adapter")
class TestModel:
    @pytest.mark.parametrize("backend", ["scaled_mm", "weight_only", "te"])
    @torch.no_grad()
    def test_a_model(self, backend: Any) -> None:
        needs(backend)
        model = Toy(dim=64).cuda().eval()
        apply_lite3r(model, **SPARSE, precision="fp8_qat")
        trained = model(images().cuda())
        convert(model, fp8_backend=backend)
        assert describe(model).linears == {f"in FP8 ({backend})": 8}
        assert relative_error(model(images().cuda()), trained) < (1e-2 if backend == "scaled_mm" else 5e-2)

    @pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # the compiler's advice
    @pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # what is cached does not change
    @torch.no_grad()
    def test_auto_is_torch_and_compiles(self) -> None:
        needs("scaled_mm")
        model = apply_lite3r(Toy(dim=64).cuda().eval(), **SPARSE, precision="fp8")
        assert {m.backend for m in block_linears(model)} == {"scaled_mm"}
        expected = model(images().cuda())
        torch._dynamo.reset()
        model.compile()
        assert relative_error(model(images().cuda()), expected) < 1e-2
        torch._dynamo.reset()

    @torch.no_grad()
    def test_to_another_device_and_back(self) -> None:
        needs("scaled_mm")
        model = apply_lite3r(Toy(dim=64).cuda().eval(), **SPARSE, precision="fp8")
        expected = model(images().cuda()).cpu()
        model.cpu()
        with pytest.raises(BackendError, match=r"convert\(model\) again"):
            model(images())
        convert(model)(images())
        assert relative_error(convert(model.cuda())(images().cuda()).cpu(), expected) < 1e-6

    @torch.no_grad()
    def test_to_a_cpu(self) -> None:
        needs("scaled_mm")
        model = apply_lite3r(Toy(dim=64).cuda().eval(), **SPARSE, precision="fp8")
        expected = model(images().cuda()).cpu()
        assert relative_error(convert(model.cpu())(images()), expected) < 1e-2

    def test_peak_memory_of_loading(self, tmp_path: Any) -> None:
        """Onto the GPU through the meta device: never more than the FP8 weights and the rest."""
        model = apply_lite3r(Toy(dim=512, num_heads=8).cuda(), **SPARSE, precision="fp8")
        save_lite3r(model, tmp_path, whole=True)
        held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        del model
        with torch.device("meta"):
            empty = Toy(dim=512, num_heads=8)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loaded = load_lite3r(empty, tmp_path, device="cuda")
        assert torch.cuda.max_memory_allocated() - before < 1.1 * held + 2**16
        assert describe(loaded).peak_bytes == torch.cuda.max_memory_allocated()


def test_transformer_engine_trains_the_projection() -> None:
    needs("te")
    weight = nn.Parameter(0.1 * torch.randn(64, 64, device="cuda"))
    x = torch.randn(2, 3, 37, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out = te.TeProjection()(x, weight)
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    assert relative_error(out, x.float() @ weight.T) < 0.06
    grad = torch.randn_like(out)
    out.backward(grad)
    assert weight.grad is not None
    assert x.grad is not None
    assert weight.grad.dtype == torch.float32
    assert relative_error(weight.grad, grad.float().flatten(0, 2).T @ x.float().flatten(0, 2)) < 0.1
    assert relative_error(x.grad, grad.float() @ weight) < 0.1
    assert te.TeProjection()(x[:, :0], weight).shape == (2, 0, 37, 64)


@pytest.mark.usefixtures("adapter")
@pytest.mark.filterwarnings("ignore:Memory Efficient attention defaults to a non-deterministic")  # of dense attention, which torch chooses
def test_a_model_trains_in_transformer_engine() -> None:
    needs("te")
    model = apply_lite3r(
        Toy(dim=64).cuda().requires_grad_(False),
        **SPARSE,
        attention_backend="naive",
        linear_branch="all",
        precision="fp8_qat",
        fp8_backend="te",
    )
    assert not describe(model).notes
    projections = [m.proj_lin.weight for m in model.modules() if getattr(m, "te_projection", None) is not None]
    assert projections
    for weight in projections:
        weight.requires_grad_()
    model(images().cuda()).sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in projections)
    assert not any("extra_state" in key for key in model.state_dict())
