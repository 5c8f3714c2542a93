"""StreamVGGT and STream3R, by doubles of their structure; the real code wherever it can be imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import real_models
import streaming_hosts
import torch
from streaming_hosts import FinishedCache, RawCache, frames
from torch import Tensor, nn

from lite3r_plugin import FusedQKV, KeyValueCache, Routed, apply_lite3r, convert, describe, lite3r_disabled
from lite3r_plugin.adapter import find_outputs, find_sites
from lite3r_plugin.testing import TEST_CONFIG, check_adapter

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")  # STream3R asks for FP32 there
KINDS = [(RawCache, "streamvggt"), (FinishedCache, "stream3r")]


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_sites(kind: type[Any], name: str) -> None:
    adapter, sites = find_sites(nn.Sequential(streaming_hosts.make(kind)))
    assert adapter == name
    assert [(s.fqn, s.scope) for s in sites] == [(f"0.{scope}_blocks.{i}.attn", scope) for scope in ("frame", "global") for i in (0, 1)]
    projections = sites[-1].projections
    assert isinstance(projections, FusedQKV)
    raw = KeyValueCache("past_key_values", "use_cache", by_calls=True, finished=False)
    assert projections.cache == (raw if kind is RawCache else KeyValueCache("kv_cache"))
    assert sites[-1].keys == sites[-1].tokens is not None


@pytest.mark.parametrize(("kind", "name"), KINDS)
@pytest.mark.parametrize("run", ["stream", "forward"])
def test_the_adapter_passes(kind: type[Any], name: str, run: str) -> None:
    model = nn.Sequential(streaming_hosts.make(kind)).eval()
    report = check_adapter(model, lambda model: getattr(model[0], run)(frames(4)), scopes=("global", "frame"))
    assert (report.adapter, report.scopes) == (name, {"global": 2, "frame": 2})
    assert not report.unchecked


class OtherScale(RawCache):
    """A fork whose queries are larger."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.q_norm = nn.Sequential(self.q_norm, _Twice())


class OwnPositions(RawCache):
    """A fork in which each frame keeps the positions that it came with: keys are cached with them."""

    def forward(self, x: Tensor, pos: Any = None, attn_mask: Any = None, past_key_values: Any = None, use_cache: bool = False) -> Any:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).movedim(2, 0).transpose(2, 3)
        q, k = self.rope(self.q_norm(q), pos), self.rope(self.k_norm(k), pos)  # type: ignore[misc]
        if use_cache:
            olds = [(old,) if past_key_values is not None else () for old in past_key_values or (None, None)]
            k, v = (torch.cat((*old, new[:, :, None]), 2) for old, new in zip(olds, (k, v), strict=True))
            cached, k, v = (k, v), k.flatten(2, 3), v.flatten(2, 3)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask)
        out = self.proj(out.transpose(1, 2).flatten(2))
        return (out, cached) if use_cache else out


class _Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_fork_that_is_described_wrongly_makes_its_own_cache_and_is_sparse_over_it() -> None:
    dense = streaming_hosts.make(OwnPositions)
    images = [frames(1, *size) for size in ((56, 84), (84, 56), (84, 56), (56, 84))]
    for ratio in (1.0, 0.3):
        model, past, expected = streaming_hosts.make(OwnPositions), [None] * 2, [None] * 2
        apply_lite3r(model, TEST_CONFIG, keep_ratio=ratio)
        assert all("differs from the host's own forward" in why for why in describe(model).routed.values())
        with torch.no_grad():
            outs = [(model.stream(image, past), dense.stream(image, expected)) for image in images]
        found, wanted = (torch.cat([x.flatten(1, 2) for x in side], 1) for side in zip(*outs, strict=True))
        calls = [site.calls for site in describe(model).sites if site.sparse]
        if ratio == 1:
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        else:
            assert [(c.sparse, c.host) for c in calls] == [(4, 0)] * 2
            assert 0.001 < (found - wanted).norm() / wanted.norm() < 0.3


