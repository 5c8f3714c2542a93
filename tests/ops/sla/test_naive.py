"""The plain-torch definitions against formulas that are written out over all pairs of tokens, in FP64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lite3r_plugin.errors import ConfigError
from lite3r_plugin.ops.block_map import block_map, density, kept_blocks, negligible_blocks
from lite3r_plugin.ops.qk_norm_rope import HeadNorm
from lite3r_plugin.ops.qk_norm_rope import naive as prepare
from lite3r_plugin.ops.sla import naive, sparse_linear_attention
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
    far = (q @ mean_k.mT * scale).masked_fill(critical | negligible, -math.inf) if means else torch.full_like(near, -math.inf)
    weights = torch.cat((near, far), -1).softmax(-1)
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
    out = naive.sparse_linear_attention(q, k, v, some_map(tokens, -(-tokens // BLOCK_K)), block_q=BLOCK_Q, block_k=BLOCK_K)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), **EXACT)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("means", [False, True])
@pytest.mark.parametrize("feature_map", ["softmax", "elu"])
@pytest.mark.parametrize("linear", ["none", "all", "marginal"])
@pytest.mark.parametrize("pinned", [0, 1])
@pytest.mark.parametrize("left_out", [0, 3])
def test_every_form_equals_its_formula(tokens: int, means: bool, feature_map: str, linear: str, pinned: int, left_out: int) -> None:
    q, k, v = qkv(tokens)
    proj = torch.randn(D, D, dtype=torch.float64) if linear != "none" else None
    kept = min(2, -(-tokens // BLOCK_K))
    kv_indices, negligible = split_map(tokens, kept, left_out)
    out = naive.sparse_linear_attention(
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
    whole = naive.sparse_linear_attention(q, k, v, kv_indices, **options)
    monkeypatch.setattr(naive, "SLAB_BYTES", 1)
    torch.testing.assert_close(naive.sparse_linear_attention(q, k, v, kv_indices, **options), whole, **EXACT)


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
        return naive.sparse_linear_attention(q, k, v, kv_indices, **options)

    assert torch.autograd.gradcheck(run, (q, k, v, proj), fast_mode=True)


def test_gradients_of_queries_without_a_marginal_block() -> None:
    """Pinned queries see everything exactly; their empty linear branch gives 0, not 0 / 0, also in FP32."""
    q, k, v = (x.float().requires_grad_() for x in qkv(67))
    proj = torch.randn(D, D, requires_grad=True)
    out = naive.sparse_linear_attention(q, k, v, some_map(67, 2), pinned=1, linear="marginal", proj=proj, block_q=BLOCK_Q, block_k=BLOCK_K)
    assert all(x.isfinite().all() for x in torch.autograd.grad((100 * out).sum(), (q, k, v, proj)))


# The pass before attention.


@pytest.mark.parametrize("tokens", LENGTHS)
def test_block_means_of_short_last_blocks(tokens: int) -> None:
    x = qkv(tokens)[0]
    expected = torch.stack([block.mean(-2) for block in x.split(BLOCK_K, -2)], -2)
    torch.testing.assert_close(prepare.block_means(x, BLOCK_K), expected, **EXACT)


def test_rotation_in_complex_numbers() -> None:
    """A half of size h turns element pairs (i, i + h/2) by position * base ** (-2i / h)."""
    x, positions = qkv(9)[0], torch.randint(0, 40, (B, 9, 2))
    h = D // 2
    speeds = torch.tensor([100 ** (-2 * i / h) for i in range(h // 2)], dtype=torch.float64)
    halves = []
    for axis, half in enumerate(x.chunk(2, -1)):
        turned = torch.complex(half[..., : h // 2], half[..., h // 2 :]) * torch.exp(1j * positions[:, None, :, axis, None] * speeds)
        halves += [turned.real, turned.imag]
    torch.testing.assert_close(prepare.rotate(x, positions, 100.0), torch.cat(halves, -1), **EXACT)


def test_scores_of_rotated_tokens_depend_on_their_distance_alone() -> None:
    q, k, _ = qkv(1)
    shift = torch.tensor([5, -3])

    def score(at: list[int], to: list[int], moved: Tensor) -> Tensor:
        a, b = (torch.tensor(p).expand(B, 1, 2) + moved for p in (at, to))
        return (prepare.rotate(q, a, 100.0) * prepare.rotate(k, b, 100.0)).sum(-1)

    torch.testing.assert_close(score([1, 2], [7, 4], 0 * shift), score([1, 2], [7, 4], shift), **EXACT)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms_order_and_means(kind: Any) -> None:
    q, k, v = qkv(97)
    order = torch.randperm(97).int()
    weight, bias = torch.randn(D, dtype=torch.float64), torch.randn(D, dtype=torch.float64)
    norm = HeadNorm(kind, weight, bias if kind == "layer" else None, 1e-5)
    result = prepare.prepare_qkv(q, k, v, order=order, q_norm=norm, block_q=BLOCK_Q, block_k=BLOCK_K)
    centred = q - q.mean(-1, keepdim=True) if kind == "layer" else q
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + (bias if kind == "layer" else 0)
    torch.testing.assert_close(result.q, normed[:, :, order.long()], **EXACT)
    assert torch.equal(result.k, k[:, :, order.long()])
    torch.testing.assert_close(result.q_mean, prepare.block_means(result.q, BLOCK_Q), **EXACT)
    torch.testing.assert_close(result.v_mean, prepare.block_means(v[:, :, order.long()], BLOCK_K), **EXACT)


# The block map.


@pytest.mark.parametrize(
    ("columns", "ratio", "pinned", "expected"), [(10, 0.3, 0, 3), (10, 0.01, 2, 3), (10, 0.5, 10, 10), (7, 0.1, 0, 1), (30, 0.1, 0, 3)]
)
def test_kept_blocks(columns: int, ratio: float, pinned: int, expected: int) -> None:
    assert kept_blocks(columns, ratio, pinned) == expected


@pytest.mark.parametrize("pinned", [0, 2])
def test_the_map_holds_the_best_blocks_and_the_pinned_ones(pinned: int) -> None:
    q_mean, k_mean = torch.randn(B, H, 5, D), torch.randn(B, H, 9, D)
    chosen, left_out = block_map(q_mean, k_mean, kept=4, pinned=pinned, negligible=3)
    scores = q_mean @ k_mean.mT
    scores[..., :pinned] = math.inf
    assert torch.equal(chosen, scores.topk(4).indices.sort().values.int())
    assert torch.equal(left_out, scores.topk(3, largest=False).indices.sort().values.int())
    assert block_map(q_mean, k_mean, kept=4, pinned=pinned)[1].shape == (B, H, 5, 0)


def test_of_equal_blocks_the_first_are_kept_and_the_last_negligible() -> None:
    chosen, left_out = block_map(torch.ones(1, 1, 1, D), torch.ones(1, 1, 9, D), kept=3, pinned=1, negligible=2)
    assert (chosen.tolist(), left_out.tolist()) == ([[[[0, 1, 2]]]], [[[[7, 8]]]])


def test_nan_scores_are_chosen_last() -> None:
    k_mean = torch.randn(1, 1, 4, D)
    k_mean[:, :, 2] = math.nan
    chosen, left_out = block_map(torch.randn(1, 1, 1, D), k_mean, kept=3, negligible=1)
    assert (chosen.tolist(), left_out.tolist()) == ([[[[0, 1, 3]]]], [[[[2]]]])


@pytest.mark.parametrize(
    ("columns", "ratio", "kept", "pinned", "expected"),
    [(10, 0.3, 4, 0, 3), (10, 0.3, 4, 2, 2), (10, 0.0, 1, 0, 0), (10, 1.0, 4, 3, 6), (10, 0.9, 10, 10, 0)],
)
def test_negligible_blocks(columns: int, ratio: float, kept: int, pinned: int, expected: int) -> None:
    assert negligible_blocks(columns, ratio, kept, pinned) == expected


def test_density_counts_what_is_computed() -> None:
    tokens, pinned = 16 * 20, 40
    kept = kept_blocks(20, 0.25, -(-pinned // 16))
    rows = [20 if row < -(-pinned // 32) else kept for row in range(10)]
    assert density(tokens, 0.25, pinned, 32, 16) == sum(rows) / (10 * 20)


# The whole operator.


def test_an_order_comes_back_undone() -> None:
    """With everything kept the order cannot be seen in the output."""
    q, k, v = qkv(97)
    out = sparse_linear_attention(q, k, v, keep_ratio=1.0, order=torch.randperm(97).int(), block_q=BLOCK_Q, block_k=BLOCK_K)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), **EXACT)


def test_the_order_decides_what_is_a_block() -> None:
    q, k, v = qkv(96)
    order = torch.randperm(96)
    options: dict[str, Any] = dict(keep_ratio=0.2, block_means=True, block_q=BLOCK_Q, block_k=BLOCK_K)
    by_hand = torch.empty_like(v)
    by_hand[:, :, order] = sparse_linear_attention(*(x[:, :, order] for x in (q, k, v)), **options)
    out = sparse_linear_attention(q, k, v, order=order.int(), **options)
    torch.testing.assert_close(out, by_hand, **EXACT)
    assert not torch.allclose(out, sparse_linear_attention(q, k, v, **options))


def test_pinned_tokens_see_all_and_all_see_them() -> None:
    q, k, v = qkv(160)
    options: dict[str, Any] = dict(keep_ratio=0.01, pinned_tokens=20, block_q=BLOCK_Q, block_k=BLOCK_K)
    out = sparse_linear_attention(q, k, v, **options)
    dense = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out[:, :, :20], dense[:, :, :20], **EXACT)
    assert not torch.allclose(out[:, :, BLOCK_Q:], dense[:, :, BLOCK_Q:])
    v[:, :, :20] += 1000.0
    assert (sparse_linear_attention(q, k, v, **options) - out).amin() > 0


def test_negligible_blocks_have_no_part() -> None:
    """Those with the lowest scores: their values may be anything. Where only critical blocks are left the branch is zero."""
    q, k, v = qkv(160)
    options: dict[str, Any] = dict(keep_ratio=0.3, pinned_tokens=0, block_q=BLOCK_Q, block_k=BLOCK_K)
    means = [prepare.block_means(x, block) for x, block in ((q, BLOCK_Q), (k, BLOCK_K))]
    left_out = block_map(*means, kept=3, negligible=2)[1].long()
    full: dict[str, Any] = dict(linear="marginal", proj=torch.randn(D, D, dtype=torch.float64), block_means=True)
    out = sparse_linear_attention(q, k, v, negligible_ratio=0.2, **full, **options)
    other = torch.full_like(v, 1000.0).unflatten(2, (10, BLOCK_K))
    for row in range(5):
        chosen = torch.zeros(B, H, 10, dtype=torch.bool).scatter(-1, left_out[:, :, row], True)
        changed = torch.where(chosen[..., None, None], other, v.unflatten(2, (10, BLOCK_K))).flatten(2, 3)
        block = slice(row * BLOCK_Q, (row + 1) * BLOCK_Q)
        again = sparse_linear_attention(q, k, changed, negligible_ratio=0.2, **full, **options)
        torch.testing.assert_close(again[:, :, block], out[:, :, block], **EXACT)
    nothing_else = sparse_linear_attention(q, k, v, negligible_ratio=1.0, **full, **options)
    torch.testing.assert_close(nothing_else, sparse_linear_attention(q, k, v, **options), **EXACT)


class LargestTensor(TorchDispatchMode):
    """The largest number of elements that any operator inside returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("linear", ["all", "marginal"])
