"""MapAnything and UniCeption's transformers, by doubles of their structure; the real code wherever it can be imported."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import hosts
import pytest
import real_models
import torch
from mapanything_hosts import CrossTransformer, Features, Transformer, make, view
from properties import assert_compiled_equals_eager, assert_threads_do_not_mix
from torch import Tensor, nn

from lite3r_adapters.mapanything.model import ENTRIES, arguments
from lite3r_adapters.mapanything.outputs import world_to_camera
from lite3r_plugin import (
    FusedQKV,
    Rope2D,
    Routed,
    SeparateQKV,
    TokenLayout,
    Views,
    apply_lite3r,
    convert,
    describe,
    lite3r_disabled,
    remove_lite3r,
)
from lite3r_plugin.adapter import find_outputs, find_sites, model_entries
from lite3r_plugin.errors import InputError, LayoutError, UnknownModelError
from lite3r_plugin.testing import TEST_CONFIG, check_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda':UserWarning"),
    pytest.mark.filterwarnings("ignore:CUDA is not available or torch_xla is imported:UserWarning"),
]
ALL = ("global", "frame", "encoder")


VIEWS = [view(56, 84, i) for i in range(3)]


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(VIEWS)


def test_sites() -> None:
    name, sites = find_sites(nn.Sequential(make()))
    assert name == "mapanything"
    blocks = [site for site in sites if "info_sharing" in site.fqn]
    assert [site.scope for site in blocks] == ["global", "frame", "global", "frame"]
    assert all(isinstance(s.projections, FusedQKV) and s.projections.positions is None for s in blocks)
    assert all(s.block is not None and s.block.activation == "swiglu" for s in blocks)
    assert [(s.fqn, s.scope) for s in sites if s not in blocks] == [("0.encoder.model.blocks.0.attn", "encoder")]
    _, sites = find_sites(make(alternates=False))
    assert [site.scope for site in sites if "info_sharing" in site.fqn] == ["global"] * 4


@pytest.mark.parametrize("options", [{}, {"registers": False}, {"scale": False}, {"alternates": False}])
def test_the_adapter_passes(options: dict[str, Any]) -> None:
    report = check_adapter(make(**options), (VIEWS,), scopes=ALL)
    own, last = 2 * options.get("registers", True), options.get("scale", True)
    assert report.tokens == 3 * (24 + own) + last
    assert not report.unchecked


def test_a_rotary_embedding() -> None:
    """Of tokens with positions, which MapAnything itself has none of."""
    model = make(registers=False, scale=False, encoding=hosts.AxialRope("base"))
    projections = find_sites(model)[1][0].projections
    assert isinstance(projections, FusedQKV)
    assert (projections.rope, projections.positions) == (Rope2D(100.0), "xpos")
    assert not check_adapter(model, (VIEWS,), scopes=ALL).unchecked


@pytest.mark.parametrize("reference", [True, False])
def test_layouts(reference: bool) -> None:
    """The token of scale ends the sequence, registers each view; there is a reference view where one is told from the others."""
    model, seen = make(reference=reference), {}
    apply_lite3r(model, TEST_CONFIG, pin="reference", scopes=("global", "frame"))
    for i in range(2):
        site: Any = model.info_sharing.self_attention_blocks[i].attn
        with site.observe(lambda module, inputs, out: seen.setdefault(module.site.scope, (inputs.layout, module.pinned(inputs.layout)))):
            run(model)
    whole = TokenLayout((Views((4, 6), 3, trailing_tokens=2), 1), 0 if reference else None)
    assert seen["global"] == (whole, (7 + 24 * reference, 7 + 24 * reference))
    assert seen["frame"] == (TokenLayout((Views((4, 6), trailing_tokens=2),)), (2, 2))


@pytest.mark.parametrize("option", [{"growing": True}, {"gain": 1.5}])
def test_other_scores_are_left_to_the_host_s_forward(option: dict[str, Any]) -> None:
    """Scores that grow with the number of tokens, which a trial of few would not show as they are, or a fork's."""
    dense, model = make(**option), make(**option)
    apply_lite3r(model, TEST_CONFIG, keep_ratio=1.0)
    torch.testing.assert_close(run(model), run(dense), atol=1e-5, rtol=1e-5)
    assert {(s.calls.dense, s.calls.host) for s in describe(model).sites if s.sparse} == {(1, 0)}
    if "growing" in option:
        assert all(isinstance(s.projections, Routed) for s in find_sites(dense)[1] if "info_sharing" in s.fqn)
    else:
        assert len(describe(model).routed) == 2


