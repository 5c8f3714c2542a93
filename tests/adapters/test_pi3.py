"""Pi3: on a structural double always, on the real package where it can be imported."""

from __future__ import annotations

import hosts
import pytest
import torch
from numerics import relative_error
from properties import assert_bf16_is_as_exact_as_dense, assert_compiled_equals_eager, assert_threads_do_not_mix, enlarge_layer_scales
from real_models import small_pi3
from torch import nn

from lite3r_plugin import FusedQKV, Rope2D, apply_lite3r, describe, remove_lite3r
from lite3r_plugin.adapter.plugins import find_sites
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.testing import TEST_CONFIG, check_adapter

pytestmark = pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda':UserWarning")
IMAGES = (1, 3, 3, 70, 98)


@pytest.fixture(params=["double", "real"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    model = hosts.Pi3() if request.param == "double" else small_pi3()
    enlarge_layer_scales(model)
    return model.eval()


def test_sites(model: nn.Module) -> None:
    adapter, sites = find_sites(model)
    assert adapter == "pi3"
    scopes = {site.fqn: site.scope for site in sites}
    assert [scopes[f"decoder.{i}.attn"] for i in range(4)] == ["frame", "global", "frame", "global"]
    assert scopes["point_decoder.blocks.0.attn"] == scopes["camera_decoder.blocks.0.attn"] == "frame"
    assert scopes["encoder.blocks.0.attn"] == "encoder"
    decoder = next(site for site in sites if site.fqn == "decoder.1.attn")
    assert isinstance(decoder.projections, FusedQKV)
    assert decoder.projections.rope == Rope2D(100.0)
    assert decoder.projections.positions == "xpos"
    assert (decoder.tokens.image_module, decoder.tokens.special_tokens, decoder.tokens.reference) == ("encoder", 5, None)


def test_conformance(model: nn.Module) -> None:
    report = check_adapter(model, (torch.rand(IMAGES),))
    assert report.scopes == {"global": 2}
    assert report.tokens == 3 * (5 + 5 * 7)


def test_conformance_of_all_scopes(model: nn.Module) -> None:
    report = check_adapter(model, (torch.rand(IMAGES),), scopes=("global", "frame", "encoder"))
    assert set(report.scopes) == {"global", "frame", "encoder"}


def test_no_view_is_the_reference() -> None:
    """Images may come in any order: what is computed of each is the same, but for how blocks end."""
    model, images, order = hosts.Pi3().eval(), torch.rand(1, 8, 3, 112, 112), torch.tensor([3, 1, 2, 0, 4, 5, 6, 7])
    apply_lite3r(model, TEST_CONFIG, keep_ratio=0.1)
    assert "always kept: special tokens;" in str(describe(model))
    site = next(site for site in lite3r_modules(model).values() if site.sparse)
    with torch.no_grad():
        one, other = (model(x)["points"].unflatten(0, (1, 8))[0] for x in (images, images[:, order]))
    assert relative_error(other, one[order]) < 0.01
    apply_lite3r(remove_lite3r(model), TEST_CONFIG, keep_ratio=0.1, pin="special")
    density = site.calls.density
    with torch.no_grad():
        model(images)
    assert density == next(site for site in lite3r_modules(model).values() if site.sparse).calls.density


def test_bf16() -> None:
    assert_bf16_is_as_exact_as_dense(hosts.Pi3().eval(), torch.rand(IMAGES))


@pytest.mark.slow
def test_compile() -> None:
    images = [torch.rand(1, views, *IMAGES[2:]) for views in (3, 2, 5)]
    assert_compiled_equals_eager(hosts.Pi3().eval(), lambda m, x: m(x), images)


def test_threads(model: nn.Module) -> None:
    few, many = torch.rand(1, 2, 3, 56, 98), torch.rand(IMAGES)
    # Not bit for bit: Pi3 itself switches SDPA backends by `sdpa_kernel`, which is process-wide, so its own threads race.
    assert_threads_do_not_mix(model, (lambda m: m(few), lambda m: m(many)), atol=1e-5)


def test_pi3x_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    """The multimodal Pi3X in full size, without memory: pose injection and the metric head's cross-attention are left out."""
    module = pytest.importorskip("pi3.models.pi3x")
    linspace = torch.linspace
    monkeypatch.setattr(torch, "linspace", lambda *args, **kwargs: linspace(*args, **{**kwargs, "device": "cpu"}))
    with torch.device("meta"):
        model = module.Pi3X()
    adapter, sites = find_sites(model)
    assert adapter == "pi3"
    names = [site.fqn for site in sites]
    assert [n for n in names if n.startswith("decoder.")] == [f"decoder.{i}.attn" for i in range(36)]
    assert [s.fqn for s in sites if s.scope == "global"] == [f"decoder.{i}.attn" for i in range(1, 36, 2)]
    assert sum(s.scope == "encoder" for s in sites) == 24
    assert not any(n.startswith(("pose_inject_blk", "metric_decoder", "depth_encoder")) for n in names)