def test_no_operator_makes_all_pairs(monkeypatch: pytest.MonkeyPatch, linear: str) -> None:
    monkeypatch.setattr(naive, "SLAB_BYTES", 1 << 20)
    tokens = 4096
    q, k, v = qkv(tokens, 1, 1, dtype=torch.float32)
    with LargestTensor() as largest:
        sparse_linear_attention(q, k, v, keep_ratio=0.1, pinned_tokens=64, linear=linear, proj=torch.eye(D), block_means=True)
    assert largest.elements < tokens * tokens / 8
    with LargestTensor() as dense:  # the mode does see such tensors
        (q @ k.mT).softmax(-1) @ v
    assert dense.elements >= tokens * tokens


def test_half_precision_is_computed_wide() -> None:
    """Logits in the hundreds and long sums: wrong in FP16 arithmetic, right up to the rounding of the result."""
    q, k, v = (x * scale for x, scale in zip(qkv(160, dtype=torch.float16), (8, 8, 1), strict=True))
    options: dict[str, Any] = dict(keep_ratio=0.3, linear="all", proj=torch.eye(D), block_q=BLOCK_Q, block_k=BLOCK_K)
    half, wide = (sparse_linear_attention(*(x.to(dtype) for x in (q, k, v)), **options) for dtype in (torch.float16, torch.float64))
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), wide, rtol=2e-3, atol=2e-3)


