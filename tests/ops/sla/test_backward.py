"""Gradients of the Triton operator against autograd through the definition: on a GPU as compiled, elsewhere interpreted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from numerics import assert_as_accurate, relative_error
from pairs import all_pairs, costly, each, grid
from sla_cases import BLOCK_K, BLOCKS, BRANCHES, DEVICE, GPU, HALF, LENGTHS, Branch, random_order, random_proj, random_qkv
from torch import Tensor

from lite3r_plugin.ops import dispatch
from lite3r_plugin.ops.block_map import masked_block_map
from lite3r_plugin.ops.block_map import naive as block_map_naive
from lite3r_plugin.ops.dispatch import why_not_triton
from lite3r_plugin.ops.qk_norm_rope import NO_NORM, HeadNorm
from lite3r_plugin.ops.sla import forward, naive
from lite3r_plugin.ops.sla.signature import INPUTS, Arguments, Gradients, Needed

backward = pytest.importorskip("lite3r_plugin.ops.sla.backward")
block_map_kernels = pytest.importorskip("lite3r_plugin.ops.block_map.kernels")
backward_options = pytest.importorskip("lite3r_plugin.ops.sla.kernels.backward_options")
operands = pytest.importorskip("lite3r_plugin.ops.sla.kernels.operands")
softmax_backward = pytest.importorskip("lite3r_plugin.ops.sla.kernels.softmax_backward")
transpose_kernels = pytest.importorskip("lite3r_plugin.ops.block_map.transpose_kernels")
forward_kernels = pytest.importorskip("lite3r_plugin.ops.sla.kernels.forward")
marginal_kernels = pytest.importorskip("lite3r_plugin.ops.sla.kernels.marginal")

LONG = LENGTHS[-1] if GPU else 81  # the fewest tokens with blocks of all kinds, and a short one of queries and of keys

# Of the reference: torch's gathers and masked attention add up in any order.
pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic")


@pytest.fixture(autouse=True)
def with_all_that_large_calls_get(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operands, "LARGE", 0)
    if not GPU:
        monkeypatch.setattr(dispatch, "why_not_triton", lambda *_, **__: None)  # interpreted


def some_arguments(
    tokens: int, dim: int, dtype: torch.dtype, branch: Branch, *, norm: str | None = None, pinned_tokens: int = 20,
    pinned_keys: int | None = None,
    keep_ratio: float = 0.25, negligible_ratio: float = 0.0, ordered: bool = True, rotated: bool = False, batch: int = 2 if GPU else 1,
    heads: int = 2 if GPU else 1, keys: int | None = None, return_lse: bool = False,
) -> Arguments:  # fmt: skip
    """A call of the whole operator. q is of another size than k, as its norm is another one. `keys`: that many other tokens."""
    q, k, v = random_qkv(tokens, dim, dtype, batch=batch, heads=heads)
    if keys is not None:
        _, k, v = random_qkv(keys, dim, dtype, batch=batch, heads=heads)
    linear, feature_map, means = branch
    norms = [NO_NORM, NO_NORM]
    if norm is not None:
        affine = [1 + 0.3 * torch.randn(dim, device=DEVICE) for _ in range(4)]
        norms = [HeadNorm(norm, affine[0], affine[1] if norm == "layer" else None, 1e-5), HeadNorm("rms", affine[2], None, 1e-6)]  # type: ignore[arg-type]
    rotated = rotated or norm is not None
    proj = random_proj(dim) if linear != "none" else None
    order = random_order(tokens) if ordered else None
    return Arguments(
        q, k, v, norms[0].weight, norms[0].bias, norms[1].weight, norms[1].bias, proj, order=order,
        positions=torch.randint(0, 40, (batch, tokens, 2), device=DEVICE) if rotated else None,
        pinned_tokens=min(pinned_tokens, tokens // 3),
        keep_ratio=keep_ratio, negligible_ratio=negligible_ratio, q_kind=norms[0].kind, q_eps=norms[0].eps, k_kind=norms[1].kind,
        k_eps=norms[1].eps, rope_base=100.0 if rotated else None, scale=None, linear=linear, feature_map=feature_map, block_means=means,
        backend="triton", cross=keys is not None, key_order=random_order(keys) if keys is not None and ordered else None,
        key_positions=torch.randint(0, 40, (1, keys, 2), device=DEVICE) if keys is not None and rotated else None,
        key_pinned_tokens=_pinned_keys(pinned_tokens, tokens, keys) if pinned_keys is None else pinned_keys,
        return_lse=return_lse, **BLOCKS,
    )  # fmt: skip


def _pinned_keys(pinned_tokens: int, tokens: int, keys: int | None) -> int:
    return min(pinned_tokens, tokens // 3) if keys is None else min(pinned_tokens // 2, keys)


def all_of(arguments: Arguments) -> Needed:
    """All inputs that there are need a gradient."""
    return Needed(*(x is not None for x in arguments.inputs))


def with_leaves(arguments: Arguments, needed: Needed, wide: bool = False) -> Arguments:
    """Inputs that are leaves of a graph; in FP64 if `wide`."""
    tensors = [x if x is None else x.detach().to(torch.float64 if wide else x.dtype) for x in arguments.inputs]
    return Arguments(*(x if x is None else x.requires_grad_(need) for x, need in zip(tensors, needed, strict=True)), *arguments.options)


def masked(arguments: Arguments, kind: str) -> Arguments:
    """With a mask, by segments that do not end where blocks do, and orders in which tokens of a segment are neighbours."""
    before, after, sink = dict(
        causal=(None, 0, None), window=(1, 1, None), sink=(0, 0, 0), diagonal=(0, 0, None), mixed=(1, 0, None), nothing=(1, 0, None)
    )[kind]  # fmt: skip
    of_queries, of_keys = (torch.arange(x.shape[2], device=DEVICE) * 3 // x.shape[2] for x in (arguments.q, arguments.k))
    if kind == "mixed":  # such as tokens of all frames that come first
        of_queries, of_keys = of_queries[torch.randperm(len(of_queries))], of_keys[torch.randperm(len(of_keys))]
    elif kind == "nothing":  # of the first segments
        of_keys = of_keys + 2
    if not arguments.cross and kind != "nothing":
        of_keys = of_queries

    def by_segment(order: Tensor | None, segments: Tensor) -> Tensor | None:
        return order if order is None or kind == "mixed" else order[segments[order.long()].argsort(stable=True)]

    return arguments._replace(
        order=by_segment(arguments.order, of_queries), key_order=by_segment(arguments.key_order, of_keys), mask_queries=of_queries,
        mask_keys=of_keys, mask_before=before, mask_after=after, mask_sink=sink,
    )  # fmt: skip


BlockMap = tuple[Tensor, Tensor | None]  # critical blocks, and which others are negligible
Results = tuple[Tensor, Tensor | None]  # output, and log-sum-exp if it is wanted


def gradients(results: Results, leaves: Arguments, grad: Tensor) -> Gradients:
    """For a gradient `grad` of the output, and the same for each query, from part of it, of the log-sum-exp."""
    wanted = {name: x for name, x in zip(INPUTS, leaves.inputs, strict=True) if x is not None and x.requires_grad}
    found = [(x, (grad if x is results[0] else 3 * grad[..., 0]).to(x.dtype)) for x in results if x is not None]
    outputs, grads = zip(*found, strict=True)
    flow = torch.autograd.grad(outputs, list(wanted.values()), grads, allow_unused=True, materialize_grads=True)
    return Gradients(**dict(zip(wanted, flow, strict=True)))


def by_triton(arguments: Arguments, grad: Tensor, needed: Needed | None = None) -> Gradients:
    leaves = with_leaves(arguments, all_of(arguments) if needed is None else needed)
    return gradients(backward.SparseLinearAttentionFunction.apply(*leaves), leaves, grad)


def block_map_of(arguments: Arguments) -> BlockMap:
    """By the Triton kernels: the critical blocks, and which others are negligible. With a mask by the definition, which is the same."""
    means, counts = arguments.prepared(triton=True)[3:5], arguments.block_counts()
    if arguments.mask is not None:
        blocks = arguments.mask.ordered(arguments.order, arguments.keys.order).in_blocks(arguments.block_q, arguments.block_k)
        return masked_block_map(
            *means, keep_ratio=arguments.keep_ratio, mask=blocks, pinned=arguments.pinned_keys,
            negligible_ratio=arguments.negligible_ratio if arguments.leaves_out else 0.0,
        )  # fmt: skip
    kv_indices = block_map_kernels.block_map_with_bits(*means, **counts._asdict()).kv_indices
    return kv_indices, block_map_naive.block_map(*means, **counts._asdict())[1]


def by_definition(arguments: Arguments, grad: Tensor, needed: Needed, wide: bool, block_map: BlockMap) -> Gradients:
    """By autograd through the definition, with the block map of the Triton kernels."""
    leaves = with_leaves(arguments, needed, wide)
    return gradients(defined(leaves, block_map), leaves, grad)


def defined(leaves: Arguments, block_map: BlockMap) -> Results:
    """The definition, of `leaves`, with a block map."""
    kv_indices, negligible = block_map
    prepared = leaves.prepared(triton=False)
    mask = None if leaves.mask is None else leaves.mask.ordered(leaves.order, leaves.keys.order)
    out, lse = naive.sparse_linear_attention(
        prepared.q, prepared.k, prepared.v, kv_indices, negligible=negligible, mask=mask, pinned=leaves.pinned_queries, scale=leaves.scale,
        linear=leaves.linear, feature_map=leaves.feature_map, proj=leaves.proj, block_means=leaves.block_means,
        block_q=leaves.block_q, block_k=leaves.block_k, return_lse=leaves.return_lse,
    )  # fmt: skip
    order = torch.arange(out.shape[-2], device=DEVICE) if leaves.order is None else leaves.order.long()
    return torch.empty_like(out).index_copy(-2, order, out), None if lse is None else torch.empty_like(lse).index_copy(-1, order, lse)


def assert_same_bits(found: Iterable[Tensor | None], expected: Iterable[Tensor | None]) -> None:
    assert all(x is y is None or torch.equal(x, y) for x, y in zip(found, expected, strict=True))  # type: ignore[arg-type]


def assert_forward(arguments: Arguments) -> None:
    """Output and log-sum-exp of both forward passes on Triton, as near to FP64 as the definition in the same dtype."""
    if GPU and why_not_triton(arguments.q) is not None:
        pytest.skip(why_not_triton(arguments.q))
    nothing = Needed(*(False for _ in INPUTS))
    block_map = block_map_of(arguments)
    same, exact = (defined(with_leaves(arguments, nothing, wide), block_map) for wide in (False, True))
    for found in (forward.run(arguments), forward.train(all_of(arguments), arguments)[:2]):
        for got, torch_result, reference in zip(found, same, exact, strict=True):
            assert (got is None) == (reference is None)
            if got is None or torch_result is None or reference is None:
                continue
            seen = reference.isfinite()  # the log-sum-exp of a query that sees nothing is -inf
            assert torch.equal(got == -torch.inf, ~seen)
            got, torch_result, reference = got[seen], torch_result[seen], reference[seen]
            if got.dtype == HALF:  # few numbers, and more operands are rounded than in the definition
                assert relative_error(got, reference) <= torch.finfo(HALF).eps / 2
            else:
                assert_as_accurate(got, torch_result, reference)


def random_grad(arguments: Arguments) -> Tensor:
    """A gradient of the output."""
    return torch.randn(arguments.q.shape, device=DEVICE).to(arguments.q.dtype)


def assert_gradients(arguments: Arguments, needed: Needed | None = None) -> None:
    """As near to FP64 as autograd in the same dtype, within a factor; half precision rounds more operands than autograd does."""
    q = arguments.q
    if GPU and why_not_triton(q, needs_grad=True) is not None:
        pytest.skip(why_not_triton(q, needs_grad=True))
    needed = all_of(arguments) if needed is None else needed
    grad = random_grad(arguments)
    found = by_triton(arguments, grad, needed)
    block_map = block_map_of(arguments)
    same = by_definition(arguments, grad, needed, wide=False, block_map=block_map)
    exact = by_definition(arguments, grad, needed, wide=True, block_map=block_map)
    for name, need, got, torch_result, reference, like in zip(INPUTS, needed, found, same, exact, arguments.inputs, strict=True):
        assert (got is not None) == need, name
        if got is None or torch_result is None or reference is None:
            continue
        assert (got.dtype, got.shape) == (like.dtype, like.shape), name
        assert got.isfinite().all(), name
        if reference.norm() < 1e-9 * grad.double().norm():  # zero but for rounding, as dK of a single key
            assert got.double().norm() < 1e-2 * grad.double().norm(), name
        elif q.dtype == torch.float32:
            assert_as_accurate(got, torch_result, reference, factor=8)
        else:
            error = relative_error(got, reference)
            assert error <= 8 * torch.finfo(q.dtype).eps, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize(("tokens", "dtype", "branch"), costly(LENGTHS, (HALF, torch.float32), BRANCHES), ids=str)
def test_gradients(tokens: int, dtype: torch.dtype, branch: Branch) -> None:
    many = 2 if GPU or tokens < 97 else 1  # interpreted, the programs of all blocks and of all heads are too many
    assert_gradients(some_arguments(tokens, 64 if GPU else 32, dtype, branch, batch=2, heads=many))


@pytest.mark.parametrize(
    ("dim", "norm", "branch"),
    each((80, 128), ("layer", "rms"), [BRANCHES[2], BRANCHES[5]]) if GPU else [
        (80, "layer", BRANCHES[2]), pytest.param(80, "rms", BRANCHES[5], marks=pytest.mark.slow)
    ], ids=str,
)  # fmt: skip
def test_gradients_through_norms_and_rotary_embedding(dim: int, norm: str, branch: Branch) -> None:
    assert_gradients(some_arguments(LONG if GPU else 41, dim, HALF, branch, norm=norm, batch=2, heads=2))


@pytest.mark.parametrize(
    ("tokens", "keys", "dtype", "branch"),
    grid((1, 257, 1374), (1, 63, 300, 1374), (HALF, torch.float32), BRANCHES) if GPU else costly(
        (1, 41), (1, 30, 81), (HALF, torch.float32), BRANCHES
    ), ids=str,
)  # fmt: skip
def test_queries_and_keys_of_other_tokens(tokens: int, keys: int, dtype: torch.dtype, branch: Branch) -> None:
    """Of any number, each with an order and pins of their own, and with gradients by way of the log-sum-exp."""
    arguments = some_arguments(tokens, 64 if GPU else 32, dtype, branch, keys=keys, return_lse=dtype == HALF or branch == BRANCHES[4])
    assert_forward(arguments)
    assert_gradients(arguments)


@pytest.mark.parametrize("branch", [pytest.param(b, marks=[pytest.mark.slow] * (b != BRANCHES[5])) for b in BRANCHES], ids=str)
def test_the_log_sum_exp_and_its_gradients(branch: Branch) -> None:
    arguments = some_arguments(LONG, 32, torch.float32, branch, negligible_ratio=0.3, return_lse=True)
    assert_forward(arguments)
    assert_gradients(arguments)


@pytest.mark.parametrize(("norm", "branch"), [("layer", BRANCHES[2]), pytest.param(None, BRANCHES[5], marks=pytest.mark.slow)], ids=str)
def test_other_tokens_have_positions_and_norms_of_their_own(norm: str | None, branch: Branch) -> None:
    arguments = some_arguments(41, 32, torch.float32, branch, keys=LONG, norm=norm, rotated=True, batch=2)
    assert_forward(arguments)
    assert_gradients(arguments)


MASKS = ("causal", "window", "sink", "diagonal", "mixed", "nothing")
MASKED_BRANCHES = [BRANCHES[5], BRANCHES[1], BRANCHES[4], BRANCHES[0]]


@pytest.mark.parametrize(
    ("kind", "branch", "dtype", "keys"),
    grid(MASKS, MASKED_BRANCHES, (HALF, torch.float32), (None, 1374)) if GPU else [
        pytest.param(*row, marks=[pytest.mark.slow] * (i >= 4)) for i, row in enumerate([
            ("causal", BRANCHES[5], torch.float32, None), ("sink", BRANCHES[1], HALF, None), ("nothing", BRANCHES[4], torch.float32, 100),
            ("mixed", BRANCHES[0], HALF, 67), *all_pairs(MASKS, MASKED_BRANCHES, (HALF, torch.float32), (None, 100)),
        ])
    ], ids=str,
)  # fmt: skip
def test_masks(kind: str, branch: Branch, dtype: torch.dtype, keys: int | None) -> None:
    """Output, log-sum-exp and gradients, also of queries that see nothing, of pinned ones and with negligible blocks."""
    pinned = 40 if kind in ("causal", "window") else 0
    arguments = masked(
        some_arguments(
            1500 if GPU else LONG, 64 if GPU else 32, dtype, branch, keys=keys, negligible_ratio=0.3, pinned_tokens=pinned, return_lse=True
        ),
        kind,
    )  # fmt: skip
    assert_forward(arguments)
    assert_gradients(arguments)


@pytest.mark.parametrize(
    ("kind", "branch", "dtype"),
    grid(MASKS, BRANCHES[2:4], (HALF, torch.float32)) if GPU else [
        ("causal", BRANCHES[2], torch.float32), pytest.param("nothing", BRANCHES[3], HALF, marks=pytest.mark.slow),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in all_pairs(MASKS, BRANCHES[2:4], (HALF, torch.float32))),
    ], ids=str,
)  # fmt: skip
def test_the_branch_over_all_that_a_mask_allows(kind: str, branch: Branch, dtype: torch.dtype) -> None:
    """Which has states of blocks that are wholly allowed, and pairs."""
    pinned = 40 if kind in ("causal", "window") else 0
    arguments = some_arguments(1500 if GPU else LONG, 64 if GPU else 32, dtype, branch, pinned_tokens=pinned, return_lse=True)
    arguments = masked(arguments, kind)
    assert_forward(arguments)
    assert_gradients(arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "keep_ratio", "kind"), [("layer", 0.3, "causal"), (None, 1.0, "window"), ("rms", 0.01, "diagonal")])
def test_masks_with_norms_and_at_the_edges(norm: str | None, keep_ratio: float, kind: str) -> None:
    arguments = some_arguments(LONG, 32, torch.float32, BRANCHES[5], norm=norm, keep_ratio=keep_ratio, pinned_tokens=0, return_lse=True)
    assert_forward(masked(arguments, kind))
    assert_gradients(masked(arguments, kind))


@pytest.mark.parametrize("dtype", [torch.float32, HALF] if GPU else [torch.float32], ids=str)  # FP16 cannot hold such states
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")  # in the interpreter, by the first launch
def test_hidden_keys_have_no_part_however_large_they_are(dtype: torch.dtype) -> None:
    """Their scores are above what a sum can hold, and their values large: earlier frames have the same output, but for rounding."""
    arguments = masked(some_arguments(LONG, 32, dtype, BRANCHES[5], pinned_tokens=0, return_lse=True), "causal")
    late = arguments.mask_queries == 2
    along = arguments.q.mean(2, keepdim=True).sign()
    large = arguments._replace(
        q=arguments.q + 0.5 * along, k=torch.where(late[:, None], 100 * along, arguments.k), v=torch.where(late[:, None], 1e3, arguments.v)
    )
    assert_forward(large)
    expected, found = (forward.run(x)[0][:, :, ~late] for x in (large._replace(k=arguments.k, v=arguments.v), large))
    assert relative_error(found, expected) < 4 * torch.finfo(dtype).eps
    assert relative_error(forward.run(large)[0][:, :, late], forward.run(arguments)[0][:, :, late]) > 1


@pytest.mark.gpu
def test_masks_of_long_sequences_take_little_memory_and_no_kernel_of_their_own() -> None:
    """Less than a byte for each pair of 43,000 tokens; the same binaries for any number of views and segments."""
    kernels = (
        forward_kernels._sparse_linear_kernel, marginal_kernels._marginal_sums_kernel, softmax_backward._dq_kernel,
        softmax_backward._dkv_kernel, softmax_backward._dmeans_kernel, transpose_kernels._starts_kernel, transpose_kernels._columns_kernel,
    )  # fmt: skip
    binaries = []
    for views, segments in ((4, 4), (9, 3), (21, 21), (160, 160)):
        tokens = views * 269
        arguments = some_arguments(tokens, 64, HALF, BRANCHES[5], batch=1)
        order = torch.randperm(tokens, device=DEVICE)
        of_tokens = torch.arange(tokens, device=DEVICE) * segments // tokens
        arguments = arguments._replace(order=order[of_tokens[order].argsort(stable=True)].int(), mask_queries=of_tokens, mask_after=0)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = by_triton(arguments, random_grad(arguments))
        assert all(x is None or x.isfinite().all() for x in found)
        assert tokens < 40_000 or torch.cuda.max_memory_allocated() - before < tokens**2
        binaries.append(sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values()))
    assert binaries[0] == binaries[-1]


@pytest.mark.gpu
@pytest.mark.parametrize("branch", [*BRANCHES[1:3], *BRANCHES[4:]], ids=str)
@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.bfloat16), (64, torch.float32), (128, torch.float16)])
def test_gradients_with_blocks_of_128_keys(dim: int, dtype: torch.dtype, branch: Branch) -> None:
    """Which are read in several tiles."""
    assert_gradients(some_arguments(1374, dim, dtype, branch)._replace(block_k=128))


def test_gradients_with_blocks_of_keys_as_large_as_those_of_queries() -> None:
    arguments = some_arguments(LONG, 64 if GPU else 32, torch.float32, BRANCHES[4])
    assert_gradients(arguments._replace(block_k=arguments.block_q))


@pytest.mark.parametrize("branch", [BRANCHES[2], BRANCHES[4]], ids=str)
def test_gradients_through_a_rotary_embedding_alone(branch: Branch) -> None:
    assert_gradients(some_arguments(LONG, 32, torch.float32, branch, rotated=True))


@pytest.mark.parametrize("linear", ["marginal", "all"])
def test_a_projection_of_zero_learns_and_is_passed_by_where_nothing_does(linear: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As every branch starts. Where nothing learns its states are left unwritten, NaNs in tests, but for a projection that is not zero."""
    arguments = some_arguments(LONG, 32, torch.float32, (linear, "softmax", True))
    assert arguments.proj is not None
    zero = arguments._replace(proj=torch.zeros_like(arguments.proj))
    assert_gradients(zero)
    assert_gradients(zero, Needed(*(name == "proj" for name in INPUTS)))
    states: list[Tensor] = []
    make = {"marginal": forward_kernels.marginal_states, "all": forward_kernels.linear_state}[linear]

    def made(*args: Any, **more: Any) -> tuple[Tensor, Tensor]:
        states.extend(found := make(*args, **more))
        return found

    monkeypatch.setattr(forward_kernels, make.__name__, made)
    assert_same_bits([forward.run(zero)[0]], [forward.run(zero._replace(proj=None, linear="none"))[0]])
    assert all(x.isnan().all() for x in states)
    states.clear()
    forward.run(arguments)
    assert states
    assert not any(x.isnan().any() for x in states)


