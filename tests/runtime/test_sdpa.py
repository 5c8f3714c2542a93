"""The choice of the dense attention backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lite3r_plugin.runtime.sdpa import BACKENDS, fastest_sdpa, sdpa_backend


def test_there_is_no_choice_on_the_cpu() -> None:
    q = torch.randn(1, 2, 16, 8)
    assert fastest_sdpa(q) == ("default", {})
    before = F.scaled_dot_product_attention(q, q, q)
    with sdpa_backend("default"):
        assert torch.equal(F.scaled_dot_product_attention(q, q, q), before)


@pytest.mark.parametrize("name", BACKENDS)
def test_where_the_preferred_backend_cannot_run_others_do(name: str) -> None:
    q = torch.randn(1, 2, 16, 8)
    with sdpa_backend(name):
        torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q), (q @ q.mT / 8**0.5).softmax(-1) @ q)


@pytest.mark.gpu
def test_the_choice_is_one_that_runs() -> None:
    name, times = fastest_sdpa(torch.randn(1, 8, 1000, 64, device="cuda", dtype=torch.bfloat16))
    assert isinstance(times[name], float)
    assert times[name] <= min(t for t in times.values() if isinstance(t, float)) / 0.95
    assert fastest_sdpa(torch.randn(1, 8, 1000, 64, device="cuda", dtype=torch.float64))[0] == "default"
