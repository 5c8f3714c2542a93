"""Keys that come part by part, against the operator on all of them at once."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from sla_cases import BLOCKS, BRANCHES, DEVICE, GPU, Branch, norms, random_order, random_proj, random_qkv
from torch import Tensor

from lite3r_plugin.errors import ConfigError
from lite3r_plugin.ops import dispatch
from lite3r_plugin.ops.qk_norm_rope import HeadNorm
from lite3r_plugin.ops.sla import KeyCache, KeyTokens, sparse_linear_attention

DIM = 32


class Stream:
    """Parts of keys, those of the cache, and what is said of them."""

    def __init__(self, backend: str, k_norm: HeadNorm | None = None, dtype: torch.dtype = torch.float32) -> None:
        self.cache = KeyCache(**BLOCKS)
        self.options: dict[str, Any] = dict(q_norm=None, k_norm=k_norm, rope_base=100.0, backend=backend)
        self.dtype = dtype
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def extend(self, tokens: int, pinned: int) -> Any:
        q, k, v = random_qkv(tokens, DIM, self.dtype)
        positions = torch.randint(0, 9, (1, tokens, 2), device=DEVICE)
        self.parts.append((k, v, positions))
        return self.cache.extend(q, k, v, order=random_order(tokens), pinned_tokens=pinned, positions=positions, **self.options)

    def together(self) -> tuple[Tensor, Tensor, Tensor]:
        """All keys, values and positions, in host order."""
        k, v, positions = (torch.cat(x, 2 if i < 2 else 1) for i, x in enumerate(zip(*self.parts, strict=True)))
        return k, v, positions

    def order(self) -> Tensor:
        """The order of the keys in the cache, found by their values."""
        v = self.together()[1]
        return torch.cdist(self.cache.v[0, 0].float(), v[0, 0].float()).argmin(1)


def grown(backend: str, sizes: list[tuple[int, int]], **options: Any) -> tuple[Stream, Any]:
    torch.manual_seed(0)
    stream = Stream(backend, **options)
    queries: Any = None
    for tokens, pinned in sizes:
        queries = stream.extend(tokens, pinned)
    return stream, queries


SIZES = [(53, 30), (53, 5), (53, 5)]
BACKENDS = ["naive", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both; the kernels interpreted where there is no GPU."""
    if request.param == "triton" and not GPU:
        monkeypatch.setattr(dispatch, "why_not_triton", lambda *_, **__: None)
    return request.param


def the_same_at_once(stream: Stream, queries: Any, **options: Any) -> Tensor:
    """The operator on all keys, in the order that they have in the cache."""
    k, v, positions = stream.together()
    keys = KeyTokens(stream.order(), stream.cache.pinned_tokens, positions)
    own = stream.parts[-1][2]
    return sparse_linear_attention(
        queries.q, k, v, keys=keys, order=queries.order, positions=own, k_norm=stream.options["k_norm"], rope_base=100.0,
        backend="naive", **BLOCKS, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "branch"),
    [
        pytest.param(backend, branch, marks=[pytest.mark.slow] * (backend == "triton" and branch not in (BRANCHES[2], BRANCHES[5])))
        for backend in BACKENDS
        for branch in BRANCHES
    ],
    indirect=["backend"],
)
def test_a_stream_is_the_operator_on_all_keys(backend: str, branch: Branch) -> None:
    linear, feature_map, means = branch
    stream, queries = grown(backend, SIZES, k_norm=norms(DIM)["layer"])
    options: dict[str, Any] = dict(keep_ratio=0.3, linear=linear, feature_map=feature_map, block_means=means, proj=random_proj(DIM))
    out = stream.cache.attend(queries, **options, backend=backend)
    torch.testing.assert_close(out, the_same_at_once(stream, queries, **options), atol=1e-4, rtol=1e-4)


def test_all_keys(backend: str) -> None:
    stream, queries = grown(backend, SIZES)
    expected = the_same_at_once(stream, queries, keep_ratio=1.0)
    torch.testing.assert_close(stream.cache.attend_to_all(queries), expected, atol=1e-5, rtol=1e-5)


def test_negligible_blocks(backend: str) -> None:
    stream, queries = grown(backend, SIZES)
    options: dict[str, Any] = dict(keep_ratio=0.2, negligible_ratio=0.5, block_means=True)
    out = stream.cache.attend(queries, **options, backend=backend)
    torch.testing.assert_close(out, the_same_at_once(stream, queries, **options), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out, stream.cache.attend(queries, keep_ratio=0.2, block_means=True, backend=backend))