@pytest.mark.parametrize(("edge", "branch"), costly([(0, 0.01), (10**6, 0.3), (5, 1.0)], BRANCHES), ids=str)
def test_gradients_at_the_edges(edge: tuple[int, float], branch: Branch) -> None:
    """One block kept and none pinned; a third of all pinned; all kept; and no order."""
    pinned_tokens, keep_ratio = edge
    arguments = some_arguments(
        LENGTHS[-2] + 1, 32, torch.float32, branch, pinned_tokens=pinned_tokens, keep_ratio=keep_ratio, ordered=False
    )  # fmt: skip
    assert_gradients(arguments)


@pytest.mark.parametrize(("negligible_ratio", "branch"), costly((0.3, 1.0), [BRANCHES[1], BRANCHES[2], *BRANCHES[4:]]), ids=str)
def test_gradients_with_negligible_blocks(negligible_ratio: float, branch: Branch) -> None:
    """Some, and all that are not critical."""
    assert_gradients(some_arguments(LONG, 32, torch.float32, branch, negligible_ratio=negligible_ratio))


@pytest.mark.parametrize(
    "learns",
    [("proj",), ("v", "k_weight"), *(pytest.param(x, marks=pytest.mark.slow) for x in (("q",), ("q_weight",), ("k", "proj")))],
    ids=str,
)
@pytest.mark.parametrize("branch", [pytest.param(BRANCHES[2], marks=pytest.mark.slow), BRANCHES[4]], ids=str)
def test_only_what_is_asked_for(learns: tuple[str, ...], branch: Branch) -> None:
    arguments = some_arguments(LONG, 32, torch.float32, branch, norm="layer")
    assert_gradients(arguments, Needed(*(name in learns for name in INPUTS)))