def test_a_fork_in_one_line_is_exact() -> None:
    dense, model = streaming_hosts.make(OtherScale), streaming_hosts.make(OtherScale)
    _, sites = find_sites(model)
    apply_lite3r(model, TEST_CONFIG, keep_ratio=1.0)
    with torch.no_grad():
        torch.testing.assert_close(model.stream(frames()), dense.stream(frames()), atol=1e-5, rtol=1e-5)
    assert isinstance(sites[-1].projections, (FusedQKV, Routed))


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_fp8(kind: type[Any], name: str) -> None:
    model = streaming_hosts.make(kind)
    with torch.no_grad():
        dense = model.stream(frames())
        apply_lite3r(model, TEST_CONFIG, keep_ratio=1.0)
        convert(model, fp8_backend="emulated")
        difference = (model.stream(frames()) - dense).norm() / dense.norm()
    assert 0 < difference < 0.1


def streamed(model: Any) -> Any:
    """StreamVGGT frame by frame."""
    return model.inference([{"img": frame} for frame in frames()[0][:, None]]).ress


def streamed_by_caches(model: Any) -> Any:
    """STream3R frame by frame, by the caches that it returns."""
    caches: dict[str, Any] = {
        "aggregator_kv_cache_list": [[None, None] for _ in range(model.aggregator.depth)],
        "camera_head_kv_cache_list": [[[None, None] for _ in range(model.camera_head.trunk_depth)] for _ in range(4)],
    }
    outputs = []
    for frame in frames()[0][:, None]:
        output = model(frame, **caches)
        caches = {name: output.pop(name) for name in caches}
        outputs.append(output)
    return outputs


REAL: list[tuple[Callable[[], Any], str, Callable[[Any], Any]]] = [
    (real_models.small_streamvggt, "streamvggt", streamed),
    (real_models.small_streamvggt, "streamvggt", lambda model: model([{"img": frame} for frame in frames()[0][:, None]]).ress),
    (real_models.small_stream3r, "stream3r", streamed_by_caches),
    (real_models.small_stream3r, "stream3r", lambda model: model(frames())),
    (real_models.small_stream3r, "stream3r", lambda model: model(frames(), mode="full")),
]


@pytest.mark.parametrize(("make", "name", "run"), REAL)
def test_the_real_code(make: Callable[[], Any], name: str, run: Callable[[Any], Any]) -> None:
    """Last run with StreamVGGT of 3e28c5c and STream3R of 5f27805."""
    torch.manual_seed(0)
    report = check_adapter(make(), run, scopes=("global", "frame"))
    assert (report.adapter, report.scopes) == (name, {"global": 5, "frame": 5})
    assert not report.unchecked


@pytest.mark.parametrize(("make", "name", "run"), [REAL[0], REAL[2]])
def test_the_real_code_keeps_its_own_caches(make: Callable[[], Any], name: str, run: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        dense = run(model)
        apply_lite3r(model, TEST_CONFIG, keep_ratio=0.3, scopes=("global", "camera"))
        run(model)
        calls = {site.scope: site.calls for site in describe(model).sites if site.sparse}
        assert (calls["global"].sparse, calls["global"].host) == (5, 0)
        assert (calls["camera"].sparse, calls["camera"].host) == (20, 0)  # four rounds a frame
        with lite3r_disabled(model):
            again = run(model)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(dense, again, strict=True) for key in a)


def test_outputs_of_the_real_code() -> None:
    torch.manual_seed(0)
    model: Any = real_models.small_streamvggt()
    function = find_outputs(model)
    assert function is not None
    with torch.no_grad():
        outputs = function(model.inference([{"img": frame} for frame in frames()[0][:, None]]))
    assert outputs.depth is not None
    assert outputs.points is not None
    assert outputs.world_to_camera is not None
    assert tuple(outputs.depth.shape) == (1, 5, 56, 84)
    assert tuple(outputs.points.shape) == (1, 5, 56, 84, 3)
    assert outputs.world_to_camera.shape[:2] == (1, 5)


def test_outputs_of_stream3r() -> None:
    function = find_outputs(real_models.small_stream3r())
    assert function is not None
    assert function.__module__ == "lite3r_adapters.vggt.outputs"


def test_the_real_code_in_fp8() -> None:
    torch.manual_seed(0)
    model = real_models.small_streamvggt()
    with torch.no_grad():
        dense = streamed(model)[-1]["depth"]
        apply_lite3r(model, TEST_CONFIG, keep_ratio=1.0)
        convert(model, fp8_backend="emulated")
        assert (streamed(model)[-1]["depth"] - dense).norm() < 0.01 * dense.norm()
    assert "Linears: 40 in FP8" in str(describe(model))
    assert "run their own forward" not in str(describe(model))
