"""What `traced` sees of a forward: memory by when it is held and read, products, rows, waits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lite3r_plugin.runtime.trace import GRANULE, Trace, traced


def trace(model: nn.Module, *inputs: Tensor) -> Trace:
    with torch.no_grad(), traced(model) as seen:
        model(*inputs)
    return seen


class Chain(nn.Module):
    """Two tensors at once at most, each of 64 KiB, and one that is kept for nobody."""

    def forward(self, x: Tensor) -> Tensor:
        self_kept = x + 1  # noqa: F841
        y = x * 2
        y = y * 2
        return y * 2


def test_the_peak_counts_what_is_alive_at_once() -> None:
    seen = trace(Chain(), torch.rand(128, 128))
    assert seen.peak == 3 * 128 * 128 * 4
    assert [item.operator for item in seen.at_peak()] == ["add.Tensor", "mul.Tensor", "mul.Tensor"]
    assert [item.operator for item in seen.unused_at_peak()] == ["add.Tensor"]
    assert seen.operators == 4


def test_views_are_no_memory_and_no_read() -> None:
    class Views(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x + 1
            y.view(-1)[:3].transpose(0, 0)
            return x + 2

    seen = trace(Views(), torch.rand(8, 8))
    assert [item.operator for item in seen.held] == ["add.Tensor", "add.Tensor"]
    assert seen.held[0].read == seen.held[0].made
    assert {item.size for item in seen.held} == {GRANULE}


def test_what_is_written_in_place_is_one_tensor() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y += 1
            return y.relu_()

    seen = trace(InPlace(), torch.rand(8, 8))
    assert len(seen.held) == 1
    assert seen.held[0].read == 3


def test_products_and_rows_of_linears() -> None:
    seen = trace(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.rand(3, 5, 4))
    assert seen.rows == {"0": 15, "1": 15}
    assert sum(work.flops for work in seen.work.values()) == 2 * 15 * (4 * 8 + 8 * 2)


def test_waits_are_counted_by_module() -> None:
    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * int(x.max()) + x.nonzero().shape[0]

    assert trace(nn.Sequential(Waits()), torch.rand(3)).waits == {"0": 2}


def test_hooks_are_gone_also_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(RuntimeError):
        trace(model, torch.rand(3))
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
