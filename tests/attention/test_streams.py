"""Frame by frame: what a site keeps beside the host's cache is used only while it is true."""

from __future__ import annotations

import copy
import gc
import importlib
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import streaming_hosts
import torch
from numerics import relative_error
from streaming_hosts import FinishedCache, RawCache, frames, make

from lite3r_plugin import apply_lite3r, describe, lite3r_disabled
from lite3r_plugin.adapter import TokenLayout, Views
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.attention import masks
from lite3r_plugin.attention.masks import Masks, frame_causal
from lite3r_plugin.ops.dispatch import SlowPathWarning
from lite3r_plugin.ops.sla import KeyCache
from lite3r_plugin.testing import TEST_CONFIG

KINDS = [RawCache, FinishedCache]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens were prepared, in the order of the calls of all sites."""
    seen: list[int] = []
    extend = KeyCache.extend

    def count(cache: KeyCache, q: Any, k: Any, v: Any, **options: Any) -> Any:
        seen.append(k.shape[2])
        return extend(cache, q, k, v, **options)

    monkeypatch.setattr(KeyCache, "extend", count)
    return seen


def exact(kind: type[Any]) -> tuple[streaming_hosts.Aggregator, streaming_hosts.Aggregator]:
    """The dense model, and one with Lite3R that drops nothing."""
    model = make(kind)
    apply_lite3r(model, TEST_CONFIG, keep_ratio=1.0)
    return make(kind), model


TOKENS = 4 * 6 + 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_that_of_the_dense_model_and_prepares_each_frame_once(kind: type[Any], prepared: list[int]) -> None:
    dense, model = exact(kind)
    past: list[Any] = [None] * 2
    expected: list[Any] = [None] * 2
    prepared.clear()
    torch.testing.assert_close(model.stream(frames(), past), dense.stream(frames(), expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(past, expected, atol=1e-5, rtol=1e-5)
    assert type(past[0]) is type(expected[0])
    assert prepared == [TOKENS] * 10
    torch.testing.assert_close(model(frames()), dense(frames()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_goes_two_ways(kind: type[Any]) -> None:
    dense, model = exact(kind)
    begun = [None] * 2
    model.stream(frames(3), begun)
    one, other = list(begun), list(begun)
    more, else_ = frames(5)[:, 3:], frames(6).flip(1)[:, :2]
    results = [torch.cat((model.stream(more[:, i : i + 1], one), model.stream(else_[:, i : i + 1], other))) for i in range(2)]
    for way, seen in ((0, more), (1, else_)):
        past = [None] * 2
        dense.stream(frames(3), past)
        torch.testing.assert_close(torch.cat([r[way : way + 1] for r in results], 1), dense.stream(seen, past), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", ["written to", "cut", "copied"])
def test_a_cache_that_somebody_changed_is_prepared_anew(kind: type[Any], change: str, prepared: list[int]) -> None:
    dense, model = exact(kind)
    past, expected = [None] * 2, [None] * 2
    model.stream(frames(4), past)
    dense.stream(frames(4), expected)

    def changed(x: Any) -> Any:
        by_frames = x.dim() == 5
        if change == "written to":
            x[:, :, 1] = 0
            return x
        return (x[:, :, 1:] if by_frames else x[:, :, TOKENS:]) if change == "cut" else x.clone()

    for list_ in (past, expected):
        list_[:] = [type(kv)(map(changed, kv)) for kv in list_]
    prepared.clear()
    torch.testing.assert_close(model.stream(frames(6)[:, 4:], past), dense.stream(frames(6)[:, 4:], expected), atol=1e-5, rtol=1e-5)
    assert prepared == [(3 if change == "cut" else 4) * TOKENS, TOKENS] * 2 + [TOKENS] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_of_another_shape_has_other_positions(kind: type[Any]) -> None:
    dense, model = exact(kind)
    past, expected = [None] * 2, [None] * 2
    for height, width in ((56, 84), (84, 56), (84, 56)):
        images = frames(1, height, width)
        torch.testing.assert_close(model.stream(images, past), dense.stream(images, expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_model_takes_a_stream_over(kind: type[Any]) -> None:
    dense, model = exact(kind)
    past, expected = [None] * 2, [None] * 2
    model.stream(frames(3), past)
    with lite3r_disabled(model):
        between = model.stream(frames(4)[:, 3:], past)
    out = torch.cat((between, model.stream(frames(6)[:, 4:], past)), 1)
    dense.stream(frames(3), expected)
    torch.testing.assert_close(out, dense.stream(frames(6)[:, 3:], expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_several_frames_at_once(kind: type[Any]) -> None:
    """What the dense model does with them: StreamVGGT's cache asks for as many in each call."""
    dense, model = exact(kind)
    past, expected = [None] * 2, [None] * 2
    for several in frames(6).split(2 if kind is RawCache else [4, 1, 1], 1):
        torch.testing.assert_close(model(several, past), dense(several, expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_sparse(kind: type[Any], prepared: list[int]) -> None:
    model, dense = make(kind), make(kind).stream(frames(8))
    apply_lite3r(model, TEST_CONFIG, keep_ratio=0.3)
    prepared.clear()
    out = model.stream(frames(8))
    calls = [site.calls for site in describe(model).sites if site.sparse]
    assert [(c.sparse, c.dense, c.host) for c in calls] == [(8, 0, 0)] * 2
    assert calls[0].density is not None
    assert 0.3 < calls[0].density < 0.7
    assert prepared == [TOKENS] * 16
    difference = (out - dense).norm() / dense.norm()
    assert 0.001 < difference < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_copies_begin_with_what_they_are_given(kind: type[Any]) -> None:
    model = make(kind)
    apply_lite3r(model, TEST_CONFIG, keep_ratio=0.3)
    past = [None] * 2
    model.stream(frames(3), past)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    outs = [other.stream(frames(4)[:, 3:], [type(kv)(x.clone() for x in kv) for kv in past]) for other in copies]
    assert torch.equal(*outs)


def test_a_stream_that_nobody_has_any_more_is_freed() -> None:
    model = make()
    apply_lite3r(model, TEST_CONFIG, keep_ratio=0.3)
    model.stream(frames(3))
    gc.collect()
    assert not any(isinstance(x, KeyCache) for x in gc.get_objects())


def test_observers_see_all_keys() -> None:
    model = make()
    apply_lite3r(model, TEST_CONFIG, keep_ratio=0.3)
    plain, seen = model.stream(frames(3)), []
    with model.global_blocks[0].attn.observe(lambda site, inputs, out: seen.append((inputs, out))):
        assert torch.equal(model.stream(frames(3)), plain)
    inputs, out = seen[-1]
    assert (inputs.q.shape[2], inputs.v.shape[2], out.shape[2]) == (TOKENS, 3 * TOKENS, TOKENS)
    assert (inputs.layout.views, inputs.key_layout.views) == (1, 3)


def test_what_takes_its_place_is_given_all_keys() -> None:
    dense, model = make().stream(frames(3)), make()
    apply_lite3r(model, TEST_CONFIG, keep_ratio=0.3)
    first, second = (block.attn for block in model.global_blocks)
    with first.substitute(lambda site, inputs: site.dense(inputs)), second.substitute(lambda site, inputs: site.dense(inputs)):
        torch.testing.assert_close(model.stream(frames(3)), dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_through_the_cache(kind: type[Any]) -> None:
    dense, model = exact(kind)
    grads = []
    for one in (dense, model):
        with torch.enable_grad():
            images = frames(3).requires_grad_()
            one.stream(images)[:, -1].square().sum().backward()
        grads.append(images.grad)
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)
    assert grads[0][:, 0].abs().max() > 0


def test_in_inference_mode_and_then_outside(prepared: list[int]) -> None:
    dense, model = exact(RawCache)
    past, expected = [None] * 2, [None] * 2
    prepared.clear()
    with torch.inference_mode():
        model.stream(frames(2), past)
    dense.stream(frames(2), expected)
    torch.testing.assert_close(model.stream(frames(4)[:, 2:], past), dense.stream(frames(4)[:, 2:], expected), atol=1e-5, rtol=1e-5)
    assert prepared == [TOKENS] * 8


@pytest.mark.parametrize("linear", ["all", "marginal", "none"])
def test_the_branch_of_a_stream_at_keep_1_is_that_of_the_whole_sequence(linear: Any) -> None:
    """A frame sees the frames before it in both: by a cache, and by a mask."""
    model = make()
    apply_lite3r(model, TEST_CONFIG, keep_ratio=1.0, linear_branch=linear)
    for block in model.global_blocks:
        if linear != "none":
            torch.nn.init.normal_(block.attn.proj_lin.weight, std=0.3, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model.stream(frames(3)), model(frames(3)), atol=1e-4, rtol=1e-4)


def test_a_whole_sequence_is_sparse_with_a_frame_causal_mask() -> None:
    """No value comes from a later frame; blocks, which may hold tokens of two frames, are chosen as a whole."""
    model, dense = make(), make()(frames(6))
    apply_lite3r(model, TEST_CONFIG, keep_ratio=0.2, pin="none")
    out = model(frames(6))
    assert all((site.calls.sparse, site.calls.host) == (1, 0) for site in describe(model).sites if site.sparse)
    assert 0.001 < (out - dense).norm() / dense.norm() < 0.3
    seen: list[Any] = []
    with model.global_blocks[0].attn.observe(lambda site, inputs, out: seen.append((inputs, out))):
        model(frames(6))
    inputs, out = seen[0]
    inputs.v[:, :, 3 * TOKENS :] = 1e6
    again = model.global_blocks[0].attn.sparse_linear(inputs, None)
    torch.testing.assert_close(again[:, :, : 3 * TOKENS], out[:, :, : 3 * TOKENS])
    assert again[:, :, 3 * TOKENS :].abs().max() > 1e4


def test_a_window_with_the_first_frame_is_sparse() -> None:
    """As STream3R's mode "window"; at keep 1, with the branch, it is the dense model."""
    dense, model = make(FinishedCache)(frames(6), window=2), make(FinishedCache)
    apply_lite3r(model, TEST_CONFIG, keep_ratio=0.3, pin="none")
    out = model(frames(6), window=2)
    assert all((site.calls.sparse, site.calls.host) == (1, 0) for site in describe(model).sites if site.sparse)
    assert 0.001 < (out - dense).norm() / dense.norm() < 0.3
    everything = make(FinishedCache)
    apply_lite3r(everything, TEST_CONFIG, keep_ratio=1.0, linear_branch="all")
    torch.testing.assert_close(everything(frames(6), window=2), dense, atol=1e-4, rtol=1e-4)


def test_the_density_with_a_mask_is_of_all_pairs() -> None:
    """Those too that may not be seen, and are not computed: about half of them are left where hardly any other is dropped."""
    model = make()
    apply_lite3r(model, TEST_CONFIG, keep_ratio=0.99, pin="none")
    model(frames(12))
    share = describe(model).sites[-1].calls.density
    assert share is not None
    assert 0.5 < share < 0.75


def test_a_mask_that_is_not_over_frames_is_left_dense_and_said() -> None:
    dense, model = make(FinishedCache), make(FinishedCache)
    apply_lite3r(model, TEST_CONFIG, keep_ratio=0.3)
    for one in (dense, model):
        one.mask = lambda views, tokens, window: torch.ones(views * tokens, views * tokens).tril() > 0
    with pytest.warns(SlowPathWarning, match="its attention has a mask that is not frame-causal"):
        out = model(frames(5))
    torch.testing.assert_close(out, dense(frames(5)), atol=1e-5, rtol=1e-5)
    assert "2 global sites ran calls dense in the host's own code: its attention has a mask that is not frame-causal" in str(
        describe(model)
    )


@pytest.mark.parametrize("linear", ["marginal", pytest.param("all", marks=pytest.mark.slow)])
def test_masks_run_in_kernels_where_they_pay(linear: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without dense_below, as without a mask."""
    pytest.importorskip("triton")
    model = make()
    apply_lite3r(model, TEST_CONFIG, keep_ratio=0.3, linear_branch=linear, dense_below=None, attention_backend="auto")
    monkeypatch.setattr("lite3r_plugin.attention.module.SparseLinearAttention.pays", lambda _, v, *__: v.shape[2] > TOKENS)
    monkeypatch.setattr("lite3r_plugin.ops.dispatch.why_not_triton", lambda *_, **__: None)  # interpreted
    backward = importlib.import_module("lite3r_plugin.ops.sla.backward")
    ran: list[Any] = []
    train = backward.train
    monkeypatch.setattr(backward, "train", lambda *x: (ran.append(x), train(*x))[1])
    with torch.enable_grad():
        model(frames(2))
    assert [x.mask_before for _, x in ran] == [None] * 2
    assert all(x.mask is not None for _, x in ran)
    assert all((site.calls.sparse, site.calls.host) == (1, 0) for site in describe(model).sites if site.sparse)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*deterministic")  # of dense attention's backward pass, which torch chooses
@pytest.mark.parametrize("window", [None, 2])
def test_masks_run_in_kernels_on_a_gpu(window: int | None) -> None:
    """By themselves, a whole model, as their definition has it."""
    images = frames(12, 112, 112).cuda()
    found: list[dict[str, Any]] = []
    for backend in ("naive", "auto"):
        with torch.device("cuda"), torch.enable_grad():  # its mask is made where tensors are made
            torch.manual_seed(0)
            model = streaming_hosts.Aggregator(dim=64).eval()
            apply_lite3r(model, TEST_CONFIG, keep_ratio=0.3, block_q=64, block_k=64, attention_backend=backend)
            out = model(images, window=window)
            out.square().mean().backward()
        assert all((site.calls.sparse, site.calls.host) == (1, 0) for site in describe(model).sites if site.sparse)
        found.append({"out": out} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    expected, kernels = found
    assert kernels.keys() == expected.keys()
    for name, x in expected.items():
        assert relative_error(kernels[name], x) < 5e-3, name


LAYOUT = TokenLayout((Views((2, 3), 4, special_tokens=1),))
FRAMES = torch.arange(4).repeat_interleave(7)
APART = FRAMES[:, None] - FRAMES


@pytest.mark.parametrize(
    ("mask", "before"),
    [(APART >= 0, "all"), ((APART >= 0) & (APART <= 1), 1), (APART == 0, 0), (APART <= 0, None), ((APART >= 0) | (FRAMES == 2), None),
     (torch.ones(28, 28).tril() > 0, None), (torch.ones(28, 28, dtype=torch.bool), None),
     ((APART >= 0) & ((APART <= 1) | (FRAMES == 0)), (1, 0)), ((APART >= 0) & ((APART == 0) | (FRAMES == 0)), (0, 0)),
     ((APART >= 0) & ((APART <= 0) | (FRAMES == 1)), None), ((APART >= 0) & (APART <= 2), 2)],
)  # fmt: skip
@pytest.mark.parametrize("added", [False, True])
def test_masks_are_recognised_by_their_values(mask: torch.Tensor, before: Any, added: bool) -> None:
    given = torch.zeros(1, 1, 28, 28).masked_fill(~mask, -torch.inf) if added else mask
    found = frame_causal(given, LAYOUT)
    if before is None:
        assert found is None
    else:
        assert found is not None
        before, sink = before if isinstance(before, tuple) else (before, None)
        assert (found.before, found.after, found.sink) == (None if before == "all" else before, 0, sink)
        assert torch.equal(found.queries, FRAMES.int())


def test_a_mask_that_learns_keeps_its_gradient() -> None:
    """It may look like a mask over frames at first."""
    model, dense = make(FinishedCache), make(FinishedCache)
    apply_lite3r(model, TEST_CONFIG, keep_ratio=0.3)
    views = torch.arange(3).repeat_interleave(TOKENS)
    learned = torch.zeros(len(views), len(views)).masked_fill(views[:, None] < views, -1e9).requires_grad_()
    found = []
    with torch.enable_grad():
        for one in (dense, model):
            one.mask = lambda *_: learned
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*its mask learns", category=SlowPathWarning)
                found += torch.autograd.grad(one(frames(3)).square().sum(), learned)
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        model(frames(3))
    assert all(site.calls.sparse == 1 for site in describe(model).sites if site.sparse)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The masks that were looked at, as what they were recognised as."""
    seen: list[Any] = []

    def look(*given: Any) -> Any:
        seen.append(frame_causal(*given))
        return seen[-1]

    monkeypatch.setattr(masks, "frame_causal", look)
    return seen


def of_frames(views: int, before: int | None = None, tokens: int = TOKENS) -> torch.Tensor:
    """A frame-causal mask, by default for the model, maybe a window."""
    view = torch.arange(views).repeat_interleave(tokens)
    apart = view[:, None] - view
    return (apart >= 0) & (apart <= (views if before is None else before))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_mask_is_looked_at_once_a_forward_and_a_change_is_seen(mode: Any, looks: list[Any]) -> None:
    model = make(FinishedCache)
    apply_lite3r(model, TEST_CONFIG, keep_ratio=0.3, pin="none")
    with mode():
        mask = of_frames(4)
        model.mask = lambda *_: mask
        first, again = model(frames(4)), model(frames(4))
        assert torch.equal(first, again)
        assert [x.before for x in looks] == [None] * 2
        mask.copy_(of_frames(4, before=1))
        changed = model(frames(4))
        model.mask = lambda *_: of_frames(4, before=1)  # another tensor for each site
        assert torch.equal(model(frames(4)), changed)
    assert [x.before for x in looks] == [None] * 2 + [1] * 3
    assert not torch.equal(changed, first)
    assert all((site.calls.sparse, site.calls.host) == (4, 0) for site in describe(model).sites if site.sparse)


def test_a_site_outside_of_a_forward_looks_at_its_mask(looks: list[Any]) -> None:
    """In each call, if it is a tensor of inference mode."""
    model, seen = make(FinishedCache), list[Any]()
    apply_lite3r(model, TEST_CONFIG, keep_ratio=0.3)
    site = model.global_blocks[0].attn
    with torch.inference_mode(), site.observe(lambda site, inputs, out: seen.append(inputs)):
        mask = of_frames(3)
        model.mask = lambda *_: mask
        model(frames(3))
        mask.copy_(of_frames(3, before=0))
        site.sparse_linear(seen[0], None)
        site.sparse_linear(seen[0], None)
    assert [x.before for x in looks] == [None, 0, 0]


def test_a_mask_that_changes_within_a_forward() -> None:
    mask, known, forward = APART >= 0, Masks(), object()
    for before in (0, 1):
        mask.copy_(of_frames(4, before, tokens=7))
        found = known.of(mask, LAYOUT, forward)
        assert found is not None
        assert found.before == before
    assert known.of(mask, None, forward) is None
    bias = torch.zeros(28, 28).masked_fill(APART < 0, -torch.inf)
    assert known.of(bias, LAYOUT, forward) is not None
    bias.requires_grad_()
    assert known.of(bias, LAYOUT, forward) is not None
    with torch.enable_grad():
        assert known.of(bias, LAYOUT, forward) is None


def test_a_mask_that_takes_the_place_of_another_is_another() -> None:
    """At the same address, and of the same version."""
    known, forward, memory = Masks(), object(), np.empty((28, 28), bool)
    for before in (0, 1, 2):
        memory[:] = of_frames(4, before, tokens=7)
        found = known.of(torch.from_numpy(memory), LAYOUT, forward)
        assert found is not None
        assert found.before == before


def test_what_a_mask_was_recognised_as_may_learn_later() -> None:
    """And is left behind by copies."""
    mask, known = APART >= 0, Masks()
    with torch.inference_mode():
        found = known.of(mask, LAYOUT, None)
    assert found is not None
    assert not found.queries.is_inference()
    assert known.of(mask, LAYOUT, None) is found
    for other in (copy.deepcopy(known), pickle.loads(pickle.dumps(known))):
        assert other.of(mask, LAYOUT, None) is not found


def test_a_mask_that_is_expanded_over_the_batch() -> None:
    mask = APART >= 0
    assert frame_causal(mask.expand(2, 3, 28, 28), LAYOUT) is not None
    assert frame_causal(mask[None, None].expand(2, 1, -1, -1), LAYOUT) is not None
    assert frame_causal(mask.repeat(2, 1, 1, 1), LAYOUT) is None  # they may differ


def test_a_bias_is_no_mask() -> None:
    mask = torch.zeros(28, 28).masked_fill(APART < 0, -torch.inf)
    assert frame_causal(mask, LAYOUT) is not None
    for place, value in (((5, 3), -0.5), ((27, 26), 0.5), ((2, 20), 0.0), ((2, 20), -9.0), ((3, 3), torch.nan)):
        other = mask.clone()
        other[place] = value
        assert frame_causal(other, LAYOUT) is None


def test_a_mask_over_views_of_several_sizes() -> None:
    layout = TokenLayout((Views((2, 3), 2), Views((4, 1), 2, special_tokens=1), Views((1, 1))))
    frames = torch.arange(5).repeat_interleave(torch.tensor([6, 6, 5, 5, 1]))
    found = frame_causal(frames[:, None] >= frames, layout)
    assert found is not None
    assert torch.equal(found.queries, frames.int())
    assert frame_causal((frames[:, None] >= frames).roll(1, 0), layout) is None
    assert frame_causal(torch.zeros(7, 7), TokenLayout((Views((2, 3), 1, 1),))) is None
    assert frame_causal(APART >= 0, None) is None


def test_a_norm_that_changes_in_the_middle_is_that_of_all_keys(prepared: list[int]) -> None:
    """As in the dense model, which norms the whole cache in every call."""
    dense, model = exact(RawCache)
    past, expected = [None] * 2, [None] * 2
    for one, cache in ((model, past), (dense, expected)):
        one.stream(frames(3), cache)
        one.global_blocks[0].attn.k_norm.weight.mul_(torch.linspace(0.5, 2, 16))
    prepared.clear()
    torch.testing.assert_close(model.stream(frames(5)[:, 3:], past), dense.stream(frames(5)[:, 3:], expected), atol=1e-5, rtol=1e-5)
    assert prepared == [3 * TOKENS, *[TOKENS] * 4]


def test_another_dtype_begins_anew() -> None:
    dense, model = exact(FinishedCache)
    past, expected = [None] * 2, [None] * 2
    for one, cache in ((model, past), (dense, expected)):
        one.stream(frames(2), cache)
        with torch.autocast("cpu", torch.bfloat16):
            one.stream(frames(3)[:, 2:], cache)
    found, wanted = model.stream(frames(4)[:, 3:], past), dense.stream(frames(4)[:, 3:], expected)
    assert (found - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pin", ["reference", "reference_keys", "special"])
def test_what_is_pinned_is_the_same_with_gradients(kind: type[Any], pin: Any) -> None:
    """Where somebody learns or looks on, a call is computed as a whole: the first frame stays the reference, and no other one is."""
    x = torch.rand(1, 4, 3, 224, 168, generator=torch.Generator().manual_seed(1))
    dense, model = make(kind), apply_lite3r(make(kind), TEST_CONFIG, pin=pin, keep_ratio=0.05)
    site = next(site for site in lite3r_modules(model).values() if site.sparse)
    expected = dense(x[:, :1], [None] * 2)
    densities: list[list[float]] = []
    for learns in (False, True):
        with torch.set_grad_enabled(learns):
            past: list[Any] = [None] * 2
            first = model(x[:, :1], past)
            assert (relative_error(first.detach(), expected) < 1e-5) == (pin != "special"), learns
            past = [None] * 2
            found = []
            for frames_of_call in (x[:, :2], x[:, 2:]):
                model(frames_of_call, past)
                found.append(site.calls.density)
            densities.append(found)
    # Of pinned queries a stream computes no more than those; the operator's whole blocks of them are a few more.
    assert densities[0] == pytest.approx(densities[1], abs=0.04)


def test_no_view_of_a_later_call_is_the_reference() -> None:
    """Of calls that differ in size, which are computed as a whole."""
    x = torch.rand(1, 3, 3, 224, 168, generator=torch.Generator().manual_seed(1))
    model = apply_lite3r(make(FinishedCache), TEST_CONFIG, pin="reference", keep_ratio=0.05)
    site = next(site for site in lite3r_modules(model).values() if site.sparse)
    past: list[Any] = [None] * 2
    model(x[:, :1], past)
    model(x[:, 1:], past)
    assert site.calls.density < 0.5
