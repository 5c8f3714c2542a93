"""The plain-torch definitions against formulas that are written out over all pairs of tokens, in FP64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pairs import grid
from torch import Tensor

from lite3r_plugin.ops.sla import naive
from lite3r_plugin.ops.sla.naive import phi

B, H, D = 2, 2, 8
BLOCK_Q, BLOCK_K = 32, 16
LENGTHS = (1, 16, 31, 97, 160)
EXACT: dict[str, Any] = dict(rtol=1e-11, atol=1e-11)


def qkv(tokens: int, batch: int = B, heads: int = H, dim: int = D, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [2 * torch.randn(batch, heads, tokens, dim, dtype=dtype) for _ in range(3)]


def some_map(tokens: int, kept: int) -> Tensor:
    """A random map: `kept` ascending key blocks for each query block."""
    rows, columns = -(-tokens // BLOCK_Q), -(-tokens // BLOCK_K)
    return torch.rand(B, H, rows, columns).argsort(-1)[..., :kept].sort(-1).values.int()


def split_map(tokens: int, kept: int, left_out: int) -> tuple[Tensor, Tensor]:
    """A random map of critical blocks, and one of at most `left_out` others that are negligible."""
    chosen = torch.rand(B, H, -(-tokens // BLOCK_Q), -(-tokens // BLOCK_K)).argsort(-1)[..., : kept + left_out].int()
    return chosen[..., :kept].sort(-1).values, chosen[..., kept:]


def critical_mask(kv_indices: Tensor, tokens: int, pinned: int) -> Tensor:
    """``[B, H, N, N]``: whether the key's block is critical for the query's block."""
    columns = -(-tokens // BLOCK_K)
    blocks = torch.zeros(*kv_indices.shape[:3], columns, dtype=torch.bool).scatter(-1, kv_indices.long(), True)
    blocks[:, :, :pinned] = True
    return blocks.repeat_interleave(BLOCK_Q, 2)[:, :, :tokens].repeat_interleave(BLOCK_K, 3)[..., :tokens]


def written_out(
    q: Tensor, k: Tensor, v: Tensor, critical: Tensor, negligible: Tensor, *, scale: float, linear: str, feature_map: str,
    proj: Tensor | None, means: bool,
) -> Tensor:  # fmt: skip
    """The module's formulas over all pairs. Block means: each token stands for its block's mean, so sums come out right."""
    mean_k, mean_v = (expand_means(x) for x in (k, v))
    near = (q @ k.mT * scale).masked_fill(~critical, -math.inf)
    by_means = (q @ mean_k.mT * scale).masked_fill(critical | negligible, -math.inf) if means else torch.full_like(near, -math.inf)
    weights = torch.cat((near, by_means), -1).softmax(-1)
    out = weights @ torch.cat((v, mean_v), -2)
    if linear != "none":
        assert proj is not None
        pairs = phi(q, feature_map) @ phi(k, feature_map).mT
        pairs = pairs if linear == "all" else pairs * ~(critical | negligible)
        total = pairs.sum(-1, keepdim=True)
        out = out + torch.where(total > 0, pairs @ v / total, 0) @ proj.mT
    return out


def expand_means(x: Tensor) -> Tensor:
    """Every token replaced by the mean of its block."""
    return torch.cat([block.mean(-2, keepdim=True).expand_as(block) for block in x.split(BLOCK_K, -2)], -2)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_all_blocks_kept_is_softmax_attention(tokens: int) -> None:
    q, k, v = qkv(tokens)
    out, _ = naive.sparse_linear_attention(q, k, v, some_map(tokens, -(-tokens // BLOCK_K)), block_q=BLOCK_Q, block_k=BLOCK_K)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), **EXACT)


@pytest.mark.parametrize(
    ("tokens", "means", "feature_map", "linear", "pinned", "left_out"),
    grid(LENGTHS, (False, True), ("softmax", "elu"), ("none", "all", "marginal"), (0, 1), (0, 3)),
)
def test_every_form_equals_its_formula(tokens: int, means: bool, feature_map: str, linear: str, pinned: int, left_out: int) -> None:
    q, k, v = qkv(tokens)
    proj = torch.randn(D, D, dtype=torch.float64) if linear != "none" else None
    kept = min(2, -(-tokens // BLOCK_K))
    kv_indices, negligible = split_map(tokens, kept, left_out)
    out, _ = naive.sparse_linear_attention(
        q, k, v, kv_indices, negligible=negligible, pinned=pinned, scale=0.3, linear=linear, feature_map=feature_map, proj=proj,
        block_means=means, block_q=BLOCK_Q, block_k=BLOCK_K,
    )  # fmt: skip
    critical = critical_mask(kv_indices, tokens, pinned)
    none = critical_mask(negligible, tokens, 0)
    expected = written_out(q, k, v, critical, none, scale=0.3, linear=linear, feature_map=feature_map, proj=proj, means=means)
    torch.testing.assert_close(out, expected, **EXACT)


def test_the_formula_tells_the_forms_apart() -> None:
    """Else the test above could not fail."""
    q, k, v = qkv(97)
    critical, negligible = (critical_mask(x, 97, 0) for x in split_map(97, 2, 2))
    proj = torch.randn(D, D, dtype=torch.float64)
    outs = [
        written_out(q, k, v, critical, left_out, scale=0.3, linear=linear, feature_map=feature_map, proj=proj, means=means)
        for linear in ("none", "all", "marginal")
        for feature_map in (("softmax",) if linear == "none" else ("softmax", "elu"))
        for means in (False, True)
        for left_out in ((negligible, torch.zeros_like(negligible)) if means or linear == "marginal" else (negligible,))
    ]
    assert all((a - b).abs().max() > 0.05 for i, a in enumerate(outs) for b in outs[:i])


@pytest.mark.parametrize("feature_map", ["softmax", "elu"])
def test_the_linear_branch_alone(feature_map: str) -> None:
    q, k, v = qkv(50)
    proj = torch.randn(D, D, dtype=torch.float64)
    pairs = phi(q, feature_map) @ phi(k, feature_map).mT
    expected = pairs @ v / pairs.sum(-1, keepdim=True) @ proj.mT
    torch.testing.assert_close(naive.linear_attention(q, k, v, proj=proj, feature_map=feature_map), expected, **EXACT)


def test_work_in_slabs_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(160)
    kv_indices, proj = some_map(160, 3), torch.randn(D, D, dtype=torch.float64)
    options = dict(pinned=2, linear="marginal", proj=proj, block_means=True, block_q=BLOCK_Q, block_k=BLOCK_K)
    whole, _ = naive.sparse_linear_attention(q, k, v, kv_indices, **options)
    monkeypatch.setattr(naive, "SLAB_BYTES", 1)
    torch.testing.assert_close(naive.sparse_linear_attention(q, k, v, kv_indices, **options)[0], whole, **EXACT)


@pytest.mark.parametrize("linear", ["none", "all", "marginal"])
@pytest.mark.parametrize("means", [False, True])
def test_gradients(linear: str, means: bool) -> None:
    q, k, v = (x[:1, :1, :, :4].clone().requires_grad_() for x in qkv(67))
    proj = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    kv_indices = some_map(67, 2)[:1, :1]

    def run(q: Tensor, k: Tensor, v: Tensor, proj: Tensor) -> Tensor:
        options = dict(
            pinned=1, linear=linear, proj=proj if linear != "none" else None, block_means=means, block_q=BLOCK_Q, block_k=BLOCK_K
        )
        return naive.sparse_linear_attention(q, k, v, kv_indices, **options)[0]

    assert torch.autograd.gradcheck(run, (q, k, v, proj), fast_mode=True)


def test_gradients_of_queries_without_a_marginal_block() -> None:
    """Pinned queries see everything exactly; their empty linear branch gives 0, not 0 / 0, also in FP32."""
    q, k, v = (x.float().requires_grad_() for x in qkv(67))
    proj = torch.randn(D, D, requires_grad=True)
    options = dict(pinned=1, linear="marginal", proj=proj, block_q=BLOCK_Q, block_k=BLOCK_K)
    out, _ = naive.sparse_linear_attention(q, k, v, some_map(67, 2), **options)
    assert all(x.isfinite().all() for x in torch.autograd.grad((100 * out).sum(), (q, k, v, proj)))
