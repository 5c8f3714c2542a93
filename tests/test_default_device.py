"""Whatever the default device is, tensors are made where their inputs are: on the meta device, which has no values, nothing is made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lite3r_plugin import apply_lite3r, calibrate, convert, describe, lite3r_disabled, load_lite3r, remove_lite3r, save_lite3r
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.ops.fp8 import passes
from lite3r_plugin.ops.sla import sparse_linear_attention
from lite3r_plugin.runtime.exact import TableRope, token_positions
from lite3r_plugin.testbed import Testbed, TestbedConfig
from lite3r_plugin.testing import TEST_CONFIG

IMAGES = torch.rand(1, 3, 3, 48, 64, generator=torch.Generator().manual_seed(0))


def sparse(**fields: Any) -> nn.Module:
    torch.manual_seed(0)
    model = Testbed(TestbedConfig(dim=64, depth=2, stem=16)).eval()
    apply_lite3r(model, TEST_CONFIG, **fields)
    for site in lite3r_modules(model).values():
        if site.sparse:
            nn.init.normal_(site.proj_lin.weight)
    return model


def depth(model: nn.Module) -> Tensor:
    return model(IMAGES)["depth"]


def trained(model: nn.Module) -> Tensor:
    depth(model).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def calibrated(model: nn.Module) -> Tensor:
    calibrate(model, [IMAGES, 1 - IMAGES])
    return depth(model)


def converted(model: nn.Module) -> Tensor:
    convert(model)
    model.to(torch.bfloat16).float()
    describe(model)
    return depth(model)


def dense(model: nn.Module) -> Tensor:
    with lite3r_disabled(model):
        out = depth(model)
    return torch.cat((out, depth(remove_lite3r(model))))


@pytest.mark.parametrize("run", [depth, trained, calibrated, converted, dense])
@pytest.mark.parametrize(
    "fields", [{}, {"linear_branch": "marginal", "block_means": True}, {"fuse": False}, {"precision": "fp8_qat"}], ids=str
)
def test_models(run: Callable[[nn.Module], Tensor], fields: dict[str, Any]) -> None:
    expected, model = run(sparse(**fields)), sparse(**fields)
    with torch.device("meta"):
        found = run(model)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("precision", ["full", "fp8"])
def test_apply_and_checkpoints(tmp_path: Path, precision: str) -> None:
    model, other = sparse(precision=precision), Testbed(TestbedConfig(dim=64, depth=2, stem=16)).eval()
    other.load_state_dict({k: v for k, v in sparse().state_dict().items() if "proj_lin" not in k})
    with torch.device("meta"):
        save_lite3r(model, tmp_path)
        load_lite3r(other, tmp_path)
        torch.testing.assert_close(depth(other), depth(model))
    assert not any(tensor.is_meta for tensor in (*other.parameters(), *other.buffers()))


@pytest.mark.parametrize("linear", ["none", "all", "marginal"])
@pytest.mark.parametrize("pinned_tokens", [0, 20])
def test_operators(linear: str, pinned_tokens: int) -> None:
    q, k, v, proj = (torch.randn(*shape) for shape in [(1, 2, 70, 16)] * 3 + [(16, 16)])
    outputs = []
    for scope in (contextlib.nullcontext(), torch.device("meta")):
        with scope:
            out = sparse_linear_attention(
                q, k, v, keep_ratio=0.3, negligible_ratio=0.2, linear=linear, proj=proj, block_means=True, block_q=16, block_k=16,
                pinned_tokens=pinned_tokens,
            )  # fmt: skip
            rows = passes(v).gelu_quantize(out, "none")
            outputs.append((out, rows.data.float(), rows.scale))
    torch.testing.assert_close(*outputs)


def test_positions_and_tables() -> None:
    token_positions.cache_clear()
    with torch.device("meta"):
        positions = token_positions(2, 3, 4, 1, torch.device("cpu"))
        table = TableRope(8, 100.0, torch.zeros(1, device="cpu"))
    assert positions.device == table.cos.device == torch.device("cpu")
    assert positions[0, :3].tolist() == [[0, 0], [1, 1], [1, 2]]
