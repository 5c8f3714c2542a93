"""Gradients of the Triton operator against autograd through the naive twin: on a GPU as compiled, elsewhere interpreted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from numerics import assert_as_accurate, relative_error
from torch import Tensor, nn

from lite3r_plugin import AttentionSite, Lite3RConfig, Routed
from lite3r_plugin.attention.inputs import Heads
from lite3r_plugin.attention.module import ModelState, SparseLinearAttention
from lite3r_plugin.ops.block_map import block_map
from lite3r_plugin.ops.dispatch import why_not_triton
from lite3r_plugin.ops.qk_norm_rope import NO_NORM, HeadNorm
from lite3r_plugin.ops.sla import operator

training = pytest.importorskip("lite3r_plugin.ops.sla.training")
backward_options = pytest.importorskip("lite3r_plugin.ops.sla.backward_options")
problem = pytest.importorskip("lite3r_plugin.ops.sla.problem")
transpose_kernels = pytest.importorskip("lite3r_plugin.ops.block_map.transpose_kernels")
marginal_kernels = pytest.importorskip("lite3r_plugin.ops.sla.marginal_kernels")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BLOCK_Q, BLOCK_K = (128, 64) if GPU else (32, 16)
LENGTHS = (1, 63, 257, 1374, 5497) if GPU else (1, 15, 97)
# tl.dot of bfloat16 is wrong in Triton's interpreter
HALF = torch.bfloat16 if GPU else torch.float16
BRANCHES = [("none", "softmax", False), ("none", "softmax", True), ("all", "softmax", True), ("all", "elu", False),
            ("marginal", "softmax", False), ("marginal", "elu", True)]  # fmt: skip
NAMES = ("q", "k", "v", "q_weight", "q_bias", "k_weight", "k_bias", "proj")
Arguments = tuple[Any, ...]

# Of the reference: torch's gathers and masked attention add up in any order.
pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic")


@pytest.fixture(autouse=True)
def with_all_that_large_problems_get(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem, "LARGE", 0)


def some_arguments(
    tokens: int, dim: int, dtype: torch.dtype, branch: tuple[str, str, bool], *, norm: str | None = None, pinned_tokens: int = 20,
    keep_ratio: float = 0.25, negligible_ratio: float = 0.0, ordered: bool = True, turned: bool = False,
) -> Arguments:  # fmt: skip
    """The flat arguments of the operator, without its backend. q is of another size than k, as its norm is another one."""
    qkv = torch.randn(2, tokens, 3, 2, dim, device=DEVICE).to(dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    linear, feature_map, means = branch
    norms = [NO_NORM, NO_NORM]
    if norm is not None:
        affine = [1 + 0.3 * torch.randn(dim, device=DEVICE) for _ in range(4)]
        norms = [HeadNorm(norm, affine[0], affine[1] if norm == "layer" else None, 1e-5), HeadNorm("rms", affine[2], None, 1e-6)]  # type: ignore[arg-type]
    turned = turned or norm is not None
    return (
        q, k, v, norms[0].weight, norms[0].bias, norms[1].weight, norms[1].bias,
        torch.randn(dim, dim, device=DEVICE) * 0.3 if linear != "none" else None,
        torch.randperm(tokens, device=DEVICE).int() if ordered else None,
        torch.randint(0, 40, (2, tokens, 2), device=DEVICE) if turned else None, min(pinned_tokens, tokens // 3),
        keep_ratio, negligible_ratio,
        norms[0].kind, norms[0].eps, norms[1].kind, norms[1].eps, 100.0 if turned else None, None, linear, feature_map, means,
        BLOCK_Q, BLOCK_K,
    )  # fmt: skip


def by_triton(arguments: Arguments, needed: Sequence[bool], grad: Tensor) -> list[Tensor | None]:
    out, saved = training.train_forward(needed, *arguments)
    keeps = training.keeps(needed, training.Call(*arguments))
    arguments = tuple(x if keep or not isinstance(x, Tensor) else None for x, keep in zip(arguments, keeps, strict=True))
    return training.train_backward(grad, out if any(needed[:7]) else None, saved, needed, *arguments)


def by_autograd(
    arguments: Arguments, needed: Sequence[bool], grad: Tensor, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> list[Tensor | None]:
    """Through the naive twin, with the block map of the Triton kernels."""
    call = training.Call(*arguments)
    prepared = call.prepared(triton=True)
    means = prepared.q_mean, prepared.k_mean
    chosen = training.block_map_with_bits(*means, **call.blocks).kv_indices, block_map(*means, **call.blocks)[1]
    monkeypatch.setattr(operator, "block_map", lambda *_, **__: chosen)
    tensors = [x if x is None else x.detach().to(torch.float64 if wide else x.dtype) for x in arguments[:8]]
    leaves = [x if x is None else x.requires_grad_(need) for x, need in zip(tensors, needed, strict=True)]
    out = operator.run(*leaves, *arguments[8:], "naive", needs_grad=True)  # type: ignore[arg-type]
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, grad.to(out.dtype)))
    return [next(found) if x is not None and x.requires_grad else None for x in leaves]


def assert_same_bits(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    assert all(x is y is None or torch.equal(x, y) for x, y in zip(found, expected, strict=True))  # type: ignore[arg-type]


def assert_gradients(arguments: Arguments, monkeypatch: pytest.MonkeyPatch, needed: Sequence[bool] | None = None) -> None:
    """As near to FP64 as autograd in the same dtype, within a factor; half precision rounds more operands than autograd does."""
    q = arguments[0]
    if GPU and why_not_triton(q, needs_grad=True) is not None:
        pytest.skip(why_not_triton(q, needs_grad=True))
    needed = [x is not None for x in arguments[:8]] if needed is None else needed
    grad = torch.randn(q.shape, device=DEVICE).to(q.dtype)
    found = by_triton(arguments, needed, grad)
    same = by_autograd(arguments, needed, grad, False, monkeypatch)
    exact = by_autograd(arguments, needed, grad, True, monkeypatch)
    for name, need, got, torch_result, reference, like in zip(NAMES, needed, found, same, exact, arguments, strict=False):
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


@pytest.mark.parametrize("branch", BRANCHES, ids=str)
@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_gradients(tokens: int, dtype: torch.dtype, branch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_gradients(some_arguments(tokens, 64 if GPU else 32, dtype, branch), monkeypatch)


@pytest.mark.parametrize("branch", [BRANCHES[2], BRANCHES[5]], ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dim", [80, 128] if GPU else [80])
def test_gradients_through_norms_and_rotary_embedding(dim: int, norm: str, branch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_gradients(some_arguments(LENGTHS[-1], dim, HALF, branch, norm=norm), monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("branch", [*BRANCHES[1:3], *BRANCHES[4:]], ids=str)
@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.bfloat16), (64, torch.float32), (128, torch.float16)])
def test_gradients_with_blocks_of_128_keys(dim: int, dtype: torch.dtype, branch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are read in several tiles."""
    assert_gradients((*some_arguments(1374, dim, dtype, branch)[:-1], 128), monkeypatch)