def test_a_transformer_that_is_taken_for_another_raises() -> None:
    """As of a fork that says it alternates and does not."""
    model = make()
    model.info_sharing.alternates = False
    apply_lite3r(model, TEST_CONFIG, scopes=("global", "frame"))
    with pytest.raises(LayoutError, match=r"self_attention_blocks\.1\.attn' got 79 tokens"):
        run(model)


def test_nothing_is_guessed() -> None:
    """A transformer of which nothing tells whether it alternates has no sites."""
    with pytest.raises(UnknownModelError):
        apply_lite3r(nn.Sequential(Transformer(alternates=True)))


def test_fp8_fuses_the_blocks_and_all_goes_back() -> None:
    model, dense = make(), run(make())
    apply_lite3r(model, TEST_CONFIG, keep_ratio=0.2)
    with lite3r_disabled(model):
        assert torch.equal(run(model), dense)
    remove_lite3r(model)
    assert torch.equal(run(model), dense)
    apply_lite3r(model, TEST_CONFIG, keep_ratio=1.0)
    convert(model, fp8_backend="emulated")
    assert 0 < (run(model) - dense).norm() / dense.norm() < 0.1
    assert "run their own forward" not in str(describe(model))


@pytest.mark.slow
def test_compile() -> None:
    """A list of as many views as it was compiled for."""
    assert_compiled_equals_eager(make(), lambda m, x: m(*arguments(x)), [torch.rand(1, 3, 3, 56, 84)])


def test_threads() -> None:
    few, many = VIEWS[:2], [view(70, 98, i) for i in range(3)]
    assert_threads_do_not_mix(make(), (lambda m: m(few), lambda m: m(many)), atol=1e-6)


def test_cross_attention_to_all_other_views() -> None:
    torch.manual_seed(0)
    model = CrossTransformer(3).eval()
    features = Features([torch.randn(1, 32, 4, 6) for _ in range(3)])
    sites = {site.fqn: site for site in find_sites(model)[1]}
    assert [site.scope for site in sites.values()] == ["frame", "global"] * 6
    across = sites["multi_view_branches.1.0.cross_attn"]
    assert isinstance(across.projections, SeparateQKV)
    assert across.keys is not None
    keys: Any = across.keys
    assert keys.function(features) == TokenLayout((Views((4, 6), 2),))
    assert sites["multi_view_branches.0.0.cross_attn"].keys.function(features).reference is None  # of which it is the reference itself
    report = check_adapter(model, (features,), scopes=("global", "frame"))
    assert report.scopes == {"global": 6, "frame": 6}


def test_cameras() -> None:
    generator = torch.Generator().manual_seed(0)
    quaternion, centre = torch.randn(5, 4, generator=generator).double(), torch.randn(5, 3, generator=generator).double()
    found = world_to_camera(quaternion, centre)
    rotation = found[..., :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).double().expand(5, 3, 3))
    torch.testing.assert_close((rotation @ centre[..., None])[..., 0] + found[..., 3], torch.zeros(5, 3).double())
    half = 0.5**0.5  # a quarter turn about z: what a camera sees on its right lies in the world's y
    turned = world_to_camera(torch.tensor([0.0, 0, half, half]), torch.zeros(3))
    torch.testing.assert_close(turned[:, :3].mT @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([(640, 480)], (392, 518)), ([(480, 640)], (518, 392)), ([(500, 500)], (518, 518)), ([(1920, 1080), (1080, 1920)], (392, 518))],
)
def test_images_are_made_as_its_authors_do(sizes: list[tuple[int, int]], expected: tuple[int, int]) -> None:
    from PIL import Image

    pixels = model_entries()["mapanything"].inputs([Image.new("RGB", size, "white") for size in sizes])
    assert pixels.shape == (len(sizes), 3, *expected)
    torch.testing.assert_close(pixels[0, :, 0, 0], (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225]))


# The real code


@pytest.fixture(scope="module")
def real() -> nn.Module:
    torch.manual_seed(0)
    return real_models.small_mapanything()


def test_the_real_model(real: nn.Module) -> None:
    """Last run with map-anything of f7ebafb and uniception 0.1.7."""
    name, sites = find_sites(real)
    assert name == "mapanything"
    assert [site.scope for site in sites] == ["global", "frame", "global", "frame", "encoder", "encoder"]
    assert all(isinstance(site.projections, FusedQKV) and site.block is not None for site in sites)
    report = check_adapter(real, (VIEWS,), scopes=ALL)
    assert report.tokens == 3 * (24 + 1) + 1
    assert not report.unchecked


