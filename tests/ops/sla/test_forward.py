"""Triton kernels against their naive twins: on a GPU as compiled, elsewhere in Triton's interpreter at small sizes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from numerics import assert_as_accurate
from torch import Tensor

from lite3r_plugin.errors import BackendError
from lite3r_plugin.ops.block_map import kept_blocks, negligible_blocks
from lite3r_plugin.ops.block_map import naive as block_map_naive
from lite3r_plugin.ops.dispatch import why_not_triton
from lite3r_plugin.ops.qk_norm_rope import HeadNorm
from lite3r_plugin.ops.qk_norm_rope import naive as prepare_naive
from lite3r_plugin.ops.sla import naive as sla_naive
from lite3r_plugin.ops.sla import sparse_linear_attention

prepare_kernels = pytest.importorskip("lite3r_plugin.ops.qk_norm_rope.kernels")
block_map_kernels = pytest.importorskip("lite3r_plugin.ops.block_map.kernels")
sla_kernels = pytest.importorskip("lite3r_plugin.ops.sla.kernels")
linear_kernels = pytest.importorskip("lite3r_plugin.ops.sla.linear_kernels")
marginal_kernels = pytest.importorskip("lite3r_plugin.ops.sla.marginal_kernels")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BLOCKS = dict(block_q=128, block_k=64) if GPU else dict(block_q=32, block_k=16)
LENGTHS = (1, 63, 257, 1374, 5497) if GPU else (1, 15, 97)
# tl.dot of bfloat16 is wrong in Triton's interpreter
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if GPU else (torch.float16, torch.float32)
DIMS = (64, 80) if GPU else (32, 80)
BRANCHES = [("none", "softmax", False), ("none", "softmax", True), ("all", "softmax", True), ("all", "elu", False),
            ("marginal", "softmax", False), ("marginal", "elu", True)]  # fmt: skip


def random_qkv(tokens: int, dim: int, dtype: torch.dtype, batch: int = 2, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v ``[B, H, N, D]`` as views of one qkv Linear's output, as hosts make them."""
    qkv = torch.randn(batch, tokens, 3, heads, dim, device=DEVICE).to(dtype)
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def layer_norm(dim: int) -> HeadNorm:
    return HeadNorm("layer", torch.randn(dim, device=DEVICE), torch.randn(dim, device=DEVICE), 1e-5)


@pytest.mark.parametrize("norm", ["none", "layer", "rms", "layer without affine"])
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_prepare_qkv(tokens: int, dim: int, rope: bool, norm: str) -> None:
    dtype = torch.float16
    q, k, v = random_qkv(tokens, dim, dtype)
    norms = {
        "none": None,
        "layer": layer_norm(dim),
        "rms": HeadNorm("rms", torch.randn(dim, device=DEVICE), None, 1e-6),
        "layer without affine": HeadNorm("layer", None, None, 1e-6),
    }
    options: dict[str, Any] = dict(q_norm=norms[norm], k_norm=norms[norm], order=torch.randperm(tokens, device=DEVICE).int(), **BLOCKS)
    if rope:
        options |= dict(positions=torch.randint(0, 40, (2, tokens, 2), device=DEVICE), rope_base=100.0)
    result = prepare_kernels.prepare_qkv(q, k, v, **options)
    same = prepare_naive.prepare_qkv(q, k, v, **options)
    reference = prepare_naive.prepare_qkv(q.double(), k.double(), v.double(), **options)
    for name, got, torch_result, exact in zip(result._fields, result, same, reference, strict=True):
        assert got.dtype == (torch.float32 if "mean" in name else dtype)
        assert_as_accurate(got if "mean" in name else got[:, :, :tokens], torch_result, exact)
    for padded in result[:3]:
        assert padded.shape[2] % BLOCKS["block_q"] == 0
        assert not padded[:, :, tokens:].any()
    q2, k2 = prepare_kernels.norm_rope(
        q, k, q_norm=norms[norm], k_norm=norms[norm], positions=options.get("positions"), rope_base=options.get("rope_base")
    )
    plain = prepare_naive.norm_rope(q.double(), norm=norms[norm], positions=options.get("positions"), rope_base=options.get("rope_base"))
    assert_as_accurate(q2, plain.to(dtype), plain)
    assert k2.shape == k.shape


