"""Where a site runs dense attention on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lite3r_plugin import AttentionSite, Lite3RConfig, Routed
from lite3r_plugin.attention.inputs import AttentionInputs
from lite3r_plugin.attention.module import SparseLinearAttention
from lite3r_plugin.attention.state import ModelState
from lite3r_plugin.ops.qk_norm_rope import HeadNorm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_norms_learn_where_a_site_runs_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though their queries and keys do not."""
    monkeypatch.setattr("lite3r_plugin.attention.module.use_triton", lambda backend, v: backend != "naive")
    site = AttentionSite("site", "global", 32, Routed())
    module = SparseLinearAttention(nn.Linear(1, 1), site, ModelState("test", Lite3RConfig()), sparse=True)
    weight = torch.ones(32, device=DEVICE, requires_grad=True)
    q, k, v = torch.randn(3, 1, 2, 50, 32, device=DEVICE).unbind(0)
    out = module.dense(AttentionInputs(q, k, v, q_norm=HeadNorm("rms", weight, None, 1e-6)))
    assert torch.autograd.grad(out.square().sum(), weight)[0].norm() > 0
