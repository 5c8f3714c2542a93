"""A preset on the published code of each family: it runs in BF16, nothing in it waits for values, and it goes again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interruptions import contents
from numerics import relative_error
from real_models import small_da3, small_pi3, small_vggt
from recording import Tape
from torch import Tensor, nn

from lite3r_adapters.pi3.exact import NearestRotation
from lite3r_plugin import apply_lite3r, describe, lite3r_disabled, remove_lite3r
from lite3r_plugin.runtime import fast
from lite3r_plugin.runtime.graphs import Graphs
from lite3r_plugin.testing import named_tensors

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`torch.cuda.amp.autocast\(args...\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda':UserWarning"),
]
DENSE: dict[str, Any] = {"keep_ratio": 1.0, "linear_branch": "none"}


def small_timm() -> nn.Module:
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2).eval()


def small_transformers() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56)
    return transformers.Dinov2Model(config).eval()


BUILD: dict[str, Callable[..., nn.Module]] = {
    "vggt": small_vggt, "da3": small_da3, "pi3": small_pi3, "timm": small_timm, "transformers": small_transformers,
}  # fmt: skip
IMAGES: dict[str, tuple[int, ...]] = {"timm": (2, 3, 64, 64), "transformers": (2, 3, 56, 56)}


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name == "da3")) for name in BUILD])
def family(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    size = IMAGES.get(request.param, (1, 2, 3, 56, 70))
    return BUILD[request.param]().eval(), torch.rand(size, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def test_a_family_takes_the_preset_and_gives_it_back(family: tuple[nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "Graphs", functools.partial(Graphs, recorder=Tape))
    model, images = family
    before, weights = contents(model), {name: x.clone() for name, x in model.state_dict().items()}
    expected = named_tensors(model(images))
    apply_lite3r(model, **DENSE, preset="fast", compile_blocks=False)
    for _ in range(2):
        found = named_tensors(model(images))
        assert found.keys() == expected.keys()
        for path, x in expected.items():
            assert found[path].dtype == x.dtype, path
            assert relative_error(found[path], x) < 0.05, path
    report = describe(model)
    assert "CUDA graphs: 1 layouts of inputs, at most 8; 2 replays" in str(report)
    assert report.not_rewritten == {}
    with lite3r_disabled(model):
        assert all(torch.equal(x, expected[path]) for path, x in named_tensors(model(images)).items())
    remove_lite3r(model)
    assert contents(model) == before
    assert all(torch.equal(x, weights[name]) and x.dtype == weights[name].dtype for name, x in model.state_dict().items())


@pytest.mark.gpu
@torch.inference_mode()
def test_a_family_is_recorded_on_a_gpu(family: tuple[nn.Module, Tensor]) -> None:
    model, images = family[0].cuda(), family[1].cuda()
    apply_lite3r(model, **DENSE, preset="fast", compile_blocks=False)
    first, second = (named_tensors(model(images)) for _ in range(2))
    assert "CUDA graphs: 1 layouts of inputs, at most 8; 2 replays" in str(describe(model)), str(describe(model))
    remove_lite3r(model)
    apply_lite3r(model, **DENSE, preset="fast", compile_blocks=False, cuda_graphs=False)
    eager = named_tensors(model(images))
    for path, x in eager.items():
        assert torch.equal(first[path], second[path]), path
        assert relative_error(first[path], x) < 1e-2, path  # of BF16: with another workspace cuBLAS chooses other algorithms


def by_svd(m: Tensor) -> Tensor:
    """The nearest rotations as their definition has it."""
    u, _, vh = torch.linalg.svd(torch.nn.functional.normalize(m.view(-1, 3, 3).double(), dim=-1))
    sign = torch.det(u @ vh)
    return torch.stack((u[..., 0], u[..., 1], u[..., 2] * sign[:, None]), -1) @ vh


def test_nearest_rotations_without_a_decomposition() -> None:
    head: Any = SimpleNamespace()
    m = torch.randn(512, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    m[:256].view(-1, 3, 3)[:, 0] *= m[:256].view(-1, 3, 3).det().sign()[:, None]  # the others are reflections as often as not
    found = NearestRotation(head).rewritten(m)
    torch.testing.assert_close(found @ found.mT, torch.eye(3, dtype=torch.float64).expand(512, 3, 3))
    torch.testing.assert_close(found.det(), torch.ones(512, dtype=torch.float64))
    torch.testing.assert_close(found[:256], by_svd(m)[:256])
    gain = lambda r: (r * torch.nn.functional.normalize(m.view(-1, 3, 3), dim=-1)).sum((-1, -2))  # noqa: E731
    torch.testing.assert_close(gain(found), gain(by_svd(m)))  # where two rotations are as near, either will do