@pytest.mark.parametrize(
    ("sharing", "options", "fused"),
    [
        ("global_attention", {"registers": False}, True),
        ("alternating_attention", {"distinguish_ref_and_non_ref_views": False, "qk_norm": True}, True),
        ("alternating_attention", {"use_entropy_scaling": True}, False),
    ],
)
def test_other_forms_of_the_real_model(sharing: str, options: dict[str, Any], fused: bool) -> None:
    torch.manual_seed(0)
    model = real_models.small_mapanything(sharing, **options)
    _, sites = find_sites(model)
    assert {isinstance(s.projections, FusedQKV) for s in sites if s.scope != "encoder"} == {fused}
    assert not check_adapter(model, (VIEWS,), scopes=("global", "frame")).unchecked


def test_outputs_of_the_real_model_are_those_of_the_command_line(real: nn.Module) -> None:
    entry, mapped = model_entries()["mapanything"], find_outputs(real)
    assert mapped is not None
    images = torch.rand(3, 3, 56, 84)
    with torch.no_grad():
        predicted = entry.predict(real, entry.normalize(images))
    torch.testing.assert_close(predicted.images, images.permute(0, 2, 3, 1), atol=1e-6, rtol=0)
    outputs = mapped(real([{"img": entry.normalize(x)[None], "data_norm_type": ["dinov2"]} for x in images]))
    for field in ("depth", "points", "world_to_camera"):
        value = getattr(outputs, field)
        assert value.requires_grad
        torch.testing.assert_close(value[0].detach(), getattr(predicted, field))
    assert [x.shape for x in outputs.other] == [(1, 3, 56, 84), (1, 3, 56, 84), (1, 1)]
    rotation, translation = predicted.world_to_camera.split((3, 1), -1)
    seen = torch.einsum("sij,shwj->shwi", rotation, predicted.points) + translation[:, None, None, :, 0]
    torch.testing.assert_close(seen[..., 2], predicted.depth, atol=1e-4, rtol=1e-4)  # points, cameras and depth are of one scene
    many = model_entries()["mapanything"].predict
    torch.testing.assert_close(many(real, entry.normalize(images).repeat(6, 1, 1, 1)).depth.shape, torch.Size((18, 56, 84)))


def test_the_real_modular_dust3r() -> None:
    torch.manual_seed(0)
    model = real_models.small_modular_dust3r()
    _, sites = find_sites(model)
    assert [site.scope for site in sites] == ["frame", "global"] * 6 + ["encoder"]
    assert all(isinstance(site.projections, (FusedQKV, SeparateQKV)) and site.projections.rope == Rope2D(100.0) for site in sites)
    views = [{"img": view(64, 96, i)["img"], "data_norm_type": ["croco"]} for i in range(2)]
    report = check_adapter(model, (views,), scopes=ALL)
    assert report.scopes == {"global": 6, "frame": 6, "encoder": 1}


@pytest.mark.parametrize("name", ["vggt", "pi3"])
def test_models_that_its_factory_wraps(name: str) -> None:
    """Sites are those of the model inside, outputs those of the wrapper."""
    torch.manual_seed(0)
    model = {"vggt": real_models.wrapped_vggt, "pi3": real_models.wrapped_pi3}[name]()
    views = [{"img": view(56, 84, i)["img"], "data_norm_type": ["identity"]} for i in range(2)]
    mapped = find_outputs(model)
    assert mapped is not None
    with torch.no_grad():
        dense = mapped(model(views))
        apply_lite3r(model, TEST_CONFIG, keep_ratio=1.0)
        found = mapped(model(views))
    assert describe(model).adapter == name
    assert {(s.calls.dense, s.calls.host) for s in describe(model).sites if s.sparse} == {(1, 0)}
    for field in ("depth", "points", "world_to_camera"):
        torch.testing.assert_close(getattr(found, field), getattr(dense, field), atol=1e-4, rtol=1e-4)
    assert dense.depth is not None
    assert dense.depth.shape == (1, 2, 56, 84)


@pytest.mark.parametrize("cached", [True, False])
def test_an_encoder_that_cannot_be_fetched_is_told(cached: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the real `torch.hub`, in a process without a network; other errors of the library are its own."""

    def urlopen(*_: object, **__: object) -> object:
        raise URLError("Name or service not known")

    def build(**_: object) -> object:
        return torch.hub.load("facebookresearch/dinov2", "dinov2_vitg14", pretrained=False, trust_repo=True)

    module = SimpleNamespace(MapAnything=build)
    for name in ("mapanything", "mapanything.models", "mapanything.models.mapanything", "mapanything.models.mapanything.model"):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("torch.hub.urlopen", urlopen)
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path))
    if cached:
        (tmp_path / "facebookresearch_dinov2_main").mkdir()
        (tmp_path / "facebookresearch_dinov2_main" / "hubconf.py").write_text("raise RuntimeError('of its own')")
    with pytest.raises(RuntimeError if cached else InputError, match="of its own" if cached else "once where there is a network"):
        ENTRIES["mapanything"].create()