def test_blocks_chosen_by_error(backend: str) -> None:
    stream, queries = grown(backend, SIZES)
    options: dict[str, Any] = dict(keep_ratio=0.3, block_means=True)
    out = stream.cache.attend(queries, **options, block_choice="error", backend=backend)
    torch.testing.assert_close(out, the_same_at_once(stream, queries, **options, block_choice="error"), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out, stream.cache.attend(queries, **options, backend=backend))


@pytest.mark.parametrize("sizes", [[(7, 7), (3, 3), (40, 2)], [(5, 0), (40, 9), (40, 20)], [(1, 0), (1, 1), (100, 0)], [(64, 0)]])
def test_pinned_keys_come_first_and_nothing_is_lost(sizes: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    stream, pinned = Stream("naive"), []
    for tokens, count in sizes:
        queries = stream.extend(tokens, count)
        start = stream.cache.tokens - tokens
        pinned += [start + int(i) for i in queries.order[:count]]
    order = [int(i) for i in stream.order()]
    assert sorted(order) == list(range(stream.cache.tokens))
    assert order[: len(pinned)] == pinned
    assert stream.cache.pinned_tokens == len(pinned)


def test_pinned_queries_attend_to_all_keys(backend: str) -> None:
    stream, queries = grown(backend, SIZES)
    exact, some = stream.cache.attend_to_all(queries), stream.cache.attend(queries, keep_ratio=0.1, backend=backend)
    out = stream.cache.attend(queries, keep_ratio=0.1, pinned_tokens=5, backend=backend)
    first = queries.order[:5].long()
    torch.testing.assert_close(out[:, :, first], exact[:, :, first])
    others = queries.order[5:].long()
    torch.testing.assert_close(out[:, :, others], some[:, :, others])
    assert not torch.allclose(some, exact, atol=1e-3)


def test_pinned_queries_have_the_branch_over_all_tokens_too(backend: str) -> None:
    stream, queries = grown(backend, SIZES)
    options: dict[str, Any] = dict(linear="all", proj=random_proj(DIM), backend=backend)
    out, full = (stream.cache.attend(queries, keep_ratio=ratio, pinned_tokens=5, **options) for ratio in (0.1, 1.0))
    first = queries.order[:5].long()
    torch.testing.assert_close(out[:, :, first], full[:, :, first], atol=1e-4, rtol=1e-4)


def test_what_a_part_takes_does_not_grow_with_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the copies when it needs room, of which there are the fewer the longer it is."""
    stream, _ = grown("naive", [(64, 4)])
    pooled: list[int] = []
    pool = KeyCache._pool
    monkeypatch.setattr(KeyCache, "_pool", lambda cache, first, last: (pooled.append(last - first), pool(cache, first, last))[1])
    rooms = []
    for _ in range(40):
        stream.extend(64, 4)
        rooms.append(stream.cache._keys[0].data_ptr())
    assert max(pooled) <= 64
    assert len(list(itertools.groupby(rooms[20:]))) < 12


@pytest.mark.parametrize("inside", [True, False])
def test_parts_come_inside_of_inference_mode_and_outside(inside: bool) -> None:
    stream = Stream("naive")
    with torch.inference_mode(inside):
        stream.extend(60, 5)
    with torch.inference_mode(not inside):
        queries = stream.extend(60, 5)
        out = stream.cache.attend(queries, keep_ratio=1.0)
    torch.testing.assert_close(out, the_same_at_once(stream, queries, keep_ratio=1.0))


def test_what_does_not_fit_is_refused() -> None:
    stream, queries = grown("naive", SIZES)
    q, k, v = random_qkv(20, DIM, torch.float32)
    with pytest.raises(ConfigError, match=r"order names 7 tokens, but q has 20"):
        stream.cache.extend(q, k, v, order=torch.arange(7, device=DEVICE))
    with pytest.raises(ConfigError, match=r"the cache holds keys of shape \[2, 2, N, 32\] torch.float32, got \[1, 2, 20, 32\]"):
        stream.cache.extend(q[:1], k[:1], v[:1])
    with pytest.raises(ConfigError, match="keep_ratio"):
        stream.cache.attend(queries, keep_ratio=0.0)
    assert stream.cache.tokens == 159


@pytest.mark.parametrize(
    "given", [{"pinned_tokens": -1}, {"pinned_tokens": 97}, {"pinned_tokens": 1.5}, {"linear": "all", "proj": torch.eye(31)}], ids=str
)
def test_options_that_do_not_fit_are_refused(given: dict[str, Any]) -> None:
    cache = KeyCache(**BLOCKS)
    queries = cache.extend(*random_qkv(96, DIM, torch.float32))
    with pytest.raises(ConfigError, match=next(name for name in ("pinned_tokens", "proj") if name in given)):
        cache.attend(queries, **{"keep_ratio": 0.1, **given})