@pytest.mark.parametrize("learns", [("proj",), ("q",), ("v", "k_weight"), ("k_bias", "proj")], ids=str)
def test_no_other_gradient_is_returned(learns: tuple[str, ...]) -> None:
    arguments = some_arguments(LENGTHS[1], 32, torch.float32, BRANCHES[2], norm="layer")._replace(k_bias=torch.zeros(32, device=DEVICE))
    needed = Needed(*(name in learns for name in INPUTS))
    out, _, saved = forward.train(needed, arguments)
    found = backward.backward(random_grad(arguments), None, out, saved, needed, arguments)
    assert [x is not None for x in found] == list(needed)


@pytest.mark.slow
def test_gradients_in_groups_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any grouping gives the same bits."""
    arguments = some_arguments(3 * BLOCK_K + 1, 32, HALF, ("marginal", "softmax", True), batch=2, heads=2)
    grad = random_grad(arguments)
    whole = by_triton(arguments, grad)
    monkeypatch.setattr(marginal_kernels, "GROUP_BYTES", 1)
    monkeypatch.setattr(marginal_kernels, "MAX_GROUPS", 3)
    grouped = by_triton(arguments, grad)
    assert_same_bits(whole, grouped)


@pytest.mark.slow
def test_gradients_are_deterministic() -> None:
    arguments = some_arguments(LONG, 32, HALF, ("marginal", "softmax", True))
    grad = random_grad(arguments)
    first, second = by_triton(arguments, grad), by_triton(arguments, grad)
    assert_same_bits(first, second)


@pytest.mark.parametrize(
    ("branch", "norm", "keys", "mask"),
    [
        (BRANCHES[5], "layer", 100, None),
        (BRANCHES[5], None, None, "sink"),
        pytest.param(BRANCHES[2], "layer", None, None, marks=pytest.mark.slow),
        pytest.param(BRANCHES[4], None, 35, None, marks=pytest.mark.slow),
        pytest.param(BRANCHES[4], "rms", 100, "nothing", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_nothing_is_read_that_was_not_written(
    branch: Branch, norm: str | None, keys: int | None, mask: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With NaN in all new memory gradients have the same bits."""
    arguments = some_arguments(LONG, 32, torch.float32, branch, norm=norm, keys=keys, return_lse=keys is not None)
    arguments = arguments if mask is None else masked(arguments, mask)
    grad = random_grad(arguments)
    clean = by_triton(arguments, grad)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    found = by_triton(arguments, grad)
    assert_same_bits(clean, found)


