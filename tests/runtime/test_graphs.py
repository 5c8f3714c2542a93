"""CUDA graphs: what is replayed is what was called."""

from __future__ import annotations

import pytest
import torch

from lite3r_plugin.runtime.device import peak
from lite3r_plugin.runtime.graphs import capture

pytestmark = pytest.mark.gpu


@torch.no_grad()
def test_a_replay_reads_the_inputs_anew() -> None:
    device = torch.device("cuda")
    linear, x = torch.nn.Linear(64, 64, device=device), torch.randn(8, 64, device=device)
    graph, out = capture(lambda: linear(x).relu(), device)
    assert peak(device)[0] > 0
    x.copy_(torch.randn(8, 64, device=device))
    graph.replay()
    assert torch.equal(out, linear(x).relu())


@torch.no_grad()
def test_what_waits_for_the_gpu_cannot_be_captured() -> None:
    x = torch.ones(8, device="cuda")
    with pytest.raises(RuntimeError):
        capture(lambda: x * x.sum().item(), torch.device("cuda"))
    assert torch.randn(8, device="cuda").isfinite().all()  # what draws random numbers works as before
