"""The plain-torch definitions against formulas that are written out over all pairs of tokens, in FP64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pairs import grid
from torch import Tensor

from lite3r_plugin.errors import ConfigError
from lite3r_plugin.ops.block_map import SegmentMask, masked_block_map
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
    return split_map(tokens, tokens, kept, 0)[0]


def split_map(queries: int, keys: int, kept: int, left_out: int) -> tuple[Tensor, Tensor]:
    """A random map of critical blocks, and one of at most `left_out` others that are negligible."""
    chosen = torch.rand(B, H, -(-queries // BLOCK_Q), -(-keys // BLOCK_K)).argsort(-1)[..., : kept + left_out].int()
    return chosen[..., :kept].sort(-1).values, chosen[..., kept:]


def critical_mask(kv_indices: Tensor, queries: int, keys: int, pinned: int) -> Tensor:
    """``[B, H, M, N]``: whether the key's block is critical for the query's block."""
    columns = -(-keys // BLOCK_K)
    blocks = torch.zeros(*kv_indices.shape[:3], columns, dtype=torch.bool).scatter(-1, kv_indices.long(), True)
    blocks[:, :, :pinned] = True
    return blocks.repeat_interleave(BLOCK_Q, 2)[:, :, :queries].repeat_interleave(BLOCK_K, 3)[..., :keys]


def written_out(
    q: Tensor, k: Tensor, v: Tensor, critical: Tensor, negligible: Tensor, *, scale: float, linear: str, feature_map: str,
    proj: Tensor | None, means: bool, visible: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The module's formulas over all pairs: output and log-sum-exp. Block means: each token stands for its block's mean, so sums come
    out right."""
    mean_k, mean_v = (expand_means(x) for x in (k, v))
    near = (q @ k.mT * scale).masked_fill(~critical, -math.inf)
    by_means = (q @ mean_k.mT * scale).masked_fill(critical | negligible, -math.inf) if means else torch.full_like(near, -math.inf)
    scores = torch.cat((near, by_means), -1)
    weights = scores.softmax(-1).nan_to_num(0.0)  # of no key at all
    out = weights @ torch.cat((v, mean_v), -2)
    if linear != "none":
        assert proj is not None
        pairs = phi(q, feature_map) @ phi(k, feature_map).mT
        if linear == "marginal":
            pairs = pairs * ~(critical | negligible)
        elif visible is not None:
            pairs = pairs * visible
        total = pairs.sum(-1, keepdim=True)
        out = out + torch.where(total > 0, pairs @ v / total, 0) @ proj.mT
    return out, scores.exp().sum(-1).log()