@pytest.mark.parametrize(
    ("pinned_tokens", "pinned_keys", "branch"),
    [
        (0, 40, ("marginal", "softmax", True)),
        pytest.param(40, 0, ("marginal", "softmax", True), marks=() if GPU else pytest.mark.slow),
        pytest.param(0, 40, ("all", "elu", False), marks=() if GPU else pytest.mark.slow),
        pytest.param(20, 40, ("none", "softmax", True), marks=() if GPU else pytest.mark.slow),
    ],
    ids=str,
)
def test_other_queries_may_be_pinned_than_keys(pinned_tokens: int, pinned_keys: int, branch: Branch) -> None:
    arguments = some_arguments(
        LONG, 32, torch.float32, branch, pinned_tokens=pinned_tokens, pinned_keys=pinned_keys, negligible_ratio=0.2, return_lse=True
    )
    assert_forward(arguments)
    assert_gradients(arguments)


@pytest.mark.parametrize("options", [dict(keep_ratio=1.0), dict(negligible_ratio=1.0), dict(pinned_tokens=10**6)], ids=str)
def test_what_is_kept_without_marginal_blocks_is_written(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = some_arguments(LONG, 32, torch.float32, ("marginal", "softmax", True), **options)
    pinned = LONG if "pinned_tokens" in options else 0
    arguments = arguments._replace(pinned_tokens=pinned, key_pinned_tokens=pinned)
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
    *_, saved = forward.train(all_of(arguments), arguments)
    assert saved.state is not None
    assert saved.total is not None
    assert not saved.state.any()
    assert not saved.total.any()


def test_values_are_centred_on_their_mean() -> None:
    """Also where the last block is short: else gradients are differences of larger numbers than need be."""
    arguments = some_arguments(3 * BLOCK_K + 1, 32, torch.float32, ("marginal", "softmax", False))
    v = arguments.v + 10 * torch.randn(arguments.v.shape, device=DEVICE)
    arguments = arguments._replace(v=v)
    *_, saved = forward.train(all_of(arguments), arguments)
    torch.testing.assert_close(saved.mu, v.mean(2).flatten(0, 1))


@pytest.mark.parametrize(
    ("unpack", "dim", "norm"),
    [("strides", 32, None), *(pytest.param(*row, marks=pytest.mark.slow) for row in (("strides", 32, "rms"), ("addresses", 64, None)))],
)
def test_saved_tensors_may_come_back_otherwise(unpack: str, dim: int, norm: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from `torch.autograd.graph.save_on_cpu(pin_memory=True)`, and worse."""
    if not GPU:
        monkeypatch.setattr(backward_options, "has_tma", lambda _: True)
    arguments = some_arguments(3 * BLOCK_K + 1, dim, HALF, ("marginal", "softmax", True), norm=norm)

    grad = torch.ones_like(arguments.v)

    def found() -> list[Tensor | None]:
        """Of all, and of Proj alone, for which other things are kept."""
        alone = Needed(*(name == "proj" for name in INPUTS))
        return [x for needed in (all_of(arguments), alone) for x in by_triton(arguments, grad, needed)]

    def back(x: Tensor) -> Tensor:
        if unpack == "strides":
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)

    expected = found()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, back):
        assert_same_bits(found(), expected)


def test_small_gradients_in_fp16() -> None:
    """Sums over a query block, divided by its size, would be below what FP16 can hold."""
    arguments = some_arguments(LONG, 32, torch.float16, ("marginal", "softmax", True), pinned_tokens=0)
    grad = (5e-6 * torch.randn(arguments.q.shape, device=DEVICE)).half()
    found = by_triton(arguments, grad).proj
    exact = by_definition(arguments, grad, all_of(arguments), wide=True, block_map=block_map_of(arguments)).proj
    assert found is not None
    assert exact is not None
    assert relative_error(found, exact) < 2 * torch.finfo(torch.float16).eps


def test_a_bias_that_an_rms_norm_does_not_add_gets_no_gradient() -> None:
    arguments = some_arguments(LONG, 32, torch.float32, BRANCHES[0], norm="rms")._replace(q_bias=torch.randn(32, device=DEVICE))
    found = by_triton(arguments, random_grad(arguments)).q_bias
    assert found is not None
    assert not found.any()


@pytest.mark.parametrize("dim", [64, 128] if GPU else [64])
def test_small_calls_have_the_same_gradients(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In turn and by address, to the bit."""
    if not GPU:
        monkeypatch.setattr(backward_options, "has_tma", lambda _: True)  # which is interpreted too
    arguments = some_arguments(3 * BLOCK_K + 1, dim, HALF, ("marginal", "softmax", True))
    grad = random_grad(arguments)
    large = by_triton(arguments, grad)
    monkeypatch.setattr(operands, "LARGE", 1 << 62)
    small = by_triton(arguments, grad)
    assert_same_bits(large, small)


@pytest.mark.gpu
@pytest.mark.parametrize("branch", [BRANCHES[1], BRANCHES[3], BRANCHES[5]], ids=str)
@pytest.mark.parametrize("norm", [None, "layer"])
def test_streams_wait_for_each_other(branch: Branch, norm: str | None) -> None:
    """Gradients have the same bits where the GPU comes late to all that they are made of, and their memory is written to after them."""
    arguments = some_arguments(LONG, 64, HALF, branch, norm=norm)
    grad = random_grad(arguments)
    expected = by_triton(arguments, grad)
    torch.cuda.synchronize()
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream(priority=-1)):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)  # cycles
            late = Arguments(*(x * 1 if isinstance(x, Tensor) else x for x in arguments))
            found = by_triton(late, grad * 1)
            copies = [None if x is None else x.clone() for x in found]
            shapes = [x.shape for x in found if x is not None]
            del late, found
            for shape in shapes * 4:
                torch.full(shape, float("nan"), device=DEVICE, dtype=HALF)
            torch.cuda.synchronize()
        assert_same_bits(expected, copies)


def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`make`, whose floating-point tensors come full of NaN, others of a large number."""
    return lambda *args, **kwargs: (x := make(*args, **kwargs)).fill_(
        float("nan") if x.is_floating_point() else min(1 << 20, torch.iinfo(x.dtype).max)
    )
