"""Depth Anything 3: the real package, with random weights."""

from __future__ import annotations

import hosts
import pytest
import torch
from properties import assert_bf16_is_as_exact_as_dense, assert_compiled_equals_eager, assert_threads_do_not_mix
from torch import Tensor, nn

from lite3r_plugin import FusedQKV, Rope2D, apply_lite3r
from lite3r_plugin.adapter.plugins import find_sites
from lite3r_plugin.errors import NoSitesError
from lite3r_plugin.testing import check_adapter

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:register_new_resolver\(\) is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda':UserWarning"),
]
IMAGES = (1, 3, 3, 70, 98)


def build(name: str) -> nn.Module:
    pytest.importorskip("depth_anything_3")
    from depth_anything_3.cfg import create_object, load_config
    from depth_anything_3.registry import MODEL_REGISTRY

    config = load_config(MODEL_REGISTRY[name])
    for net in (config, config.get("anyview", {})):  # the optional Gaussian head of the giant needs another package
        for part in ("gs_head", "gs_adapter"):
            net.pop(part, None)
    return create_object(config).eval()


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return build("da3-small")


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models in full size without memory; their constructor reads numbers off `torch.linspace`."""
    linspace = torch.linspace
    monkeypatch.setattr(torch, "linspace", lambda *args, **kwargs: linspace(*args, **{**kwargs, "device": "cpu"}))


@pytest.mark.usefixtures("meta")
@pytest.mark.parametrize(
    ("name", "blocks", "first_global", "heads"),
    [("da3-small", 12, 5, 6), ("da3-base", 12, 5, 12), ("da3-large", 24, 9, 16), ("da3-giant", 40, 13, 24)],
)
def test_sites_of_every_size(name: str, blocks: int, first_global: int, heads: int) -> None:
    with torch.device("meta"):
        model = build(name)
    adapter, found = find_sites(model)
    assert adapter == "depth_anything_3"
    sites = [site for site in found if site.scope != "camera"]
    assert len(sites) == blocks
    assert [site.fqn for site in found if site.scope == "camera"] == [f"cam_enc.trunk.{i}.attn" for i in range(4)]
    expected = [f"backbone.pretrained.blocks.{i}.attn" for i in range(first_global, blocks, 2)]
    assert [site.fqn for site in sites if site.scope == "global"] == expected
    last = sites[-1]
    assert isinstance(last.projections, FusedQKV)
    assert (last.projections.num_heads, last.head_dim, last.projections.rope) == (heads, 64, Rope2D(100.0))
    assert isinstance(sites[0].projections, FusedQKV)
    assert sites[0].projections.rope is None
    assert (last.tokens.image_module, last.tokens.patch_size, last.tokens.special_tokens) == (
        "backbone.pretrained.patch_embed",
        (14, 14),
        1,
    )


@pytest.mark.usefixtures("meta")
@pytest.mark.parametrize("name", ["da3mono-large", "da3metric-large"])
def test_models_of_one_image_have_no_global_site(name: str) -> None:
    with torch.device("meta"):
        model = build(name)
    assert {site.scope for site in find_sites(model)[1]} == {"frame"}
    with pytest.raises(NoSitesError):
        apply_lite3r(model, scopes=("global",))


@pytest.mark.usefixtures("meta")
def test_both_networks_of_the_nested_model() -> None:
    with torch.device("meta"):
        model = build("da3nested-giant-large")
    sites = find_sites(model)[1]
    assert {site.fqn.split(".")[0] for site in sites} == {"da3", "da3_metric"}
    assert {site.fqn.split(".")[0] for site in sites if site.scope == "global"} == {"da3"}
    assert len([site for site in sites if site.scope != "camera"]) == 40 + 24


@pytest.mark.slow
def test_conformance(small: nn.Module) -> None:
    report = check_adapter(small, (torch.rand(IMAGES),))
    assert report.scopes == {"global": 4}
    assert report.tokens == 3 * (1 + 5 * 7)
    assert report.dense_error <= 1e-5


@pytest.mark.slow
def test_conformance_of_the_backbone_in_all_scopes(small: nn.Module) -> None:
    report = check_adapter(small.backbone, (torch.rand(IMAGES),), scopes=("global", "frame"))
    assert report.scopes == {"frame": 8, "global": 4}
    assert report.dense_error <= 1e-5


@pytest.mark.slow
def test_conformance_with_cameras(small: nn.Module) -> None:
    """Given poses, no reference view is chosen and camera tokens come from the poses."""
    cameras = {"extrinsics": torch.eye(4).repeat(1, 3, 1, 1), "intrinsics": torch.diag(torch.tensor([50.0, 50.0, 1.0])).repeat(1, 3, 1, 1)}
    check_adapter(small, {"x": torch.rand(IMAGES), **cameras})


@pytest.mark.slow
def test_the_encoder_of_cameras_when_it_is_asked_for(small: nn.Module) -> None:
    """Given poses, of so many views that blocks can be dropped."""
    views = 20
    cameras = {"extrinsics": torch.eye(4).repeat(1, views, 1, 1), "intrinsics": torch.diag(torch.tensor([14.0, 14.0, 1.0]))}
    cameras["extrinsics"][0, :, :3, 3] = torch.rand(views, 3)
    cameras["intrinsics"] = cameras["intrinsics"].repeat(1, views, 1, 1)
    report = check_adapter(small, {"x": torch.rand(1, views, 3, 14, 14), **cameras}, scopes=("camera",))
    assert (report.scopes, report.tokens) == ({"camera": 4}, views)


def test_bf16(small: nn.Module) -> None:
    assert_bf16_is_as_exact_as_dense(small.backbone, torch.rand(IMAGES))


@pytest.mark.slow
def test_compile(small: nn.Module) -> None:
    """In parts: it prints while it runs."""
    assert_compiled_equals_eager(small.backbone, lambda m, x: m(x), [torch.rand(IMAGES)], fullgraph=False)


def test_threads(small: nn.Module) -> None:
    few, many = torch.rand(1, 2, 3, 56, 98), torch.rand(IMAGES)
    assert_threads_do_not_mix(small.backbone, (lambda m: m(few), lambda m: m(many)))


class ForkedBackbone(nn.Module):
    """The structure of the backbone under another module path."""

    def __init__(self, dim: int = 32, depth: int = 4, registers: int = 2) -> None:
        super().__init__()
        self.alt_start, self.rope_start, self.num_register_tokens, self.patch_size = 1, 2, registers, 14
        self.patch_embed = hosts.Patches(14, dim)
        self.special = nn.Parameter(torch.randn(1 + registers, dim))
        rope = hosts.AxialRope("base_frequency")
        self.blocks = nn.ModuleList(
            hosts.Block(hosts.PosAttention(dim, 2, rope if i >= 2 else None, qk_norm=True), dim) for i in range(depth)
        )

    def forward(self, images: Tensor) -> Tensor:
        batch, views, _, height, width = images.shape
        x = self.patch_embed(images.flatten(0, 1))
        x = torch.cat((self.special.expand(len(x), -1, -1), x), 1)
        pos = hosts.grid_positions(batch * views, height // 14, width // 14, len(self.special))
        for i, block in enumerate(self.blocks):
            shape = (batch, -1) if i % 2 else (batch * views, -1)
            x = block(x.reshape(*shape, x.shape[-1]), pos=pos.reshape(*shape, 2) if i >= 2 else None)
        return x


def test_a_fork_is_found_by_structure() -> None:
    model = nn.ModuleDict({"net": ForkedBackbone()}).eval()
    assert find_sites(model)[0] == "depth_anything_3"
    images = torch.rand(IMAGES)
    report = check_adapter(model, lambda m: m["net"](images))
    assert report.scopes == {"global": 2}


def test_two_networks_with_different_grids_keep_their_own_layout() -> None:
    """As in the nested model: each network has its own image module."""
    model = nn.ModuleDict({"a": ForkedBackbone(registers=0), "b": ForkedBackbone(registers=3)}).eval()
    wide, tall = torch.rand(1, 2, 3, 56, 98), torch.rand(1, 3, 3, 98, 70)
    check_adapter(model, lambda m: (m["a"](wide), m["b"](tall)))
