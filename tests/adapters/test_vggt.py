"""VGGT: on a structural double always, on the real package where it can be imported."""

from __future__ import annotations

import functools
from typing import Any

import hosts
import pytest
import torch
from official import SmallVGGT
from properties import (
    assert_bf16_is_as_exact_as_dense,
    assert_compiled_equals_eager,
    assert_threads_do_not_mix,
    enlarge_layer_scales,
    outputs,
)
from torch import Tensor, nn

from lite3r_plugin import FusedQKV, Rope2D, Routed, apply_lite3r, describe
from lite3r_plugin.adapter.plugins import find_sites
from lite3r_plugin.config import Precision
from lite3r_plugin.errors import LayoutError
from lite3r_plugin.fp8.linear import Fp8Linear
from lite3r_plugin.ops.dispatch import SlowPathWarning
from lite3r_plugin.testing import TEST_CONFIG, check_adapter

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`torch.cuda.amp.autocast\(args...\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda':UserWarning"),
]
IMAGES = (1, 3, 3, 70, 98)


def double() -> nn.Module:
    return hosts.VGGT()


def real(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    module = pytest.importorskip("vggt.models.vggt")
    small = functools.partial(module.Aggregator, depth=2, num_heads=2, patch_embed="conv")
    monkeypatch.setattr(module, "Aggregator", small)
    model = module.VGGT(img_size=56, embed_dim=64, enable_point=False, enable_track=False)
    model.depth_head.intermediate_layer_idx = [0, 0, 1, 1]
    return model


def real_aggregator() -> nn.Module:
    module = pytest.importorskip("vggt.models.aggregator")
    return module.Aggregator(img_size=56, patch_size=14, embed_dim=384, depth=1, num_heads=6, patch_embed="dinov2_vits14_reg")


@pytest.fixture(params=["double", "real"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    model = double() if request.param == "double" else real(monkeypatch)
    enlarge_layer_scales(model)
    return model.eval()


@pytest.fixture(params=["double", "real"])
def aggregator(request: pytest.FixtureRequest) -> nn.Module:
    """With a DINOv2 encoder."""
    aggregator = double().aggregator if request.param == "double" else real_aggregator()
    enlarge_layer_scales(aggregator)
    return aggregator.eval()


def test_sites(model: nn.Module) -> None:
    adapter, sites = find_sites(model)
    assert adapter == "vggt"
    by_name = {site.fqn: site for site in sites}
    for scope in ("frame", "global"):
        for i in (0, 1):
            site = by_name[f"aggregator.{scope}_blocks.{i}.attn"]
            assert site.scope == scope
            assert isinstance(site.projections, FusedQKV)
            assert site.projections.rope == Rope2D(100.0)
            assert site.projections.positions == "pos"
            assert site.tokens is not None
            inside = ".patch_embed" if hasattr(model.get_submodule("aggregator.patch_embed"), "patch_embed") else ""
            assert site.tokens.image_module == f"aggregator.patch_embed{inside}"
            assert (site.tokens.patch_size, site.tokens.special_tokens) == ((14, 14), 5)


class PassedBy(hosts.Encoder):
    """Its forward is called as a method, so that no hook of it runs, as in a VGGT that calls `forward_features`."""

    __call__ = hosts.Encoder.forward


def test_images_that_reach_the_encoder_by_a_method() -> None:
    model = double().eval()
    model.aggregator.patch_embed.__class__ = PassedBy
    assert check_adapter(model, (torch.rand(1, 2, 3, 56, 70),)).scopes == {"global": 2}


def test_the_heads_have_sites_of_cameras_alone(model: nn.Module) -> None:
    assert {site.scope for site in find_sites(model)[1] if not site.fqn.startswith("aggregator.")} <= {"camera"}


def with_camera_head() -> SmallVGGT:
    small = SmallVGGT(depth=1, trunk=2)
    enlarge_layer_scales(small)
    return small.eval()


def test_the_camera_head_has_sites() -> None:
    sites = [site for site in find_sites(with_camera_head())[1] if site.scope == "camera"]
    assert [site.fqn for site in sites] == [f"camera_head.trunk.{i}.attn" for i in (0, 1)]
    assert {(site.head_dim, site.tokens) for site in sites} == {(128, None)}
    assert all(isinstance(site.projections, FusedQKV) and site.projections.rope is None for site in sites)
    assert [site.block.fqn for site in sites if site.block] == [f"camera_head.trunk.{i}" for i in (0, 1)]


@pytest.mark.parametrize("precision", ["full", "fp8_qat", "fp8"])
def test_the_camera_head_stays_as_it_is(precision: Precision) -> None:
    """Unless it is asked for: no attention of it is replaced, and none of its Linears goes to FP8."""
    model = with_camera_head()
    before = dict(model.camera_head.named_modules())
    apply_lite3r(model, precision=precision, fp8_backend="emulated")
    assert dict(model.camera_head.named_modules()) == before
    assert describe(model).skipped["camera_head.trunk.0.attn"] == "scope 'camera' stays dense"
    assert {site.scope for site in describe(model).sites if site.sparse} == {"global"}


def test_the_camera_head_when_it_is_asked_for() -> None:
    """With so many views that blocks can be dropped."""
    report = check_adapter(with_camera_head(), (torch.rand(1, 40, 3, 14, 14),), scopes=("camera",))
    assert (report.scopes, report.tokens) == ({"camera": 2}, 40)
    model = apply_lite3r(with_camera_head(), scopes=("global", "camera"), precision="fp8", fp8_backend="emulated")
    assert all(isinstance(block.mlp.fc1, Fp8Linear) for block in model.camera_head.trunk)


def test_the_camera_head_alone_is_no_reason_to_be_sparse_there() -> None:
    """Of a model without global sites, all become sparse but those of cameras."""
    model = with_camera_head()
    sites = [site for site in find_sites(model)[1] if site.scope != "global"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lite3r_plugin.apply.plan.find_sites", lambda _: ("vggt", sites))
        apply_lite3r(model)
    assert {site.scope for site in describe(model).sites if site.sparse} == {"frame", "encoder"}


def test_conformance(model: nn.Module) -> None:
    report = check_adapter(model, (torch.rand(IMAGES),))
    assert report.scopes == {"global": 2}
    assert report.tokens == 3 * (5 + 5 * 7)
    assert report.dense_error <= 1e-5


def test_conformance_of_all_scopes(aggregator: nn.Module) -> None:
    report = check_adapter(aggregator, (torch.rand(IMAGES),), scopes=("global", "frame", "encoder"))
    assert set(report.scopes) == {"global", "frame", "encoder"}
    assert report.dense_error <= 1e-5


def test_conformance_without_rotary_embedding() -> None:
    check_adapter(hosts.VGGT(rope=False, encoder=False).eval(), (torch.rand(IMAGES),))


def test_encoder_tokens_have_a_module_of_their_own(aggregator: nn.Module) -> None:
    sites = [site for site in find_sites(aggregator)[1] if site.scope == "encoder"]
    registers = aggregator.patch_embed.num_register_tokens
    assert len(sites) == len(aggregator.patch_embed.blocks)
    assert {(s.tokens.image_module, s.tokens.special_tokens) for s in sites} == {("patch_embed.patch_embed", 1 + registers)}


def test_bf16(aggregator: nn.Module) -> None:
    assert_bf16_is_as_exact_as_dense(aggregator, torch.rand(IMAGES))


def test_compile(aggregator: nn.Module) -> None:
    """From three views on: VGGT's own code compiles two apart, where the views after the first are one."""
    assert_compiled_equals_eager(aggregator, lambda m, x: m(x), [torch.rand(1, views, *IMAGES[2:]) for views in (3, 5, 4)])


def test_threads(model: nn.Module) -> None:
    few, many = torch.rand(1, 2, 3, 56, 98), torch.rand(IMAGES)
    assert_threads_do_not_mix(model, (lambda m: m(few), lambda m: m(many)))


def test_batch_of_scenes_equals_single_scenes(model: nn.Module) -> None:
    images = torch.rand(2, *IMAGES[1:])
    apply_lite3r(model, TEST_CONFIG)
    together = outputs(model, lambda m: m(images)["pose_enc"])[""]
    alone = torch.cat([outputs(model, lambda m, i=i: m(images[i : i + 1])["pose_enc"])[""] for i in (0, 1)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_found_inside_a_wrapper(model: nn.Module) -> None:
    wrapper = nn.ModuleDict({"net": model}).eval()
    assert find_sites(wrapper)[1][0].fqn == "net.aggregator.frame_blocks.0.attn"
    images = torch.rand(IMAGES)
    check_adapter(wrapper, lambda m: m["net"](images))


class CachedAttention(hosts.PosAttention):
    """A fork's attention that does more than the shared path."""

    def forward(self, x: Tensor, pos: Tensor | None = None, use_cache: bool = False) -> Tensor:
        return 2 * super().forward(x, pos)


class GatedAttention(hosts.PosAttention):
    """Another, with one more parameter."""

    def __init__(self, dim: int, num_heads: int, rope: nn.Module | None = None) -> None:
        super().__init__(dim, num_heads, rope, qk_norm=True)
        self.gate = nn.Parameter(torch.full((dim,), 0.5))

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        return super().forward(x, pos) * self.gate


@pytest.mark.parametrize("attention", [CachedAttention, GatedAttention])
def test_a_fork_whose_attention_does_more_runs_its_own_forward(attention: type[nn.Module]) -> None:
    model = hosts.VGGT().eval()
    for block in model.aggregator.global_blocks:
        block.attn = attention(32, 2, rope=model.aggregator.rope)
    model.eval()
    projections = {site.fqn: site.projections for site in find_sites(model)[1]}
    assert projections["aggregator.global_blocks.0.attn"] == Routed(2)
    assert isinstance(projections["aggregator.frame_blocks.0.attn"], FusedQKV)
    check_adapter(model, (torch.rand(IMAGES),))


class MergingAttention(hosts.PosAttention):
    """A fork that drops tokens before attention: its sequence does not fit the images."""

    def attend(self, x: Tensor, positions: Tensor | None) -> Tensor:
        return super().attend(x[:, ::7], positions[:, ::7]).repeat_interleave(7, 1)[:, : x.shape[1]]

    def forward(self, x: Tensor, pos: Tensor | None = None, merging: int = 7) -> Tensor:
        return self.attend(x, pos)


def test_a_fork_that_merges_tokens_is_refused() -> None:
    model = hosts.VGGT(encoder=False).eval()
    model.aggregator.global_blocks[0].attn = MergingAttention(32, 2, rope=model.aggregator.rope)
    apply_lite3r(model.eval(), TEST_CONFIG)
    with pytest.raises(LayoutError, match=r"global_blocks.0.attn"):
        outputs(model, lambda m: m(torch.rand(IMAGES)))


def test_a_fork_without_sdpa_is_dense() -> None:
    class Manual(hosts.PosAttention):
        def forward(self, x: Tensor, pos: Tensor | None = None, extra: None = None) -> Tensor:
            return self.proj(self.qkv(x).chunk(3, -1)[2])

    model = hosts.VGGT(encoder=False)
    model.aggregator.global_blocks[0].attn = Manual(32, 2)
    apply_lite3r(model.eval(), TEST_CONFIG)
    with pytest.warns(SlowPathWarning, match="does not call scaled_dot_product_attention"):
        outputs(model, lambda m: m(torch.rand(IMAGES)))


@pytest.mark.parametrize("place", ["0.normal_head", "1", None])
def test_weights_stay_in_fp32_where_a_model_has_other_parts_than_vggt(place: str | None) -> None:
    """Which nobody has seen in BF16: a head of a fork, or another network beside it."""
    model = nn.Sequential(hosts.VGGT(encoder=False)).eval()
    wanted: dict[str, Any] = dict(weights="bf16", keep_ratio=1.0, linear_branch="none")
    if place is None:
        apply_lite3r(model, **wanted)
        assert model.get_parameter("0.aggregator.global_blocks.0.attn.qkv.weight").dtype == torch.bfloat16
        return
    owner, _, name = place.rpartition(".")
    model.get_submodule(owner).add_module(name, nn.Linear(32, 3))
    with pytest.warns(SlowPathWarning, match=f"left out: weights in BF16, because {place} has weights and is no part of VGGT's"):
        apply_lite3r(model, **wanted)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
