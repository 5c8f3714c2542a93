"""The whole operator from its public entry: what it promises on every path, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sla_cases import BLOCKS as KERNEL_BLOCKS
from sla_cases import DEVICE, LENGTHS, random_qkv
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lite3r_plugin.errors import ConfigError, WeightsError
from lite3r_plugin.ops import dispatch
from lite3r_plugin.ops.block_map import block_map, kept_blocks, key_spread
from lite3r_plugin.ops.dispatch import triton_installed
from lite3r_plugin.ops.qk_norm_rope import HeadNorm, norm_rope
from lite3r_plugin.ops.qk_norm_rope import naive as prepare
from lite3r_plugin.ops.sla import KeyTokens, SegmentMask, linear_attention, naive, sparse_linear_attention

B, H, D = 2, 2, 8
BLOCK_Q, BLOCK_K = 32, 16
EXACT: dict[str, Any] = dict(rtol=1e-11, atol=1e-11)


def qkv(tokens: int, batch: int = B, heads: int = H, dim: int = D, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [2 * torch.randn(batch, heads, tokens, dim, dtype=dtype) for _ in range(3)]


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


def test_keys_may_be_pinned_that_are_no_pinned_queries() -> None:
    """And queries that are no pinned keys, for whoever wants them."""
    q, k, v = qkv(160)
    options: dict[str, Any] = dict(keep_ratio=0.01, block_q=BLOCK_Q, block_k=BLOCK_K)
    dense, changed = F.scaled_dot_product_attention(q, k, v), v.clone()
    changed[:, :, :20] += 1000.0
    keys = dict(pinned_tokens=0, pinned_keys=20, **options)
    out = sparse_linear_attention(q, k, v, **keys)
    assert not torch.allclose(out[:, :, :20], dense[:, :, :20])
    assert (sparse_linear_attention(q, k, changed, **keys) - out).amin() > 0
    queries = dict(pinned_tokens=20, pinned_keys=0, **options)
    out = sparse_linear_attention(q, k, v, **queries)
    torch.testing.assert_close(out[:, :, :20], dense[:, :, :20], **EXACT)
    differ = (sparse_linear_attention(q, k, changed, **queries) != out).any(-1)
    assert differ[:, :, :20].all()
    assert not differ.all()


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
        changed_out = sparse_linear_attention(q, k, changed, negligible_ratio=0.2, **full, **options)
        torch.testing.assert_close(changed_out[:, :, block], out[:, :, block], **EXACT)
    nothing_else = sparse_linear_attention(q, k, v, negligible_ratio=1.0, **full, **options)
    torch.testing.assert_close(nothing_else, sparse_linear_attention(q, k, v, **options), **EXACT)


@pytest.mark.parametrize("cross", [False, True])
def test_blocks_are_chosen_by_error_among_those_that_are_free(cross: bool) -> None:
    """Of keys in order, with the scale of the call: those that hide most, and pinned ones."""
    q, k, v = qkv(150)
    order, key_order = torch.randperm(150), torch.randperm(150)
    keys = KeyTokens(key_order, pinned_tokens=3) if cross else None
    out = sparse_linear_attention(
        q, k, v, keep_ratio=0.3, order=order, pinned_tokens=20, keys=keys, scale=0.7, block_means=True, block_choice="error",
        block_q=BLOCK_Q, block_k=BLOCK_K,
    )  # fmt: skip
    q, k, v = q[:, :, order], *(x[:, :, key_order if cross else order] for x in (k, v))
    means = [prepare.block_means(x, block) for x, block in ((q, BLOCK_Q), (k, BLOCK_K))]
    pinned = 1 if cross else 2
    kept = kept_blocks(10, 0.3, pinned)
    chosen, _ = block_map(*means, kept=kept, pinned=pinned, by_error=key_spread(k, scale=0.7, block_k=BLOCK_K))
    assert not torch.equal(chosen, block_map(*means, kept=kept, pinned=pinned)[0])
    expected, _ = naive.sparse_linear_attention(q, k, v, chosen, pinned=1, scale=0.7, block_means=True, block_q=BLOCK_Q, block_k=BLOCK_K)
    torch.testing.assert_close(out[:, :, order], expected, **EXACT)


def test_blocks_chosen_by_error_hold_nothing_of_later_frames() -> None:
    q, k, v = qkv(160)
    options: dict[str, Any] = dict(
        keep_ratio=0.2, mask=SegmentMask(FRAMES), block_means=True, block_choice="error", block_q=BLOCK_Q, block_k=BLOCK_K
    )
    late = FRAMES > 3
    out = sparse_linear_attention(q, k, v, **options)
    other = sparse_linear_attention(q, *(torch.where(late[:, None], 50.0 + x, x) for x in (k, v)), **options)
    assert torch.equal(other[:, :, ~late], out[:, :, ~late])
    by_mean = sparse_linear_attention(q, k, v, **options | dict(block_choice="mean"))
    assert not torch.allclose(by_mean, out)


def dense_mask(mask: SegmentMask) -> Tensor:
    """``[M, N]`` bool, in host order."""
    keys = mask.queries if mask.keys is None else mask.keys
    distance = keys - mask.queries[:, None]
    visible = torch.ones_like(distance, dtype=torch.bool)
    visible &= True if mask.before is None else (distance >= -mask.before) | (keys <= (-1 if mask.sink is None else mask.sink))
    return visible & (True if mask.after is None else distance <= mask.after)


FRAMES = torch.arange(160) * 7 // 160
SEGMENT_MASKS = {
    "frame-causal": SegmentMask(FRAMES), "window": SegmentMask(FRAMES, before=1, after=1), "causal window": SegmentMask(FRAMES, before=2),
    "block-diagonal": SegmentMask(FRAMES, before=0), "all": SegmentMask(FRAMES, after=None),
    "causal window and the first two": SegmentMask(FRAMES, before=1, sink=1),
    "numbers beyond 32 bits": SegmentMask((1 << 62) - (7 - FRAMES) * (1 << 29), before=1 << 30, sink=(1 << 31) - 1),
}  # fmt: skip


@pytest.mark.parametrize("name", SEGMENT_MASKS)
@pytest.mark.parametrize("cross", [False, True])
def test_a_mask_with_everything_kept_is_masked_attention(name: str, cross: bool) -> None:
    """In host order, whatever the order within is, and with pins."""
    mask, (q, k, v) = SEGMENT_MASKS[name], qkv(160)
    keys = None
    if cross:
        q, mask = q[:, :, 90:], mask._replace(queries=FRAMES[90:], keys=FRAMES)
        keys = KeyTokens(torch.randperm(160), pinned_tokens=5)
    options: dict[str, Any] = dict(pinned_tokens=9, keys=keys, block_q=BLOCK_Q, block_k=BLOCK_K, order=torch.randperm(q.shape[2]))
    out, lse = sparse_linear_attention(q, k, v, keep_ratio=1.0, mask=mask, return_lse=True, **options)
    scores = (q @ k.mT * D**-0.5).masked_fill(~dense_mask(mask), float("-inf"))
    torch.testing.assert_close((out, lse), (scores.softmax(-1) @ v, scores.logsumexp(-1)), **EXACT)
    sparse = sparse_linear_attention(
        q, k, v, keep_ratio=0.2, mask=mask, **options | dict(order=None, keys=keys and keys._replace(order=None))
    )
    assert name == "block-diagonal" or not torch.allclose(sparse, out)


@pytest.mark.parametrize("linear", ["none", "all", "marginal"])
@pytest.mark.parametrize("special_first", [False, True])
def test_nothing_of_later_frames_reaches_earlier_ones(linear: str, special_first: bool) -> None:
    """Neither by means and states of blocks nor by the choice of blocks, to the bit; and gradients stay within what is seen."""
    frames = torch.cat((torch.arange(7), FRAMES[7:])) if special_first else FRAMES
    options: dict[str, Any] = dict(
        keep_ratio=0.2, negligible_ratio=0.2, mask=SegmentMask(frames), pinned_tokens=7, linear=linear, block_means=True,
        proj=torch.randn(D, D, dtype=torch.float64) if linear != "none" else None, block_q=BLOCK_Q, block_k=BLOCK_K,
    )  # fmt: skip
    q, k, v = (x.requires_grad_() for x in qkv(160))
    out = sparse_linear_attention(q, k, v, **options)
    late = frames > 3
    changed = [torch.where(late[:, None], 50.0 + x, x).detach() for x in (k, v)]
    other = sparse_linear_attention(q, *changed, **options)
    assert torch.equal(other[:, :, ~late], out[:, :, ~late])
    assert not torch.allclose(other[:, :, late], out[:, :, late])
    for x, grad in zip((q, k, v), torch.autograd.grad(out[:, :, ~late].sum(), (q, k, v)), strict=True):
        assert not grad[:, :, late].any()
        assert grad[:, :, ~late].isfinite().all()
        assert grad[:, :, ~late].any() or x is q


@pytest.mark.parametrize("linear", ["none", "all", "marginal"])
def test_gradients_with_a_mask(linear: str) -> None:
    q, k, v = (x[:1, :1, :, :4].clone().requires_grad_() for x in qkv(77))
    proj = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    mask = SegmentMask(torch.arange(77) // 20 + 1, torch.arange(77) // 20 + 1, 1, 0)

    def run(q: Tensor, k: Tensor, v: Tensor, proj: Tensor) -> Any:
        return sparse_linear_attention(
            q, k, v, keep_ratio=0.1, keys=KeyTokens(), mask=mask, linear=linear, proj=proj if linear != "none" else None, block_means=True,
            block_q=16, block_k=8, return_lse=True,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, (q, k, v, proj), fast_mode=True)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (SegmentMask(torch.zeros(39, dtype=torch.int32)), "mask.queries names the segments of 39 tokens, but there are 40"),
        (SegmentMask(torch.zeros(40)), "mask.queries holds a segment for each token"),
        (SegmentMask(torch.zeros(40).long(), torch.zeros(2).long()), "mask.keys names"),
        (SegmentMask(torch.zeros(40).long(), before=-1), "mask.before is a number of segments"),
        (SegmentMask(torch.zeros(40).long(), after=1.5), "mask.after is a number of segments"),  # type: ignore[arg-type]
    ],
)
def test_masks_that_do_not_fit_are_refused(mask: SegmentMask, message: str) -> None:
    x = torch.randn(1, 1, 40, 16)
    with pytest.raises(ConfigError, match=message):
        sparse_linear_attention(x, x, x, keep_ratio=0.5, mask=mask)
    with pytest.raises(ConfigError, match="must name their segments"):
        sparse_linear_attention(x, x, x, keep_ratio=0.5, keys=KeyTokens(), mask=SegmentMask(torch.zeros(40).long()))


@pytest.mark.parametrize("keys", [40, 65, 97, 200])
def test_keys_may_be_other_tokens(keys: int) -> None:
    """In any number, as many as queries too, with an order of their own, positions, and pins that hold for them alone."""
    q, (_, k, v) = qkv(97)[0], qkv(keys)
    positions, of_keys = torch.randint(0, 9, (1, 97, 2)), torch.randint(0, 9, (1, keys, 2))
    options: dict[str, Any] = dict(order=torch.randperm(97), rope_base=100.0, positions=positions, block_q=BLOCK_Q, block_k=BLOCK_K)
    side = KeyTokens(torch.randperm(keys), positions=of_keys)
    out, lse = sparse_linear_attention(q, k, v, keep_ratio=1.0, keys=side, return_lse=True, **options)
    turned_q, turned_k = (prepare.norm_rope(x, positions=p, rope_base=100.0) for x, p in ((q, positions), (k, of_keys)))
    scores = turned_q @ turned_k.mT * D**-0.5
    torch.testing.assert_close((out, lse), (scores.softmax(-1) @ v, scores.logsumexp(-1)), **EXACT)
    few = sparse_linear_attention(q, k, v, keep_ratio=0.1, keys=side, **options)
    pinned = sparse_linear_attention(q, k, v, keep_ratio=0.1, keys=side._replace(pinned_tokens=keys), **options)
    torch.testing.assert_close(pinned, out, **EXACT)
    assert not torch.allclose(few, out)
    some = sparse_linear_attention(q, k, v, keep_ratio=0.1, keys=side, pinned_tokens=32, **options)
    first = options["order"][:32]
    torch.testing.assert_close(some[:, :, first], out[:, :, first], **EXACT)
    torch.testing.assert_close(some[:, :, options["order"][32:]], few[:, :, options["order"][32:]], **EXACT)


@pytest.mark.parametrize("linear", ["none", "marginal"])
def test_of_no_keys_comes_nothing(linear: str) -> None:
    """Zeros and -inf, which `merge` takes for no part, with gradients of zero."""
    q, (_, k, v) = qkv(9)[0].requires_grad_(), qkv(0)
    proj = torch.eye(D, dtype=torch.float64)
    out, lse = sparse_linear_attention(q, k, v, keep_ratio=0.5, keys=KeyTokens(), linear=linear, proj=proj, return_lse=True)
    assert not out.any()
    assert lse.shape == (B, H, 9)
    assert lse.isneginf().all()
    grad = torch.autograd.grad(out.sum() + lse.sum(), q)[0]
    assert not grad.any()
    nothing = sparse_linear_attention(k, q, q, keep_ratio=0.5, keys=KeyTokens())
    assert nothing.shape == (B, H, 0, D)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(keys=None), r"say with keys=KeyTokens"),
        (dict(keys=KeyTokens(order=torch.arange(40))), "keys.order names 40 tokens, but k has 60"),
        (dict(keys=KeyTokens(order=torch.arange(60.0))), "keys.order is"),
        (dict(keys=KeyTokens(positions=torch.zeros(1, 40, 2))), "keys.positions are"),
        (dict(keys=KeyTokens(pinned_tokens=61)), r"keys.pinned_tokens must be in \[0, 60\]"),
        (dict(order=torch.arange(60)), "order names 60 tokens, but q has 40"),
        (dict(v=torch.ones(1, 2, 59, 16)), r"k and v are \[B, H, N, D\]"),
        (dict(q=torch.ones(1, 4, 40, 16)), "expand grouped"),
        (dict(keys=KeyTokens(order=torch.arange(60, device="meta"))), "keys.order is on meta"),
    ],
)
def test_what_is_refused_of_other_tokens(options: dict[str, Any], message: str) -> None:
    q, (k, v) = torch.randn(1, 2, 40, 16), torch.randn(2, 1, 2, 60, 16)
    with pytest.raises((ConfigError, WeightsError), match=message):
        sparse_linear_attention(**(dict(q=q, k=k, v=v, keep_ratio=0.5, keys=KeyTokens()) | options))


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


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("option", "values", "message"),
    [
        ("scale", (-1.0, NAN, INF, "1", True), "scale is .*a finite number and not negative"),
        ("rope_base", (0, -1.0, NAN, INF, "100"), "rope_base is a positive number"),
        ("keep_ratio", (0, 1.5, NAN, None, 10**5000), "keep_ratio must be in"),
        ("negligible_ratio", (-0.1, NAN, "0.1", torch.ones(2)), "negligible_ratio must be in"),
        ("block_q", (0, -16, 16.0, True, 10**5000), "block_q is a number of tokens"),
        ("block_k", (0, NAN, 2**16), "block_k is a number of tokens"),
        ("pinned_tokens", (-1, 9, 2.5, NAN), "pinned_tokens must be in"),
        ("pinned_keys", (-1, 9, 2.5, NAN), "pinned_keys must be in"),
        ("feature_map", (["softmax"], torch.ones(2), None), "feature_map must be one of"),
        ("block_choice", ("means", None, torch.ones(2)), "block_choice must be one of"),
    ],
)
def test_options_out_of_their_ranges_are_refused(option: str, values: tuple[object, ...], message: str) -> None:
    q = torch.randn(1, 1, 8, 16)
    for value in values:
        with pytest.raises(ConfigError, match=message):
            sparse_linear_attention(q, q, q, **({"keep_ratio": 1.0} | {option: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(0, 2, 50, 8), (1, 2, 0, 8), (2, 0, 50, 8), (0, 2, 0, 8)])
@pytest.mark.parametrize("linear", ["none", "marginal"])
@pytest.mark.parametrize("compiled", [False, True])
def test_of_nothing_comes_nothing_with_gradients(shape: tuple[int, ...], linear: str, compiled: bool) -> None:
    q, k, v = (torch.rand(shape, requires_grad=True) for _ in range(3))
    proj = torch.rand(8, 8, requires_grad=True)

    def attend(*inputs: torch.Tensor) -> torch.Tensor:
        return sparse_linear_attention(*inputs, keep_ratio=0.5, linear=linear, proj=proj, block_means=True, block_q=16, block_k=16)

    run = torch.compile(attend, backend="eager") if compiled else attend
    out = run(q, k, v)
    assert out.shape == shape
    out.sum().backward()
    for x in (q, k, v, *([proj] if linear != "none" else [])):
        assert x.grad is not None
        assert x.grad.shape == x.shape
        assert not x.grad.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(keep_ratio=1.5), r"keep_ratio must be in \(0, 1\]"),
        (dict(negligible_ratio=float("nan")), "negligible_ratio must be"),
        (dict(feature_map="relu"), "feature_map must be one of"),
        (dict(backend="cuda"), "backend must be one of"),
        (dict(block_choice="error"), "needs block_means=True"),
        (dict(block_choice="error", block_means=True, negligible_ratio=0.2), "negligible_ratio is 0.2: leave it at 0"),
        (dict(pinned_tokens=-1), "pinned_tokens must be in"),
        (dict(pinned_keys=3, keys=KeyTokens()), "leave pinned_keys out"),
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


@pytest.mark.parametrize("name", ["q", "k", "v", "proj", "order", "positions", "q_norm", "k_norm"])
def test_tensors_without_values_are_refused(name: str) -> None:
    """Alone; where all are on the meta device, so is the output."""
    q, k, v = torch.randn(3, 1, 2, 40, 16)
    norms = {name: HeadNorm("layer", torch.ones(16), torch.zeros(16), 1e-5) for name in ("q_norm", "k_norm")}
    given = dict(q=q, k=k, v=v, proj=torch.eye(16), order=torch.arange(40), positions=torch.zeros(1, 40, 2), **norms)
    options: dict[str, Any] = dict(keep_ratio=0.5, linear="all", rope_base=100.0, block_q=16, block_k=16)
    x = given[name]
    without = x.to("meta") if isinstance(x, Tensor) else x._replace(bias=x.bias.to("meta"))
    with pytest.raises(WeightsError, match=r"is on (meta|cpu) and the values on .*: tensors on the meta device have none"):
        sparse_linear_attention(**(given | options | {name: without}))
    dense: dict[str, Any] = {key: given[key] for key in ("q", "k", "positions", "q_norm", "k_norm")} | dict(rope_base=100.0, triton=False)
    if name in dense:
        with pytest.raises(WeightsError, match="tensors on the meta device have none"):
            norm_rope(**(dense | {name: without}))
    if name in ("q", "k", "v", "proj"):
        with pytest.raises(WeightsError, match="tensors on the meta device have none"):
            linear_attention(**({key: given[key] for key in ("q", "k", "v", "proj")} | {name: without}), feature_map="elu")
    everything = {key: x.to("meta") if isinstance(x, Tensor) else None for key, x in given.items()}
    assert sparse_linear_attention(**(everything | options)).is_meta


def test_nothing_to_attend_to() -> None:
    for shape in ((0, 2, 40, 16), (1, 2, 0, 16)):
        assert sparse_linear_attention(*torch.randn(3, *shape), keep_ratio=0.5).shape == shape


@pytest.mark.parametrize("linear", ["all", "marginal"])
def test_autocast_does_not_reach_into_the_operator(linear: str) -> None:
    q, k, v = random_qkv(LENGTHS[-1], 64, torch.float32)
    options: dict[str, Any] = dict(
        keep_ratio=0.3, linear=linear, proj=torch.randn(64, 64, device=DEVICE), block_means=True, **KERNEL_BLOCKS
    )
    plain = sparse_linear_attention(q, k, v, **options)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(sparse_linear_attention(q, k, v, **options), plain)


@pytest.mark.skipif(not triton_installed(), reason="needs triton")
def test_strides_of_what_is_not_q_k_v(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels read them as they lie in memory."""
    monkeypatch.setattr(dispatch, "why_not_triton", lambda *_, **__: None)  # interpreted, where there is no GPU
    q, k, v = random_qkv(49, 32, torch.float32, batch=1)
    tokens = q.shape[2]
    order = torch.stack((torch.randperm(tokens, device=DEVICE), torch.arange(tokens, device=DEVICE)), 1)[:, 0].int()
    proj, weight = torch.randn(32, 32, device=DEVICE).T, torch.rand(64, device=DEVICE)[::2]
    pairs = torch.stack((order, order), 1)[:, 0]
    assert not any(x.is_contiguous() for x in (proj, weight, pairs))
    for linear in ("all", "marginal"):
        options: dict[str, Any] = dict(keep_ratio=0.3, linear=linear, block_means=True, backend="triton", **KERNEL_BLOCKS)
        results = [
            sparse_linear_attention(q, k, v, proj=p, order=o, q_norm=HeadNorm("rms", w, None, 1e-6), **options)
            for p, o, w in ((proj, pairs, weight), (proj.contiguous(), pairs.contiguous(), weight.contiguous()))
        ]
        assert torch.equal(*results)