@pytest.mark.parametrize("case", ["random", "equal", "with nan", "with infinity", "signed zeros"])
@pytest.mark.parametrize(
    ("rows", "columns", "kept", "pinned"),
    [(3, 7, 3, 1), (5, 40, 40, 2), (2, 33, 1, 0), (1, 1, 1, 1), (4, 100, 17, 5), (2, 21469, 430, 100)],
)
def test_block_map(rows: int, columns: int, kept: int, pinned: int, case: str) -> None:
    q, k = torch.randn(1, 2, rows, 32, device=DEVICE), torch.randn(1, 2, columns, 32, device=DEVICE)
    if case == "equal":
        k = k[:, :, :1].expand_as(k)
    elif case == "with nan":
        k[:, :, columns // 2] = math.nan
    elif case == "with infinity":
        q, k[:, :, 0] = q.abs(), math.inf
    elif case == "signed zeros":
        q, k = q[..., :1] * 0, k[..., :1]
    for negligible in {0, (columns - kept) // 3, columns - kept}:
        critical, left_out = block_map_naive.block_map(q, k, kept=kept, pinned=pinned, negligible=negligible)
        found = block_map_kernels.block_map_with_bits(q, k, kept=kept, pinned=pinned, negligible=negligible)
        assert torch.equal(found.kv_indices, critical)
        assert (found.skipped is found.bits) == (negligible == 0)
        for bits, expected in ((found.bits, critical), (found.skipped, torch.cat((critical, left_out), -1))):
            unpacked = ((bits[..., None] >> torch.arange(32, device=DEVICE)) & 1).flatten(-2).bool()
            assert torch.equal(unpacked, torch.zeros_like(unpacked).scatter(-1, expected.long(), True))
            assert unpacked.sum(-1).eq(expected.shape[-1]).all()


def run_both(
    q: Tensor, k: Tensor, v: Tensor, order: Tensor, pinned_tokens: int, keep_ratio: float, branch: Any, proj: Tensor,
    negligible_ratio: float = 0.0,
) -> Any:  # fmt: skip
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
    far = (prepared.k_mean, prepared.v_mean) if means else None
    got = sla_kernels.sparse_linear_attention(
        *prepared[:3], indices, tokens=tokens, bits=skipped, negligible=negligible, means=far, order=order, **options
    )

    def naive(wide: bool) -> Tensor:
        ordered = [x[:, :, order.long()].double() if wide else x[:, :, order.long()] for x in (q, k, v)]
        out = sla_naive.sparse_linear_attention(*ordered, indices, negligible=left_out, block_means=means, **options)
        return torch.empty_like(out).index_copy(-2, order.long(), out)

    return got, naive(False), naive(True)


@pytest.mark.parametrize("branch", BRANCHES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 96] if GPU else [32])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_sparse_linear_attention(tokens: int, dim: int, dtype: torch.dtype, branch: Any) -> None:
    q, k, v = random_qkv(tokens, dim, dtype)
    if GPU and why_not_triton(q) is not None:
        pytest.skip(why_not_triton(q))
    order, proj = torch.randperm(tokens, device=DEVICE).int(), torch.randn(dim, dim, device=DEVICE) * 0.3
    assert_as_accurate(*run_both(q, k, v, order, min(tokens // 3, 20), 0.2, branch, proj))


@pytest.mark.parametrize("branch", [BRANCHES[1], BRANCHES[3], *BRANCHES[4:]], ids=str)
@pytest.mark.parametrize("negligible_ratio", [0.3, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_negligible_blocks(dtype: torch.dtype, negligible_ratio: float, branch: Any) -> None:
    """Some, and all that are not critical."""
    q, k, v = random_qkv(LENGTHS[-1], 32, dtype)
    order, proj = torch.randperm(q.shape[-2], device=DEVICE).int(), torch.randn(32, 32, device=DEVICE) * 0.3
    assert_as_accurate(*run_both(q, k, v, order, 20, 0.2, branch, proj, negligible_ratio))


@pytest.mark.parametrize("branch", BRANCHES, ids=str)
@pytest.mark.parametrize("tokens", LENGTHS[:3])
def test_blocks_in_several_tiles(tokens: int, branch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for wide FP32 heads: the last, partial block then ends in tiles without a single key."""
    monkeypatch.setitem(BLOCKS, "block_k", BLOCKS["block_q"])
    monkeypatch.setattr(linear_kernels, "LARGEST_TILE", 16)
    options = sla_kernels.launch_options
    monkeypatch.setattr(sla_kernels, "launch_options", lambda *shape: {**options(*shape), "TILE_K": 16, "TILE_Q": 16})
    q, k, v = random_qkv(tokens, 32, torch.float32)
    proj = torch.randn(32, 32, device=DEVICE) * 0.3
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
@pytest.mark.parametrize("bits", [60.0, 120.0, 1000.0])
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float16], ids=str)
def test_scores_far_above_the_reference(dtype: torch.dtype, bits: float) -> None:
    """2**bits of the softmax of some queries lies in the first key block, after the reference is taken from the last kept one."""
    q, k, v = (x.clone() for x in random_qkv(LENGTHS[-1], 32, dtype))
    block = BLOCKS["block_k"]
    # Unequal, lest the weights be powers of two, which a softmax that is normed before it is rounded hits exactly.
    k[:, :, :block] = 1.0 + 0.1 * torch.randn_like(k[:, :, :block])
    q[:, 0, : q.shape[2] // 2] = bits * math.log(2) * 32**0.5 / 32  # the other queries, and the other head, stay as they were
    order = torch.arange(q.shape[2], device=DEVICE).int()
    for branch in (("none", "softmax", False), ("all", "softmax", True)):
        assert_as_accurate(*run_both(q, k, v, order, 0, 0.5, branch, torch.eye(32, device=DEVICE)))


@pytest.mark.parametrize("linear", ["all", "marginal"])
def test_autocast_does_not_reach_into_the_operator(linear: str) -> None:
    q, k, v = random_qkv(LENGTHS[-1], 64, torch.float32)
    options: dict[str, Any] = dict(keep_ratio=0.3, linear=linear, proj=torch.randn(64, 64, device=DEVICE), block_means=True, **BLOCKS)
    plain = sparse_linear_attention(q, k, v, **options)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(sparse_linear_attention(q, k, v, **options), plain)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns", "dim"), [(1, 1, 32), (3, 33, 80), (130, 31, 32), (37, 170, 64)])
def test_sums_over_marginal_pairs(rows: int, columns: int, dim: int, dtype: torch.dtype, transposed: bool) -> None:
    """Whatever the unused bits of the last word are."""
    words = torch.randint(-(2**31), 2**31, (2, rows, -(-columns // 32)), device=DEVICE).int()
    marginal = (((words[..., None] >> torch.arange(32, device=DEVICE)) & 1) == 0).flatten(-2)[..., :columns]
    inner, outer = (rows, columns) if transposed else (columns, rows)
    states, totals = torch.randn(2, inner, dim, dim, device=DEVICE).to(dtype), torch.rand(2, inner, dim, device=DEVICE)
    into = torch.empty(2, outer, dim, dim, device=DEVICE, dtype=dtype), torch.empty(2, outer, dim, device=DEVICE)
    marginal_kernels.marginal_sums(words, states, totals, into, columns=columns, scale=0.3, transposed=transposed)
    pairs = (marginal.mT if transposed else marginal)[None]
    for got, x in zip(into, (states, totals), strict=True):
        exact = 0.3 * sla_naive.over_marginal(pairs, x[None].double())[0]
        assert_as_accurate(got, exact.to(got.dtype), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_states_of_marginal_blocks_in_groups_of_heads(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any grouping gives the same bits."""
    q, k, v = random_qkv(LENGTHS[-1], 32, dtype, heads=3)
    order, proj = torch.randperm(q.shape[-2], device=DEVICE).int(), torch.randn(32, 32, device=DEVICE)
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


def test_forward_is_deterministic() -> None:
    q, k, v = random_qkv(LENGTHS[-1], 32, DTYPES[0])
    order, proj = torch.randperm(q.shape[-2], device=DEVICE).int(), torch.randn(32, 32, device=DEVICE)
    results = [run_both(q, k, v, order, 5, 0.2, ("marginal", "softmax", True), proj)[0] for _ in range(3)]
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.gpu
def test_more_views_do_not_recompile() -> None:
    """Any length runs the same binary."""

    def binaries() -> int:
        kernels = (
            prepare_kernels._prepare_kernel, sla_kernels._sparse_linear_kernel, linear_kernels._linear_state_kernel,
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


def test_the_map_in_slabs_without_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(2, 2, 37, 32, device=DEVICE), torch.randn(2, 2, 50, 32, device=DEVICE)
    monkeypatch.setattr(block_map_kernels, "SLAB_BYTES", 1)
    indices, bits, skipped = block_map_kernels.block_map_with_bits(q, k, kept=9, pinned=2, negligible=3, bits=False)
    assert bits is None
    assert skipped is None
    assert torch.equal(indices, block_map_naive.block_map(q, k, kept=9, pinned=2)[0])


def test_a_sequence_too_long_for_the_map_says_what_to_do() -> None:
    q, k = torch.zeros(1, 1, 1, 4, device=DEVICE), torch.zeros(1, 1, block_map_kernels.MAX_COLUMNS + 1, 4, device=DEVICE)
    with pytest.raises(BackendError, match="has 32769 key blocks, the kernels take 32768; use a larger block_k"):
        block_map_kernels.block_map_with_bits(q, k, kept=1)


def test_strides_of_what_is_not_q_k_v(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels read them as they lie in memory."""
    monkeypatch.setattr("lite3r_plugin.ops.dispatch._why_not", lambda *_: None)  # interpreted, where there is no GPU
    q, k, v = random_qkv(LENGTHS[-1], 32, torch.float32)
    tokens = q.shape[2]
    order = torch.stack((torch.randperm(tokens, device=DEVICE), torch.arange(tokens, device=DEVICE)), 1)[:, 0].int()
    proj, weight = torch.randn(32, 32, device=DEVICE).T, torch.rand(64, device=DEVICE)[::2]
    pairs = torch.stack((order, order), 1)[:, 0]
    assert not any(x.is_contiguous() for x in (proj, weight, pairs))
    for linear in ("all", "marginal"):
        options: dict[str, Any] = dict(keep_ratio=0.3, linear=linear, block_means=True, backend="triton", **BLOCKS)
        results = [
            sparse_linear_attention(q, k, v, proj=p, order=o, q_norm=HeadNorm("rms", w, None, 1e-6), **options)
            for p, o, w in ((proj, pairs, weight), (proj.contiguous(), pairs.contiguous(), weight.contiguous()))
        ]
        assert torch.equal(*results)
