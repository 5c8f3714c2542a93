"""Peers run in processes of their own, on the same images, and what cannot run says why."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lite3r_plugin.adapter.plugins import find_model
from lite3r_plugin.bench import Bench, BenchModel
from lite3r_plugin.bench import peer_process as processes
from lite3r_plugin.bench.peers import PEERS, StridedKeys, Task, chosen
from lite3r_plugin.bench.table import markdown
from lite3r_plugin.errors import InputError
from lite3r_plugin.wrapper import Changes

TASK = Task("strided-keys", None, "testbed", [2, 5], 32, "cpu", 0, 1)

# The least that has the names of the forks.
FASTVGGT = """
import torch
from torch import nn

class VGGT(nn.Module):
    def __init__(self, merging=0):
        super().__init__()
        self.merging, self.point_head = merging, nn.Linear(1, 1)
        self.depth_head = nn.Linear(3, 1)

    def update_patch_dimensions(self, width, height):
        self.patches = width, height

    def forward(self, images):
        assert self.point_head is None
        assert self.patches == (images.shape[-1] // 14, images.shape[-2] // 14)
        print("a line that is nobody's")
        depth = self.depth_head(images.movedim(2, -1))
        return {"depth": depth * (1 if self.merging is None else 2)}
"""


@pytest.fixture
def fork(tmp_path: Path) -> Path:
    """A checkout of a fork of VGGT."""
    folder = tmp_path / "fork" / "vggt" / "models"
    folder.mkdir(parents=True)
    for package in (folder.parent, folder):
        (package / "__init__.py").write_text("")
    (folder / "vggt.py").write_text(FASTVGGT)
    return tmp_path / "fork"


class Attends(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=0.3)


def test_strided_keys_are_those_of_every_nth_view() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 5 * 7, 8)
    module = Attends()
    with Changes() as changes:
        StridedKeys(module, lambda: 5, stride=2).put_in(changes)
    kept = torch.cat([torch.arange(view * 7, view * 7 + 7) for view in (0, 2, 4)])
    expected = F.scaled_dot_product_attention(q, k[:, :, kept], v[:, :, kept], scale=0.3)
    torch.testing.assert_close(module(q, k, v), expected)
    with Changes() as changes:
        StridedKeys(module, lambda: 4, stride=2).put_in(changes)
    with pytest.raises(InputError, match="35 tokens, which are not alike in 4 views"):
        module(q, k, v)


def test_a_peer_is_measured_beside_its_own_dense_model() -> None:
    cells = list(processes.cells(TASK))
    assert [(cell.views, cell.status, cell.error) for cell in cells] == [(2, "ok", None), (5, "ok", None)]
    assert [cell.density for cell in cells] == [0.5, 0.4]
    for cell in cells:
        assert cell.finite
        assert 0 < cell.fidelity["depth_rel_l2"] < 0.1
        assert cell.winner is not None
        assert cell.winner.median_ms > 0
        assert "bfloat16" in cell.weight_bytes


@pytest.mark.slow
def test_a_peer_from_a_checkout_runs_in_a_process_of_its_own(fork: Path) -> None:
    bench = Bench(
        BenchModel("vggt", lambda: find_model("testbed").build("random")), [1, 2], [], resolution=28, device="cpu", repeats=1,
        peers=chosen(f"fastvggt={fork}", "vggt"),
    )  # fmt: skip
    report = bench.run()
    assert [(cell.variant, cell.views, cell.status, cell.error) for cell in report.cells] == [
        ("fastvggt", 1, "ok", None), ("fastvggt", 2, "ok", None),
    ]  # fmt: skip
    assert report.cells[0].fidelity["depth_rel_l2"] == pytest.approx(1, abs=0.02)
    assert report.conditions["variants"]["fastvggt"] == PEERS["fastvggt"].summary
    assert report.conditions["checkouts"] == {"fastvggt": None}
    assert json.loads(json.dumps(report.to_dict()))["cells"][1]["variant"] == "fastvggt"
    assert "| 2 | fastvggt | as it comes |" in markdown(report)


@pytest.mark.slow
def test_code_of_others_that_fails_is_a_result(fork: Path) -> None:
    broken = dataclasses.replace(TASK, peer="saf3r", checkout=str(fork), model="vggt")
    cells = list(processes.run(broken))  # in a process of its own: it imports from the checkout
    assert [cell.status for cell in cells] == ["skipped"] * 2
    assert "saf3r.models.official_vggt.models.vggt cannot be imported" in cells[0].error


def test_a_process_that_dies_or_is_late_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.Popen

    def instead(code: str) -> Any:
        return lambda command, **kwargs: real([command[0], "-c", code], **kwargs)

    monkeypatch.setattr(processes.subprocess, "Popen", instead("import sys; sys.exit('no room')"))
    assert [(cell.views, cell.status, cell.error) for cell in processes.run(TASK)] == [
        (views, "error", "its process ended with 1: no room") for views in (2, 5)
    ]
    monkeypatch.setattr(processes.subprocess, "Popen", instead("import time; time.sleep(60)"))
    assert {cell.error for cell in processes.run(TASK, timeout=1)} == {"the time budget left it 1 s, which were not enough"}


def test_without_time_a_peer_is_skipped() -> None:
    bench = Bench(BenchModel.of(find_model("testbed")), [1], [], device="cpu", time_budget=0, peers={"strided-keys": None})
    assert [(cell.status, cell.error) for cell in bench.run().cells] == [("skipped", "the time budget of 0 s was spent")]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("fastervggt", "unknown peer 'fastervggt'; known are strided-keys, "),
        ("strided-keys,strided-keys", "named twice"),
        ("strided-keys=/tmp", "it needs no checkout"),
        ("fastvggt", "clone mystorm16/FastVGGT and write fastvggt=PATH"),
        ("fastvggt=/no/such/folder", "there is no folder /no/such/folder"),
    ],
)
def test_peers_that_cannot_run_are_refused_before_any_work(wanted: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        chosen(wanted, "vggt")


def test_forks_of_vggt_are_for_vggt(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it is for vggt, not for testbed"):
        chosen(f"saf3r={tmp_path}", "testbed")