def test_autocast_does_not_reach_the_operator() -> None:
    q, k, v = qkv(97, dtype=torch.float32)
    options: dict[str, Any] = dict(keep_ratio=0.3, linear="marginal", proj=torch.eye(D), block_q=BLOCK_Q, block_k=BLOCK_K)
    expected = sparse_linear_attention(q, k, v, **options)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sparse_linear_attention(q, k, v, **options), expected)


@pytest.mark.parametrize("linear", ["all", "marginal"])
def test_a_linear_branch_without_its_matrix_is_an_error(linear: str) -> None:
    q, k, v = qkv(31)
    with pytest.raises(ConfigError, match=f"linear='{linear}' needs proj"):
        sparse_linear_attention(q, k, v, keep_ratio=0.5, linear=linear, block_q=BLOCK_Q, block_k=BLOCK_K)


def test_a_negative_scale_raises() -> None:
    q = torch.randn(1, 1, 8, 16)
    with pytest.raises(ConfigError, match="must not be negative"):
        sparse_linear_attention(q, q, q, keep_ratio=1.0, scale=-1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(keep_ratio=1.5), r"keep_ratio must be in \(0, 1\]"),
        (dict(negligible_ratio=float("nan")), "negligible_ratio must be"),
        (dict(feature_map="relu"), "feature_map must be one of"),
        (dict(backend="cuda"), "backend must be one of"),
        (dict(pinned_tokens=-1), "pinned_tokens must be in"),
        (dict(order=torch.arange(39)), "order names 39 tokens, but q has 40"),
        (dict(order=torch.arange(40).float()), "order is"),
        (dict(linear="all", proj=torch.eye(8)), r"proj is \[D, D\] = \[16, 16\]"),
        (dict(k=torch.randn(1, 1, 40, 16)), "must have the same shape"),
        (dict(k=torch.randn(1, 2, 39, 16)), "must have the same shape"),
        (dict(v=torch.ones(1, 2, 40, 16).long()), "floating-point"),
        (dict(positions=torch.zeros(39, 2)), "positions are"),
    ],
)
def test_what_the_operator_refuses(options: dict[str, Any], message: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 40, 16)
    with pytest.raises(ConfigError, match=message):
        sparse_linear_attention(**(dict(q=q, k=k, v=v, keep_ratio=0.5) | options))


def test_nothing_to_attend_to() -> None:
    for shape in ((0, 2, 40, 16), (1, 2, 0, 16)):
        assert sparse_linear_attention(*torch.randn(3, *shape), keep_ratio=0.5).shape == shape
