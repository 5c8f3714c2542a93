"""The forward kernels against the definition: on a GPU as compiled, elsewhere in Triton's interpreter at small sizes."""

from __future__ import annotations

import math

import pytest
import torch
from numerics import assert_as_accurate
from pairs import costly
from sla_cases import BLOCKS, BRANCHES, DEVICE, DTYPES, GPU, LENGTHS, Branch, random_order, random_proj, random_qkv
from torch import Tensor

from lite3r_plugin.ops.block_map import kept_blocks, negligible_blocks
from lite3r_plugin.ops.block_map import naive as block_map_naive
from lite3r_plugin.ops.dispatch import why_not_triton
from lite3r_plugin.ops.sla import naive

prepare_kernels = pytest.importorskip("lite3r_plugin.ops.qk_norm_rope.kernels")
block_map_kernels = pytest.importorskip("lite3r_plugin.ops.block_map.kernels")
forward = pytest.importorskip("lite3r_plugin.ops.sla.kernels.forward")
linear_kernels = pytest.importorskip("lite3r_plugin.ops.sla.kernels.linear")
marginal_kernels = pytest.importorskip("lite3r_plugin.ops.sla.kernels.marginal")

FEW = 2 if GPU else 1  # batches or heads where others show that each is its own


def run_both(
    q: Tensor, k: Tensor, v: Tensor, order: Tensor, pinned_tokens: int, keep_ratio: float, branch: Branch, proj: Tensor,
    negligible_ratio: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(Triton result, torch result of the same dtype, torch result in FP64) for the same block map."""
    linear, feature_map, means = branch
    tokens, block_q, block_k = q.shape[-2], BLOCKS["block_q"], BLOCKS["block_k"]
    prepared = prepare_kernels.prepare_qkv(q, k, v, order=order, **BLOCKS)
    pinned_keys = -(-pinned_tokens // block_k)
    columns = -(-tokens // block_k)
    kept = kept_blocks(columns, keep_ratio, pinned_keys)
    negligible = negligible_blocks(columns, negligible_ratio, kept, pinned_keys)
    chosen = dict(kept=kept, pinned=pinned_keys, negligible=negligible)
    indices, _, skipped = block_map_kernels.block_map_with_bits(prepared.q_mean, prepared.k_mean, **chosen)
    left_out = block_map_naive.block_map(prepared.q_mean, prepared.k_mean, **chosen)[1]
    options = dict(
        pinned=-(-pinned_tokens // block_q), linear=linear, feature_map=feature_map, proj=proj if linear != "none" else None, **BLOCKS
    )
    got = forward.sparse_linear_attention(
        prepared.q, prepared.k, prepared.v, indices, tokens=tokens, bits=skipped, negligible=negligible, order=order,
        means=(prepared.k_mean, prepared.v_mean) if means else None, **options,
    )  # fmt: skip

    def by_definition(wide: bool) -> Tensor:
        ordered = [x[:, :, order.long()].double() if wide else x[:, :, order.long()] for x in (q, k, v)]
        out, _ = naive.sparse_linear_attention(*ordered, indices, negligible=left_out, block_means=means, **options)
        return torch.empty_like(out).index_copy(-2, order.long(), out)

    return got, by_definition(False), by_definition(True)


@pytest.mark.parametrize(("tokens", "dim", "dtype", "branch"), costly(LENGTHS, (64, 96) if GPU else (32,), DTYPES, BRANCHES), ids=str)
def test_sparse_linear_attention(tokens: int, dim: int, dtype: torch.dtype, branch: Branch) -> None:
    q, k, v = random_qkv(tokens, dim, dtype)
    if GPU and why_not_triton(q) is not None:
        pytest.skip(why_not_triton(q))
    assert_as_accurate(*run_both(q, k, v, random_order(tokens), min(tokens // 3, 20), 0.2, branch, random_proj(dim)))


@pytest.mark.parametrize(
    ("dtype", "negligible_ratio", "branch"), costly(DTYPES, (0.3, 1.0), [BRANCHES[1], BRANCHES[3], *BRANCHES[4:]]), ids=str
)
def test_negligible_blocks(dtype: torch.dtype, negligible_ratio: float, branch: Branch) -> None:
    """Some, and all that are not critical."""
    q, k, v = random_qkv(LENGTHS[-1], 32, dtype, batch=FEW)
    order, proj = random_order(q.shape[-2]), random_proj(32)
    assert_as_accurate(*run_both(q, k, v, order, 20, 0.2, branch, proj, negligible_ratio))


@pytest.mark.parametrize(("tokens", "branch"), costly(LENGTHS[:3], BRANCHES), ids=str)
def test_blocks_in_several_tiles(tokens: int, branch: Branch, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for wide FP32 heads: the last, partial block then ends in tiles without a single key."""
    monkeypatch.setitem(BLOCKS, "block_k", BLOCKS["block_q"])
    monkeypatch.setattr(linear_kernels, "LARGEST_TILE", 16)
    options = forward.launch_options
    monkeypatch.setattr(forward, "launch_options", lambda *shape: {**options(*shape), "TILE_K": 16, "TILE_Q": 16})
    q, k, v = random_qkv(tokens, 32, torch.float32, batch=FEW, heads=FEW)
    proj = random_proj(32)
    assert_as_accurate(*run_both(q, k, v, torch.arange(tokens, device=DEVICE).int(), 0, 0.2, branch, proj))


@pytest.mark.parametrize("case", ["equal scores", "huge logits", "constant keys"])
def test_adversarial_inputs(case: str) -> None:
    q, k, v = (x.clone() for x in random_qkv(LENGTHS[-2], 32, torch.float32))
    if case == "equal scores":
        q.zero_()
    elif case == "huge logits":
        q.mul_(1e3)
    else:
        k.copy_(k[:, :, :1].expand_as(k))
    tokens = q.shape[-2]
    result = run_both(q, k, v, torch.arange(tokens, device=DEVICE).int(), 0, 0.3, ("all", "softmax", True), torch.eye(32, device=DEVICE))
    assert_as_accurate(*result)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")  # in the interpreter, by the first launch
@pytest.mark.parametrize(("dtype", "bits"), costly([d for d in DTYPES if d != torch.float16], (60.0, 120.0, 1000.0)), ids=str)
def test_scores_far_above_the_reference(dtype: torch.dtype, bits: float) -> None:
    """2**bits of the softmax of some queries lies in the first key block, after the reference is taken from the last kept one."""
    q, k, v = (x.clone() for x in random_qkv(LENGTHS[-1], 32, dtype, batch=FEW))
    block = BLOCKS["block_k"]
    # Unequal, lest the weights be powers of two, which a softmax that is normed before it is rounded hits exactly.
    k[:, :, :block] = 1.0 + 0.1 * torch.randn_like(k[:, :, :block])
    q[:, 0, : q.shape[2] // 2] = bits * math.log(2) * 32**0.5 / 32  # the other queries, and the other head, stay as they were
    order = torch.arange(q.shape[2], device=DEVICE).int()
    for branch in (("none", "softmax", False), ("all", "softmax", True)):
        assert_as_accurate(*run_both(q, k, v, order, 0, 0.5, branch, torch.eye(32, device=DEVICE)))


@pytest.mark.parametrize(("linear", "dtype"), costly(("marginal", "all"), DTYPES), ids=str)
def test_a_branch_is_not_computed_while_its_projection_is_zero(linear: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its states hold what was in their memory, NaNs in tests, and the output is that without a branch, to the bit."""
    q, k, v = random_qkv(LENGTHS[-1], 32, dtype, batch=FEW)
    order, proj = random_order(q.shape[-2]), torch.zeros(32, 32, device=DEVICE)
    made: list[tuple[Tensor, Tensor]] = []
    own = {"marginal": forward.marginal_states, "all": forward.linear_state}[linear]
    monkeypatch.setattr(forward, own.__name__, lambda *args, **more: made.append(own(*args, **more)) or made[-1])

    def run(linear: str) -> Tensor:
        return run_both(q, k, v, order, 5, 0.2, (linear, "softmax", True), proj)[0]

    assert torch.equal(run(linear), run("none"))
    assert all(x.isnan().all() for x in made.pop())
    for value in (1e-20, torch.nan):  # one number that is not zero will do
        proj[31, 0] = value
        run(linear)
        assert not made.pop()[1].isnan().any()


@pytest.mark.parametrize(
    ("sizes", "dtype", "transposed"),
    costly([(1, 1, 32), (3, 33, 80), (130, 31, 32), (37, 170 if GPU else 70, 64)], DTYPES, (False, True)),
    ids=str,
)
def test_sums_over_marginal_pairs(sizes: tuple[int, int, int], dtype: torch.dtype, transposed: bool) -> None:
    """Whatever the unused bits of the last word are."""
    rows, columns, dim = sizes
    words = torch.randint(-(2**31), 2**31, (2, rows, -(-columns // 32)), device=DEVICE).int()
    marginal = (((words[..., None] >> torch.arange(32, device=DEVICE)) & 1) == 0).flatten(-2)[..., :columns]
    inner, outer = (rows, columns) if transposed else (columns, rows)
    states, totals = torch.randn(2, inner, dim, dim, device=DEVICE).to(dtype), torch.rand(2, inner, dim, device=DEVICE)
    into = torch.empty(2, outer, dim, dim, device=DEVICE, dtype=dtype), torch.empty(2, outer, dim, device=DEVICE)
    marginal_kernels.marginal_sums(words, states, totals, into, columns=columns, scale=0.3, transposed=transposed)
    pairs = (marginal.mT if transposed else marginal)[None]
    for got, x in zip(into, (states, totals), strict=True):
        exact = 0.3 * naive.over_marginal(pairs, x[None].double())[0]
        assert_as_accurate(got, exact.to(got.dtype), exact)


@pytest.mark.parametrize("dtype", [DTYPES[0], *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES[1:])], ids=str)
def test_states_of_marginal_blocks_in_groups_of_heads(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any grouping gives the same bits."""
    q, k, v = random_qkv(LENGTHS[-1] if GPU else 49, 32, dtype, heads=3)
    order, proj = random_order(q.shape[-2]), random_proj(32)
    branch = ("marginal", "softmax", False)
    whole, *others = run_both(q, k, v, order, 5, 0.2, branch, proj)
    assert_as_accurate(whole, *others)
    monkeypatch.setattr(marginal_kernels, "GROUP_BYTES", 1)
    for groups in (6, 4):
        monkeypatch.setattr(marginal_kernels, "MAX_GROUPS", groups)
        assert torch.equal(run_both(q, k, v, order, 5, 0.2, branch, proj)[0], whole)


def test_launches_and_memory_of_the_states_are_bounded() -> None:
    v = torch.empty(1, 16, 0, 64, dtype=torch.bfloat16)
    for columns, groups in ((687, 1), (21469, 3), (10**6, 16)):
        found = list(marginal_kernels.head_groups(16, columns, v))
        assert [i for some in found for i in range(16)[some]] == list(range(16))
        assert len(found) == groups


@pytest.mark.slow
def test_forward_is_deterministic() -> None:
    q, k, v = random_qkv(LENGTHS[-1], 32, DTYPES[0], batch=FEW)
    order, proj = random_order(q.shape[-2]), random_proj(32)
    results = [run_both(q, k, v, order, 5, 0.2, ("marginal", "softmax", True), proj)[0] for _ in range(3 if GPU else 2)]
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.gpu
def test_more_views_do_not_recompile() -> None:
    """Any length runs the same binary."""

    def binaries() -> int:
        kernels = (
            prepare_kernels._prepare_kernel, forward._sparse_linear_kernel, linear_kernels._linear_state_kernel,
            marginal_kernels._marginal_sums_kernel,
        )  # fmt: skip
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    proj = torch.eye(64, device=DEVICE)
    counts = []
    for views in (2, 3, 5, 8, 16):
        q, k, v = random_qkv(views * 261, 64, torch.bfloat16, batch=1)
        for linear in ("all", "marginal"):
            run_both(q, k, v, torch.arange(q.shape[-2], device=DEVICE).int(), 5, 0.2, (linear, "softmax", True), proj)
        counts.append(binaries())
    assert counts[0] == counts[-1]