def expand_means(x: Tensor) -> Tensor:
    """Every token replaced by the mean of its block."""
    return torch.cat([block.mean(-2, keepdim=True).expand_as(block) for block in x.split(BLOCK_K, -2)], -2)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_all_blocks_kept_is_softmax_attention(tokens: int) -> None:
    q, k, v = qkv(tokens)
    out, _ = naive.sparse_linear_attention(q, k, v, some_map(tokens, -(-tokens // BLOCK_K)), block_q=BLOCK_Q, block_k=BLOCK_K)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), **EXACT)


@pytest.mark.parametrize(
    ("tokens", "keys", "means", "feature_map", "linear", "pinned", "left_out"),
    grid(LENGTHS, (None, 5, 67, 144), (False, True), ("softmax", "elu"), ("none", "all", "marginal"), (0, 1), (0, 3)),
)
def test_every_form_equals_its_formula(
    tokens: int, keys: int | None, means: bool, feature_map: str, linear: str, pinned: int, left_out: int
) -> None:  # fmt: skip
    """With as many keys as queries, fewer and more."""
    keys = keys or tokens
    q, (_, k, v) = qkv(tokens)[0], qkv(keys)
    proj = torch.randn(D, D, dtype=torch.float64) if linear != "none" else None
    kept = min(2, -(-keys // BLOCK_K))
    kv_indices, negligible = split_map(tokens, keys, kept, left_out)
    options: dict[str, Any] = dict(
        negligible=negligible, pinned=pinned, scale=0.3, linear=linear, feature_map=feature_map, proj=proj, block_means=means,
        block_q=BLOCK_Q, block_k=BLOCK_K,
    )  # fmt: skip
    out, nothing = naive.sparse_linear_attention(q, k, v, kv_indices, **options)
    same, lse = naive.sparse_linear_attention(q, k, v, kv_indices, **options, return_lse=True)
    assert nothing is None
    critical, none = critical_mask(kv_indices, tokens, keys, pinned), critical_mask(negligible, tokens, keys, 0)
    expected = written_out(q, k, v, critical, none, scale=0.3, linear=linear, feature_map=feature_map, proj=proj, means=means)
    for found in ((out, lse), (same, lse)):
        torch.testing.assert_close(found, expected, **EXACT)


def frames_of(tokens: int, layout: str) -> Tensor:
    """The frame of each token: frames of odd lengths in turn; or the special tokens of all of them first; or none in order."""
    frames = torch.arange(tokens) * 5 // tokens
    if layout == "special first":
        return torch.cat((torch.arange(5)[: tokens // 2], frames[min(5, tokens // 2) :]))
    return frames if layout == "in turn" else frames[torch.randperm(tokens)]


MASKS = dict(
    causal=(None, 0, -1), window=(1, 1, -1), causal_window=(1, 0, -1), block_diagonal=(0, 0, -1), nothing=(-9, None, -1), sink=(1, 0, 1)
)


@pytest.mark.parametrize(
    ("lengths", "layout", "kind", "means", "linear", "pinned", "left_out"),
    grid(
        ((97, 97), (160, 160), (31, 144), (100, 40)), ("in turn", "special first", "mixed"), list(MASKS), (False, True),
        ("none", "all", "marginal"), (0, 1), (0.0, 0.5),
    ),
)  # fmt: skip
def test_every_form_with_a_mask_equals_its_formula(
    lengths: tuple[int, int], layout: str, kind: str, means: bool, linear: str, pinned: int, left_out: float
) -> None:  # fmt: skip
    """Over the pairs that may see each other; queries of the last see nothing."""
    queries, keys = lengths
    before, after, sink = MASKS[kind]
    q, (_, k, v) = qkv(queries)[0], qkv(keys)
    of_queries, of_keys = frames_of(queries, layout), frames_of(keys, layout)
    mask = SegmentMask(of_queries, of_keys, before, after, None if sink < 0 else sink).ordered(None, None)
    distance = of_keys - of_queries[:, None]
    visible = ((distance >= (-9 if before is None else -before)) | (of_keys <= sink)) & (distance <= (9 if after is None else after))
    blocks = mask.in_blocks(BLOCK_Q, BLOCK_K)
    kv_indices, negligible = masked_block_map(
        *(x.mean(2, keepdim=True) * torch.randn(B, H, -(-n // block), 1) for x, n, block in ((q, queries, BLOCK_Q), (k, keys, BLOCK_K))),
        keep_ratio=0.3, mask=blocks, negligible_ratio=left_out,
    )  # fmt: skip
    proj = torch.randn(D, D, dtype=torch.float64) if linear != "none" else None
    out = naive.sparse_linear_attention(
        q, k, v, kv_indices, negligible=negligible, mask=mask, pinned=pinned, scale=0.3, linear=linear, proj=proj, block_means=means,
        block_q=BLOCK_Q, block_k=BLOCK_K, return_lse=True,
    )  # fmt: skip
    critical, none = (listed_mask(x, queries, keys, pinned if x is kv_indices else 0) for x in (kv_indices, negligible))
    whole = whole_blocks(visible)
    near = critical & visible
    expected = written_out(
        q, k, v, near, ~near & ~(whole & ~critical & ~none), scale=0.3, linear=linear, feature_map="softmax", proj=proj, means=means,
        visible=visible,
    )  # fmt: skip
    torch.testing.assert_close(out, expected, **EXACT)


def listed_mask(kv_indices: Tensor, queries: int, keys: int, pinned: int) -> Tensor:
    """`critical_mask` of a map in which -1 stands for none."""
    columns = -(-keys // BLOCK_K)
    with_one_more = torch.where(kv_indices < 0, columns, kv_indices)
    return critical_mask(with_one_more, queries, (columns + 1) * BLOCK_K, pinned)[..., :keys]


def whole_blocks(visible: Tensor) -> Tensor:
    """``[M, N]``: whether the queries and keys of the blocks of a pair may all see each other."""
    result = torch.empty_like(visible)
    for i in range(0, len(visible), BLOCK_Q):
        for j in range(0, visible.shape[1], BLOCK_K):
            result[i : i + BLOCK_Q, j : j + BLOCK_K] = visible[i : i + BLOCK_Q, j : j + BLOCK_K].all()
    return result


def test_the_formula_tells_the_forms_apart() -> None:
    """Else the test above could not fail."""
    q, k, v = qkv(97)
    critical, negligible = (critical_mask(x, 97, 97, 0) for x in split_map(97, 97, 2, 2))
    proj = torch.randn(D, D, dtype=torch.float64)
    outs = [
        written_out(q, k, v, critical, left_out, scale=0.3, linear=linear, feature_map=feature_map, proj=proj, means=means)[0]
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

    def run(q: Tensor, k: Tensor, v: Tensor, proj: Tensor) -> Any:
        options = dict(
            pinned=1, linear=linear, proj=proj if linear != "none" else None, block_means=means, block_q=BLOCK_Q, block_k=BLOCK_K
        )
        return naive.sparse_linear_attention(q, k, v, kv_indices, **options, return_lse=True)

    assert torch.autograd.gradcheck(run, (q, k, v, proj), fast_mode=True)


def test_gradients_of_queries_without_a_marginal_block() -> None:
    """Pinned queries see everything exactly; their empty linear branch gives 0, not 0 / 0, also in FP32."""
    q, k, v = (x.float().requires_grad_() for x in qkv(67))
    proj = torch.randn(D, D, requires_grad=True)
    options = dict(pinned=1, linear="marginal", proj=proj, block_q=BLOCK_Q, block_k=BLOCK_K)
    out, _ = naive.sparse_linear_attention(q, k, v, some_map(67, 2), **options)
    assert all(x.isfinite().all() for x in torch.autograd.grad((100 * out).sum(), (q, k, v, proj)))


def parts_of(q: Tensor, k: Tensor, v: Tensor, bounds: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and log-sum-exps over parts of the keys, each with all of its blocks but one at most."""
    found = []
    for first, last in itertools.pairwise(bounds):
        kept = max(1, -(-(last - first) // BLOCK_K) - 1)
        kv_indices = torch.arange(kept).expand(B, H, -(-q.shape[-2] // BLOCK_Q), kept)
        options: dict[str, Any] = dict(block_means=True, block_q=BLOCK_Q, block_k=BLOCK_K, return_lse=True)
        found.append(naive.sparse_linear_attention(q, k[:, :, first:last], v[:, :, first:last], kv_indices, **options))
    return [out for out, _ in found], [lse for _, lse in found]


def test_parts_of_the_keys_are_merged_as_if_attended_to_at_once() -> None:
    """Parts that end with blocks, in which all but the last block of each are critical and that one is a mean."""
    q, (_, k, v) = qkv(41)[0], qkv(150)
    bounds = (0, 48, 96, 150)
    critical = torch.tensor([0, 1, 3, 4, 6, 7, 8]).expand(B, H, 2, 7)
    whole = naive.sparse_linear_attention(q, k, v, critical, block_means=True, block_q=BLOCK_Q, block_k=BLOCK_K, return_lse=True)
    torch.testing.assert_close(naive.merge(*parts_of(q, k, v, bounds)), whole, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_merging_is_done_wide(dtype: torch.dtype) -> None:
    """Also of log-sum-exps whose exponentials FP32 cannot hold, and far apart."""
    outputs = list(torch.randn(3, 2, 5, D, dtype=torch.float64).to(dtype))
    lses = list(torch.tensor([[700.0], [-700.0], [701.0]]) + torch.rand(3, 10))
    lses = [lse.view(2, 5) for lse in lses]
    out, lse = naive.merge(outputs, lses)
    weights = torch.stack(lses).double().softmax(0)
    exact = (weights[..., None] * torch.stack(outputs).double()).sum(0)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(lse.double(), torch.stack(lses).double().logsumexp(0), rtol=1e-6, atol=0)


def test_parts_without_keys_have_no_part() -> None:
    """Whatever their outputs hold; queries that saw no key at all get zeros. Gradients are finite."""
    first, second = torch.randn(2, 4, D, requires_grad=True), torch.full((2, 4, D), math.nan, requires_grad=True)
    lses = torch.zeros(2, 2, 4)
    lses[1], lses[:, :, 1] = -math.inf, -math.inf
    lses.requires_grad_()
    out, lse = naive.merge([first, second], list(lses))
    expected = first.detach().clone()
    expected[:, 1] = 0
    assert torch.equal(out, expected)
    assert torch.equal(lse, lses[0])
    seen = torch.tensor([0, 2, 3])
    for x in torch.autograd.grad((out.sum() + lse[:, seen].sum()), (first, second, lses)):
        assert x.isfinite().all()


def test_gradients_through_a_merge() -> None:
    outputs = [torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: naive.merge(x[:3], x[3:]), (*outputs, *lses))


@pytest.mark.parametrize(
    ("outputs", "lses", "message"),
    [
        ([], [], "at least one, got 0 and 0"),
        ([torch.ones(2, D)], [], "got 1 and 0"),
        ([torch.ones(2, D)], [torch.ones(2, 1)], r"got \[2, 8\] and \[2, 1\]"),
        ([torch.ones(2, D), torch.ones(3, D)], [torch.ones(2), torch.ones(3)], "the first output has"),
    ],
)
def test_what_merge_refuses(outputs: list[Tensor], lses: list[Tensor], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        naive.merge(outputs, lses)
