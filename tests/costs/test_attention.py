"""Costs of a device: known chips are not measured, unknown ones once, and never while a graph is made."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from cost_formula import SLOW

from lite3r_plugin import Lite3RConfig
from lite3r_plugin.costs import attention
from lite3r_plugin.costs.attention import H100, NEVER, CostTable, break_even
from lite3r_plugin.costs.model import AttentionCosts, SparseShares, break_even_of
from lite3r_plugin.costs.store import CostStore

GPU = torch.device("cuda", 0)


class Lab:
    """A process with one GPU, `SLOW` when it is measured; `count` of measurements, which are kept in `folder`."""

    def __init__(self, folder: Path, name: str = "NVIDIA X100/PCIe") -> None:
        self.count = 0
        self.table = CostTable(CostStore(folder), self.measure, lambda device: name)

    def measure(self, device: torch.device) -> AttentionCosts:
        self.count += 1
        return SLOW


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA GH200 480GB", "NVIDIA H200"])
def test_known_gpus_are_not_measured(tmp_path: Path, name: str) -> None:
    lab = Lab(tmp_path, name)
    assert lab.table.of(GPU) is H100
    assert lab.count == 0
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_gpu_is_measured_once_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lab = Lab(tmp_path)
    assert lab.table.of(GPU) == SLOW
    assert "measures once when sparse attention pays on NVIDIA X100/PCIe" in caplog.text
    caplog.clear()
    assert lab.table.of(GPU) == SLOW
    assert lab.count == 1
    another = Lab(tmp_path)  # another process
    assert another.table.of(GPU) == SLOW
    assert another.count == 0
    assert caplog.text == ""


def test_nothing_is_measured_while_a_graph_is_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lab = Lab(tmp_path)
    assert lab.table.of(GPU, may_measure=False) is H100
    assert lab.count == 0
    assert "NVIDIA X100/PCIe was never measured" in caplog.text
    assert "Run the model once before that, or set Lite3RConfig.dense_below" in caplog.text
    assert lab.table.of(GPU, may_measure=True) == SLOW
    assert lab.table.of(GPU, may_measure=False) == SLOW


def test_measurements_that_cannot_be_kept_are_used(tmp_path: Path) -> None:
    assert Lab(tmp_path / "no folder").table.of(GPU) == SLOW


def test_break_even_is_that_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = SparseShares.of(Lite3RConfig(keep_ratio=0.1), "site")
    monkeypatch.setattr(attention, "TABLE", Lab(tmp_path).table)
    assert break_even(GPU, *shares, may_measure=True) == break_even_of(SLOW, shares)


@pytest.mark.parametrize("device", ["cpu", "mps", "meta"])
def test_it_never_pays_without_a_cuda_gpu(device: str) -> None:
    assert break_even(torch.device(device), 1, 0, may_measure=True) is NEVER


def test_messages_go_to_the_packages_logger() -> None:
    assert attention.logger is logging.getLogger("lite3r_plugin.costs.attention")
