"""The operators of `torch.library`: other tokens as keys, the log-sum-exp and masks in a graph, on both paths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sla_cases import DEVICE, random_proj, random_qkv
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from lite3r_plugin.ops import dispatch
from lite3r_plugin.ops.dispatch import triton_installed
from lite3r_plugin.ops.sla import KeyTokens, SegmentMask, operators, sparse_linear_attention
from lite3r_plugin.ops.sla.signature import Arguments

pytestmark = [
    pytest.mark.filterwarnings("ignore::lite3r_plugin.ops.dispatch.SlowPathWarning"),  # on a GPU
    pytest.mark.filterwarnings("ignore:.*deterministic"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # opcheck's own
]


@pytest.fixture(params=["naive", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path that calls take, interpreted where there is no GPU."""
    if request.param == "triton" and not triton_installed():
        pytest.skip("needs triton")
    monkeypatch.setattr(dispatch, "why_not_triton", lambda *_, **__: None if request.param == "triton" else "it is not wanted")
    return request.param


def a_call(queries: int, keys: int, backend: str, learns: bool = True, block_choice: str = "mean") -> dict[str, Any]:
    """Inputs, and options."""
    q, (_, k, v) = random_qkv(queries, 32, torch.float32, batch=1)[0], random_qkv(keys, 32, torch.float32, batch=1)
    inputs = {name: x.detach().clone().requires_grad_(learns) for name, x in dict(q=q, k=k, v=v, proj=random_proj(32)).items()}
    mask = SegmentMask(torch.arange(queries, device=DEVICE) // 9, torch.arange(keys, device=DEVICE) // 9)
    return inputs | dict(
        keep_ratio=0.3, order=torch.randperm(queries, device=DEVICE).int(), pinned_tokens=3, mask=mask, linear="marginal", block_means=True,
        keys=KeyTokens(torch.randperm(keys, device=DEVICE).int(), 2), block_q=32, block_k=16, return_lse=True, block_choice=block_choice,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "learns"),
    [("naive", False), ("naive", True), *(pytest.param("triton", learns, marks=pytest.mark.slow) for learns in (False, True))],
    indirect=["backend"],
)
def test_a_graph_gives_what_the_eager_call_gives(backend: str, learns: bool) -> None:
    """One graph for any number of queries and of keys, with gradients by way of output and log-sum-exp."""
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sparse_linear_attention, backend=graphs, fullgraph=True, dynamic=True)
    compilations = []
    for queries, keys in ((35, 51), (40, 67), (33, 90)):
        call = a_call(queries, keys, backend, learns)
        expected, found = sparse_linear_attention(**call), compiled(**call)
        torch.testing.assert_close(found, expected)
        compilations.append(graphs.frame_count)
        if learns:
            leaves = [call[name] for name in ("q", "k", "v", "proj")]
            grads = [torch.randn_like(x) for x in expected]
            flows = [torch.autograd.grad(results, leaves, grads) for results in (found, expected)]
            torch.testing.assert_close(*flows, rtol=1e-4, atol=1e-4)
    assert len(set(compilations)) == 1


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_the_kernels_choose_by_error_as_torch_operators_do(backend: str, learns: bool, masked: bool) -> None:
    """Output, log-sum-exp and gradients are those of the definition, with its block map."""
    call = a_call(70, 150, backend, learns, block_choice="error") | dict(mask=None)
    if masked:  # with frames in order, so that there are blocks to choose from
        mask = SegmentMask(torch.arange(70, device=DEVICE) // 16, torch.arange(150, device=DEVICE) // 40)
        call |= dict(mask=mask, order=None, keys=KeyTokens(pinned_tokens=2))
    leaves = [call[name] for name in ("q", "k", "v", "proj")]
    found, expected = sparse_linear_attention(**call), sparse_linear_attention(**call, backend="naive")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[0], sparse_linear_attention(**call | dict(block_choice="mean"))[0], rtol=1e-3, atol=1e-3)
    if learns:
        grads = [torch.randn_like(x) for x in expected]
        flows = [torch.autograd.grad(results, leaves, grads) for results in (found, expected)]
        torch.testing.assert_close(*flows, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["naive", pytest.param("triton", marks=pytest.mark.slow)], indirect=True)
def test_the_operators_keep_their_contracts(backend: str) -> None:
    call = a_call(33, 40, backend)
    keys, mask = call.pop("keys"), call.pop("mask")
    absent = dict.fromkeys(("q_weight", "q_bias", "k_weight", "k_bias", "positions", "q_kind", "k_kind", "rope_base", "scale"))
    arguments = Arguments(
        **call, **absent, negligible_ratio=0.2, q_eps=0.0, k_eps=0.0, feature_map="softmax", backend="auto", cross=True,
        key_order=keys.order, key_pinned_tokens=2, mask_queries=mask.queries, mask_keys=mask.keys, mask_before=mask.before,
        mask_after=mask.after, mask_sink=mask.sink,
    )  # fmt: skip
    torch.library.opcheck(operators.infer_lse, [x.detach() if isinstance(x, Tensor) else x for x in arguments])
    torch.library.opcheck(operators.train, ([x is not None for x in arguments.inputs], *arguments))