@pytest.mark.parametrize("branch", [BRANCHES[2], BRANCHES[4]], ids=str)
def test_gradients_through_a_rotary_embedding_alone(branch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_gradients(some_arguments(LENGTHS[-1], 32, torch.float32, branch, turned=True), monkeypatch)


@pytest.mark.parametrize("branch", BRANCHES, ids=str)
@pytest.mark.parametrize(("pinned_tokens", "keep_ratio"), [(0, 0.01), (10**6, 0.3), (5, 1.0)])
def test_gradients_at_the_edges(pinned_tokens: int, keep_ratio: float, branch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block kept and none pinned; a third of all pinned; all kept; and no order."""
    arguments = some_arguments(
        LENGTHS[-2] + 1, 32, torch.float32, branch, pinned_tokens=pinned_tokens, keep_ratio=keep_ratio, ordered=False
    )  # fmt: skip
    assert_gradients(arguments, monkeypatch)


@pytest.mark.parametrize("branch", [BRANCHES[1], BRANCHES[2], *BRANCHES[4:]], ids=str)
@pytest.mark.parametrize("negligible_ratio", [0.3, 1.0])
def test_gradients_with_negligible_blocks(negligible_ratio: float, branch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some, and all that are not critical."""
    assert_gradients(some_arguments(LENGTHS[-1], 32, torch.float32, branch, negligible_ratio=negligible_ratio), monkeypatch)


@pytest.mark.parametrize("learns", [("proj",), ("q",), ("v", "k_weight"), ("q_weight",), ("k", "proj")], ids=str)
@pytest.mark.parametrize("branch", [BRANCHES[2], BRANCHES[4]], ids=str)
def test_only_what_is_asked_for(learns: tuple[str, ...], branch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = some_arguments(LENGTHS[-1], 32, torch.float32, branch, norm="layer")
    assert_gradients(arguments, monkeypatch, [name in learns for name in NAMES])


def test_gradients_in_groups_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any grouping gives the same bits."""
    arguments = some_arguments(LENGTHS[-1], 32, HALF, ("marginal", "softmax", True))
    needed, grad = [x is not None for x in arguments[:8]], torch.randn(arguments[0].shape, device=DEVICE).to(HALF)
    whole = by_triton(arguments, needed, grad)
    monkeypatch.setattr(marginal_kernels, "GROUP_BYTES", 1)
    monkeypatch.setattr(marginal_kernels, "MAX_GROUPS", 3)
    grouped = by_triton(arguments, needed, grad)
    assert_same_bits(whole, grouped)


def test_norms_learn_where_a_site_runs_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though their queries and keys do not."""
    monkeypatch.setattr("lite3r_plugin.attention.module.use_triton", lambda backend, v: backend != "naive")
    site = AttentionSite("site", "global", 32, Routed())
    module = SparseLinearAttention(nn.Linear(1, 1), site, ModelState("test", Lite3RConfig()), sparse=True)
    weight = torch.ones(32, device=DEVICE, requires_grad=True)
    q, k, v = torch.randn(3, 1, 2, 50, 32, device=DEVICE).unbind(0)
    out = module.dense(Heads(q, k, v, q_norm=HeadNorm("rms", weight, None, 1e-6)))
    assert torch.autograd.grad(out.square().sum(), weight)[0].norm() > 0


def test_gradients_are_deterministic() -> None:
    arguments = some_arguments(LENGTHS[-1], 32, HALF, ("marginal", "softmax", True))
    needed, grad = [x is not None for x in arguments[:8]], torch.randn(arguments[0].shape, device=DEVICE).to(HALF)
    first, second = by_triton(arguments, needed, grad), by_triton(arguments, needed, grad)
    assert_same_bits(first, second)


@pytest.mark.parametrize("norm", [None, "layer"])
@pytest.mark.parametrize("branch", [BRANCHES[2], BRANCHES[4], BRANCHES[5]], ids=str)
def test_nothing_is_read_that_was_not_written(branch: Any, norm: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With NaN in all new memory gradients have the same bits."""
    arguments = some_arguments(LENGTHS[-1], 32, torch.float32, branch, norm=norm)
    needed, grad = [x is not None for x in arguments[:8]], torch.randn(arguments[0].shape, device=DEVICE)
    clean = by_triton(arguments, needed, grad)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    found = by_triton(arguments, needed, grad)
    assert_same_bits(clean, found)


@pytest.mark.parametrize("options", [dict(keep_ratio=1.0), dict(negligible_ratio=1.0), dict(pinned_tokens=10**6)], ids=str)
def test_what_is_kept_without_marginal_blocks_is_written(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = some_arguments(LENGTHS[-1], 32, torch.float32, ("marginal", "softmax", True), **options)
    arguments = (*arguments[:10], LENGTHS[-1] if "pinned_tokens" in options else 0, *arguments[11:])
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
    _, saved = training.train_forward([x is not None for x in arguments[:8]], *arguments)
    states = dict(zip(training._kept(training.Call(*arguments)), saved, strict=True))
    assert not states["state"].any()
    assert not states["total"].any()


def test_values_are_centred_on_their_mean() -> None:
    """Also where the last block is short: else gradients are differences of larger numbers than need be."""
    arguments = some_arguments(3 * BLOCK_K + 1, 32, torch.float32, ("marginal", "softmax", False))
    v = arguments[2] + 10 * torch.randn(arguments[2].shape, device=DEVICE)
    arguments = (*arguments[:2], v, *arguments[3:])
    _, saved = training.train_forward([x is not None for x in arguments[:8]], *arguments)
    mu = dict(zip(training._kept(training.Call(*arguments)), saved, strict=True))["mu"]
    torch.testing.assert_close(mu, v.mean(2).flatten(0, 1))


@pytest.mark.parametrize(("unpack", "dim", "norm"), [("strides", 32, None), ("strides", 32, "rms"), ("addresses", 64, None)])
def test_saved_tensors_may_come_back_otherwise(unpack: str, dim: int, norm: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from `torch.autograd.graph.save_on_cpu(pin_memory=True)`, and worse."""
    if not GPU:
        monkeypatch.setattr(backward_options, "has_tma", lambda _: True)
    arguments = some_arguments(3 * BLOCK_K + 1, dim, HALF, ("marginal", "softmax", True), norm=norm)

    def gradients() -> list[Tensor]:
        """Of all, and of Proj alone, for which other things are kept."""
        found = []
        for first in (0, 7):
            leaves = [x if x is None else x.detach().clone().requires_grad_(i >= first) for i, x in enumerate(arguments[:8])]
            out = training.SparseLinearAttention.apply(*leaves, *arguments[8:])
            found += torch.autograd.grad(out, [x for x in leaves[first:] if x is not None], torch.ones_like(out))
        return found

    def back(x: Tensor) -> Tensor:
        if unpack == "strides":
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)

    expected = gradients()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, back):
        found = gradients()
    assert all(map(torch.equal, found, expected))


def test_small_gradients_in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over a query block, divided by its size, would be below what FP16 can hold."""
    arguments = some_arguments(LENGTHS[-1], 32, torch.float16, ("marginal", "softmax", True), pinned_tokens=0)
    grad = (5e-6 * torch.randn(arguments[0].shape, device=DEVICE)).half()
    needed = [x is not None for x in arguments[:8]]
    found, exact = by_triton(arguments, needed, grad)[7], by_autograd(arguments, needed, grad, True, monkeypatch)[7]
    assert found is not None
    assert exact is not None
    assert relative_error(found, exact) < 2 * torch.finfo(torch.float16).eps


def test_a_bias_that_an_rms_norm_does_not_add_gets_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = list(some_arguments(LENGTHS[-1], 32, torch.float32, BRANCHES[0], norm="rms"))
    arguments[4] = torch.randn(32, device=DEVICE)
    found = by_triton(tuple(arguments), [x is not None for x in arguments[:8]], torch.randn(arguments[0].shape, device=DEVICE))
    assert found[4] is not None
    assert not found[4].any()


@pytest.mark.parametrize("dim", [64, 128] if GPU else [64])
def test_small_problems_have_the_same_gradients(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In turn and by address, to the bit."""
    if not GPU:
        monkeypatch.setattr(backward_options, "has_tma", lambda _: True)  # which is interpreted too
    arguments = some_arguments(3 * BLOCK_K + 1, dim, HALF, ("marginal", "softmax", True))
    needed, grad = [x is not None for x in arguments[:8]], torch.randn(arguments[0].shape, device=DEVICE).to(HALF)
    large = by_triton(arguments, needed, grad)
    monkeypatch.setattr(problem, "LARGE", 1 << 62)
    small = by_triton(arguments, needed, grad)
    assert_same_bits(large, small)


@pytest.mark.gpu
@pytest.mark.parametrize("branch", [BRANCHES[1], BRANCHES[3], BRANCHES[5]], ids=str)
@pytest.mark.parametrize("norm", [None, "layer"])
def test_streams_wait_for_each_other(branch: Any, norm: str | None) -> None:
    """Gradients have the same bits where the GPU comes late to all that they are made of, and their memory is written to after them."""
    arguments = some_arguments(LENGTHS[-1], 64, HALF, branch, norm=norm)
    needed, grad = [x is not None for x in arguments[:8]], torch.randn(arguments[0].shape, device=DEVICE).to(HALF)
    expected = by_triton(arguments, needed, grad)
    torch.cuda.synchronize()
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream(priority=-1)):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)  # cycles
            late = [x * 1 if isinstance(x, Tensor) else x for x in arguments]
            found = by_triton(tuple(late), needed, grad * 1)
            copies = [None if x is None else x.clone() for x in found]
            shapes = [x.shape for x in found if x is not None]
            del late, found
            for shape in shapes * 4:
                torch.full(shape, float("nan"), device=DEVICE, dtype=HALF)
            torch.cuda.synchronize()
        assert_same_bits(expected, copies)


