"""Measured costs explain the times that they were measured from."""

from __future__ import annotations

import pytest
import torch
from cost_formula import SLOW, modelled

from lite3r_plugin.costs.attention import H100
from lite3r_plugin.costs.measure import LONG, SHORT, fit, measure
from lite3r_plugin.costs.model import AttentionCosts


@pytest.mark.parametrize("costs", [H100, SLOW])
def test_the_fit_finds_the_costs(costs: AttentionCosts) -> None:
    times = [modelled(costs, *at) for at in ((LONG, None), (LONG, 0.1), (LONG, 0.5), (SHORT, 0.1))]
    found = fit(*times)
    assert vars(found) == pytest.approx(vars(costs))


@pytest.mark.gpu
def test_a_measurement_is_plausible() -> None:
    found = measure(torch.device("cuda", 0))
    assert 1e-9 < found.dense < 1e-6
    assert 0.5 < found.slowdown < 5
    assert found.per_call < 5
