"""Running a model: device, dtype, time, memory, density."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lite3r_plugin import Lite3RConfig, apply_lite3r, remove_lite3r
from lite3r_plugin.adapter.models import ModelEntry
from lite3r_plugin.adapter.plugins import find_model
from lite3r_plugin.errors import AdapterError, InputError
from lite3r_plugin.evaluation import choose_device, choose_dtype, merge, run_model, why_dense
from lite3r_plugin.scene.prediction import Prediction
from lite3r_plugin.testbed import Testbed, TestbedConfig

CPU = torch.device("cpu")


class Flat(nn.Module):
    """Depth is a product of the mean of the images, which autocast rounds; `calls` counts forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, 1), 1.001))
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        sys.stdout.write("a library that prints")
        return images.mean((1, 2, 3))[:, None] @ self.weight


def predict(model: Any, images: Tensor) -> Prediction:
    assert not torch.is_grad_enabled()
    views, _, height, width = images.shape
    depth = model(images).reshape(-1, 1, 1).expand(views, height, width)
    eye = torch.eye(3).expand(views, 3, 3)
    return Prediction(
        depth, torch.ones_like(depth), depth[..., None].expand(*depth.shape, 3), torch.eye(3, 4).expand(views, 3, 4), eye,
        images.permute(0, 2, 3, 1),
    )  # fmt: skip


FLAT = ModelEntry("flat", "", Flat, lambda pictures: torch.zeros(1, 3, 8, 8), predict)


def test_devices() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("no-such-device", "cuda:99"):
        with pytest.raises(InputError, match=f"'{name}' is not available"):
            choose_device(name)


def test_dtypes() -> None:
    assert choose_dtype("auto", CPU) == torch.float32
    assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert choose_dtype("float16", CPU) == torch.float16
    with pytest.raises(InputError, match="unknown dtype 'int8'"):
        choose_dtype("int8", CPU)


def test_runs_are_counted_timed_and_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    model, images = Flat(), torch.rand(2, 3, 8, 8)
    run = run_model(FLAT, model, images, torch.float32, repeats=3, warm_up=True)
    assert model.calls == 4
    assert len(run.times) == 3
    assert min(run.times) <= run.seconds <= max(run.times)
    assert run.density is None
    assert capsys.readouterr().out == ""
    torch.testing.assert_close(run.prediction.depth[:, 0, 0], images.mean((1, 2, 3)) * 1.001)
    both = merge([run, dataclasses.replace(run, times=(9.0,), peak_bytes=None)])
    assert both.times == (*run.times, 9.0)
    assert both.peak_bytes == run.peak_bytes


def test_the_dtype_is_that_of_the_computation() -> None:
    model, images = Flat(), torch.rand(2, 3, 8, 8)
    exact, rounded = (run_model(FLAT, model, images, dtype).prediction for dtype in (torch.float32, torch.bfloat16))
    assert 1e-5 < ((exact.depth - rounded.depth) / exact.depth).abs().max() < 1e-2
    assert rounded.depth.dtype == torch.float32


def test_memory_that_does_not_suffice_is_explained() -> None:
    def fail(model: nn.Module, images: Tensor) -> Prediction:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")

    with pytest.raises(InputError, match="2 views do not fit into the memory of cpu"):
        run_model(dataclasses.replace(FLAT, predict=fail), Flat(), torch.rand(2, 3, 8, 8), torch.float32)


def test_density_is_that_of_the_sites_that_may_be_sparse() -> None:
    entry, images = find_model("testbed"), torch.rand(3, 3, 64, 64)
    model = Testbed(TestbedConfig(dim=64, head_dim=32, depth=1, stem=8)).eval()
    densities = []
    for dense_below in (10**9, 0):
        apply_lite3r(model, keep_ratio=0.25, dense_below=dense_below, block_q=16, block_k=16)
        densities.append(run_model(entry, model, images, torch.float32).density)
        remove_lite3r(model)
    assert densities[0] == 1
    assert 0 < densities[1] < 1


def test_density_is_that_of_this_run() -> None:
    """Also where earlier ones were sparse and this one is too short."""
    entry = find_model("testbed")
    model = apply_lite3r(Testbed(TestbedConfig(dim=64, head_dim=32, depth=1, stem=8)).eval(), dense_below=150, block_q=16, block_k=16)
    densities = [run_model(entry, model, torch.rand(views, 3, 64, 64), torch.float32).density for views in (3, 1, 3)]
    assert densities[0] < 1 == densities[1]
    assert densities[2] == densities[0]


@pytest.mark.parametrize(
    ("fields", "density", "reason"),
    [
        ({}, 0.5, None),
        ({}, None, None),
        ({}, 1.0, "without a CUDA GPU"),
        ({"keep_ratio": 1.0}, 1.0, "keep_ratio is 1"),
        ({"keep_ratio": {"a": 1.0, "*": 1}}, 1.0, "keep_ratio is 1"),
        ({"dense_below": 0}, 1.0, "dense_below=0"),
    ],
)
def test_why_nothing_was_sparse(fields: dict[str, Any], density: float | None, reason: str | None) -> None:
    found = why_dense(density, Lite3RConfig(**fields), CPU)
    assert found is reason is None or reason in found


def test_a_prediction_of_another_kind_is_refused() -> None:
    with pytest.raises(AdapterError, match="predict of the model 'flat' returned Tensor, not a Prediction"):
        run_model(dataclasses.replace(FLAT, predict=lambda model, images: images), Flat(), torch.rand(2, 3, 8, 8), torch.float32)


def test_a_device_without_data_is_not_available() -> None:
    with pytest.raises(InputError, match="'meta' is not available"):
        choose_device("meta")