def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`make`, whose floating-point tensors come full of NaN, others of a large number."""
    return lambda *args, **kwargs: (x := make(*args, **kwargs)).fill_(float("nan") if x.is_floating_point() else 1 << 20)


@pytest.mark.parametrize(("rows", "columns", "kept", "pinned"), [(1, 1, 1, 0), (7, 40, 3, 2), (300, 33, 1, 0), (9, 70, 70, 9)])
@pytest.mark.parametrize("at_once", [32, 1024])
def test_the_map_by_key_block(rows: int, columns: int, kept: int, pinned: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pair once, in order; early parts are all but the last part of each list."""
    monkeypatch.setattr(transpose_kernels, "COLUMNS", at_once)
    chosen = torch.rand(2, 2, rows, columns).argsort(-1)[..., :kept].sort(-1).values
    mask = torch.zeros(2, 2, rows, columns, dtype=torch.int64).scatter(-1, chosen, 1)
    words = torch.nn.functional.pad(mask, (0, -columns % 32)).unflatten(-1, (-1, 32)) << torch.arange(32)
    bits = words.sum(-1).to(torch.int32).to(DEVICE)
    assert torch.equal(transpose_kernels.indices_of(bits, kept).cpu().long(), chosen)
    work = transpose_kernels.by_key_block(bits, columns=columns, kept=kept, pinned=pinned)
    lists, starts, early_starts, early_columns = (x.cpu().flatten(0, 1) for x in work[:4])
    mask[:, :, :pinned] = 1
    for head, of_head in enumerate(mask.flatten(0, 1)):
        slots = []
        for column in range(columns):
            expected = of_head[:, column].nonzero().flatten()
            assert torch.equal(lists[head, starts[head, column] : starts[head, column + 1]].long(), expected)
            early = max(0, len(expected) - 1) // work.part
            assert early_starts[head, column + 1] - early_starts[head, column] == early
            slots += [column] * early
        assert early_columns[head].tolist() == slots + [columns] * (early_columns.shape[-1] - len(slots))
