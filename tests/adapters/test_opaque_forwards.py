"""Modules whose forward somebody has exchanged for an object that does not tell its arguments: no adapter is broken by them."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import hosts
import pytest
import torch
from torch import Tensor, nn

from lite3r_plugin import apply_lite3r
from lite3r_plugin.adapter.plugins import find_sites
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.errors import AdapterError, UnknownModelError
from lite3r_plugin.testing import TEST_CONFIG


class Opaque:
    """Calls a forward, and has a signature that is none."""

    __signature__: Any = 5

    def __init__(self, forward: Any) -> None:
        self.wrapped = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.wrapped(*args, **kwargs)


class Raising(Opaque):
    """Whoever asks for its signature gets an error of its own."""

    @property
    def __signature__(self) -> Any:
        raise RuntimeError("no signature today")


OPAQUE = [Opaque, Raising, lambda forward: torch.relu]


@pytest.fixture(params=OPAQUE, ids=["nonsense", "raises", "builtin"])
def opaque(request: pytest.FixtureRequest) -> Any:
    with pytest.raises((TypeError, ValueError, RuntimeError), match="signature"):
        inspect.signature(request.param(None))
    return request.param


def timm_vit() -> Any:
    timm = pytest.importorskip("timm")
    return timm.create_model("vit_tiny_patch16_224", img_size=96, depth=2, num_classes=0).eval()


def hugging_face() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56, attn_implementation="sdpa"
    )
    return transformers.Dinov2Model(config).eval()


@pytest.mark.parametrize("build", [timm_vit, hugging_face])
def test_general_adapters_leave_them_to_others(build: Any, opaque: Any) -> None:
    """Without a warning, which would say that the adapter has failed."""
    model = build()
    adapter, sites = find_sites(model)
    first, second = (model.get_submodule(site.fqn) for site in sites)
    first.forward = opaque(first.forward)
    assert find_sites(model) == (adapter, sites[1:])
    second.forward = opaque(second.forward)
    with pytest.raises(UnknownModelError, match="no model adapter knows"):
        find_sites(model)


@pytest.mark.parametrize(
    ("build", "attention"),
    [(hosts.VGGT, "aggregator.global_blocks.1.attn"), (hosts.Pi3, "decoder.1.attn"), (hosts.Pi3, "decoder.3.attn")],
)
def test_a_global_site_of_a_known_model_is_named(build: Any, attention: str, opaque: Any) -> None:
    model = build().eval()
    owner = model.get_submodule(attention)
    owner.forward = opaque(owner.forward)
    with pytest.raises(AdapterError, match=rf"site '{attention}': the arguments of its forward cannot be read; .* before apply_lite3r"):
        apply_lite3r(model, TEST_CONFIG)


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (hosts.VGGT, ["aggregator.frame_blocks.0.attn", "aggregator.global_blocks.0", "aggregator.patch_embed.blocks.0.attn"]),
        (hosts.Pi3, ["decoder.0.attn", "decoder.1", "encoder.blocks.0", "encoder.blocks.0.attn", "camera_decoder.blocks.0.attn"]),
    ],
)
@pytest.mark.parametrize("wrap", OPAQUE[:2], ids=["nonsense", "raises"])
@pytest.mark.parametrize("of_the_class", [False, True])
def test_what_stays_dense_may_have_any_forward(build: Any, names: list[str], wrap: Any, of_the_class: bool) -> None:
    model, images = build().eval(), torch.rand(1, 2, 3, 42, 56)
    for name in names:
        module: nn.Module = model.get_submodule(name)
        if of_the_class:
            forward = wrap(functools.partial(type(module).forward, module))
            module.__class__ = type("Exchanged", (type(module),), {"forward": forward})
        else:
            module.forward = wrap(module.forward)
    dense = model(images)
    apply_lite3r(model, TEST_CONFIG, keep_ratio=1.0)
    assert {site.site.scope for site in lite3r_modules(model).values() if site.sparse} == {"global"}
    assert not set(names) & lite3r_modules(model).keys()
    torch.testing.assert_close(model(images), dense)
