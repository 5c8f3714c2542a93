"""`doctor` sees what a model does, and changes nothing."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lite3r_plugin import apply_lite3r, doctor
from lite3r_plugin.costs.attention import H100
from lite3r_plugin.costs.model import BreakEven, SparseShares, break_even_of
from lite3r_plugin.diagnosis import Diagnosis, Step, Timing
from lite3r_plugin.diagnosis.doctor import most_views
from lite3r_plugin.errors import AlreadyAppliedError, ConfigError, InputError, ModelTypeError
from lite3r_plugin.fp8 import backends
from lite3r_plugin.testbed import Testbed, TestbedConfig

VIEWS = 4


def small() -> Testbed:
    torch.manual_seed(0)
    return Testbed(TestbedConfig(dim=64, head_dim=32, depth=3, stem=8))


def images(views: int = VIEWS) -> Tensor:
    return torch.rand(1, views, 3, 32, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def found() -> Diagnosis:
    return doctor(small(), images(), memory="1GB")


class Untidy(nn.Module):
    """Leaves traces of a forward wherever it can."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(3, 3), nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("seen", torch.zeros(3))
        self.log: list[int] = []
        self.cache: dict[Any, Any] = {}
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        x = self.drop(self.norm(self.linear(x))) + torch.rand(()) + random.random() + float(np.random.rand())
        self.seen += 1
        self.log.append(1)
        self.cache[len(self.cache)] = x
        self.last = self.extra = x
        self.register_forward_hook(lambda *_: None)
        return x


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that is bound to modules, by identity and content."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            contents = list(value.items()) if isinstance(value, dict) else list(value) if isinstance(value, (list, set)) else None
            found[f"{name}.{key}"] = id(value), [(k, id(v)) for k, v in contents] if isinstance(value, dict) else contents
    return found


def test_nothing_changes() -> None:
    model = Untidy().train()
    calls: list[int] = []
    handle = model.linear.register_forward_hook(lambda *_: calls.append(1))
    given = torch.rand(4, 3)
    before, weights = state_of(model), {name: (x.clone(), x._version) for name, x in model.named_parameters()}
    buffers, inputs = {name: x.clone() for name, x in model.named_buffers()}, given.clone()
    numbers = torch.get_rng_state(), random.getstate(), str(np.random.get_state())

    doctor(model, given)

    assert calls, "the forward did not run"
    assert state_of(model) == before
    for name, x in model.named_parameters():
        assert torch.equal(x, weights[name][0])
        assert x._version == weights[name][1]
        assert x.grad is None
    for name, x in model.named_buffers():
        assert torch.equal(x, buffers[name]), name
    assert torch.equal(given, inputs)
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert (random.getstate(), str(np.random.get_state())) == numbers[1:]
    assert model.training
    assert model.norm.training
    assert list(model.linear._forward_hooks) == [handle.id]
    assert torch.is_grad_enabled()


def test_a_forward_that_fails_leaves_the_model_as_it_was() -> None:
    model = Untidy().train()
    before = state_of(model)
    with pytest.raises(InputError, match="does not run on what it was given: RuntimeError"):
        doctor(model, torch.rand(4, 5))
    assert state_of(model) == before


def test_sites_tell_the_kernel_that_ran(found: Diagnosis) -> None:
    sites = {(site.pattern, site.scope): site for site in found.sites}
    tokens = 5 + 4 * 6
    frame = sites["aggregator.frame_blocks.{i}.attn", "frame"]
    assert (frame.count, frame.queries, frame.kernel, frame.dtype) == (3, (VIEWS, 2, tokens, 32), "flash", "float32")
    assert sites["aggregator.global_blocks.{i}.attn", "global"].queries == (1, 2, VIEWS * tokens, 32)


def test_a_mask_and_products_with_a_softmax_are_told() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, torch.zeros(x.shape[-2], x.shape[-2], dtype=x.dtype))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Masked()

        def forward(self, x: Tensor) -> Tensor:
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                return self.attn(x)

    (site,) = doctor(Outer(), torch.rand(1, 2, 9, 8)).sites
    assert (site.pattern, site.kernel, site.masked, site.scope) == ("attn", "math", True, None)


def test_what_runs_in_fp32_inside_of_a_half_model_is_told() -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(512, 512), nn.Linear(512, 512)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(self.body(x.bfloat16()))
            return F.linear(x.float(), self.head.weight.float())

    leaks = doctor(Leaky().bfloat16(), torch.rand(16, 512)).leaks
    product = next(leak for leak in leaks if leak.operator == "mm")
    assert product.flops == 2 * 16 * 512 * 512
    assert product.size == 16 * 512 * 4


def test_a_model_in_fp32_has_no_leaks(found: Diagnosis) -> None:
    assert found.products.keys() == {"float32"}
    assert found.leaks == ()


def test_layers_that_nobody_reads_are_told(found: Diagnosis) -> None:
    (unread,) = found.unread
    assert (unread.pattern, unread.count, unread.shape) == ("aggregator", 2, (1, VIEWS, 29, 128))
    assert unread.size == pytest.approx(2 * VIEWS * 29 * 128 * 4, rel=0.02)
    assert found.activations["kept for nobody"] == unread.size


def test_bytes_add_up(found: Diagnosis) -> None:
    weights = sum(p.nbytes for p in small().parameters())
    assert found.weight_bytes == {"float32": weights}
    assert sum(found.parts.values()) == weights
    assert sum(found.activations.values()) == found.activation_peak


def test_views_that_fit_follow_from_measured_growth(found: Diagnosis) -> None:
    assert found.views is not None
    assert list(found.views.measured) == [1, 2, 4]
    model = small()
    most = found.views.most
    more = doctor(model, images(16), memory="1GB").views
    assert more is not None
    grown = (more.measured[16] - more.measured[8]) / 8
    assert most == pytest.approx(10**9 / grown, rel=0.1)


@pytest.mark.parametrize(
    ("measured", "memory", "most"),
    [
        ({1: 110, 2: 120}, 1000, 90),
        ({1: 110, 2: 120, 4: 140}, 1000, 90),
        ({1: 101, 2: 104, 4: 116}, 500, 20),
        ({2: 200, 4: 300}, 100, 0),
        ({1: 300, 2: 400}, 100, 0),
    ],
)
def test_most_views(measured: dict[int, int], memory: int, most: int) -> None:
    assert most_views(measured, memory) == most


def test_on_a_cpu_steps_say_why_they_do_not_pay(found: Diagnosis) -> None:
    steps = {step.name: step for step in found.steps}
    assert steps["weights in BF16"].pays
    camera_head = sum(p.nbytes for p in small().camera_head.parameters())
    assert steps["weights in BF16"].saves_bytes > (found.weight_bytes["float32"] - camera_head) / 2 * 0.99
    for name, reason in (("sparse attention", "on cpu"), ("CUDA graphs", "for CUDA devices"), ("FP8 Linears", "no FP8 matrix products")):
        assert steps[name].pays is False
        assert reason in steps[name].why


def test_fp8_is_judged_of_the_linears_that_the_filter_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "why_not", lambda *_: None)
    model = Testbed(TestbedConfig(dim=64, head_dim=32, depth=4, stem=8))  # 4 Linears in each of 8 blocks

    def judged(**fields: Any) -> Step:
        return next(step for step in doctor(model, images(), memory="1GB", **fields).steps if step.name == "FP8 Linears")

    assert judged().why.startswith("12 Linears")  # the first and the last pair are left, and output projections
    assert judged().line == 'apply_lite3r(model, preset="fast", precision="fp8")'
    assert judged(fp8_filter=("*.qkv",)).why.startswith("8 Linears")
    assert judged(fp8_filter=("*.qkv",)).line == """apply_lite3r(model, preset="fast", precision="fp8", fp8_filter=('*.qkv',))"""


def test_a_model_that_nobody_knows_is_looked_at_too() -> None:
    found = doctor(nn.Linear(3, 3), (torch.rand(2, 3),))
    assert found.adapter is None
    assert "none was seen" in str(found)
    assert any("no installed adapter knows this model" in note for note in found.notes)
    assert any("how many views fit" in note for note in found.notes)


def test_inputs_may_be_keywords_or_a_function() -> None:
    model = small()
    assert doctor(model, {"images": images(1)}).images == ((1, 1, 3, 32, 48),)
    assert doctor(model, lambda model: model(images(1))).images == ()


def test_views_of_a_list_are_counted() -> None:
    """As MapAnything and Fast3R take them, a dict each."""

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = small()

        def forward(self, views: list[dict[str, Any]]) -> Any:
            return self.model(torch.stack([view["img"] for view in views], 1))

    views = [{"name": [str(i)], "img": image[None]} for i, image in enumerate(images(4)[0])]
    found = doctor(Listed(), (views,), memory="1GB").views
    assert found is not None
    assert list(found.measured) == [1, 2, 4]
    assert list(found.measured.values()) == sorted(found.measured.values())


def test_it_prints_and_goes_to_json(found: Diagnosis) -> None:
    text = str(found)
    for expected in (
        "Testbed on cpu (adapter 'vggt'), given [1, 4, 3, 32, 48]",
        "3 x aggregator.frame_blocks.{i}.attn: frame q [4, 2, 29, 32], 29 keys: flash",
        "launch-bound: a question for a GPU", "views fit into 0.9 GiB (an estimate", "(estimates)", 'apply_lite3r(model, preset="fast")',
    ):  # fmt: skip
        assert expected in text
    assert json.loads(json.dumps(found.to_dict()))["timing"]["launch_bound"] is None


@pytest.mark.parametrize(("host", "gpu", "bound"), [(30.0, 10.0, True), (10.0, 30.0, False), (10.0, None, None), (None, None, None)])
def test_launch_bound(host: float | None, gpu: float | None, bound: bool | None) -> None:
    assert Timing(30.0, 5, host, gpu, 100, {}).launch_bound is bound


def test_what_cannot_be_examined_is_refused() -> None:
    model = small().eval()
    with pytest.raises(ModelTypeError):
        doctor(3, images())  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="memory is a number of bytes above 0"):
        doctor(model, images(), memory="much")
    with pytest.raises(ConfigError, match="unknown configuration field"):
        doctor(model, images(), keep=0.1)
    with pytest.raises(AlreadyAppliedError, match=r"describe\(model\) tells"):
        doctor(apply_lite3r(model), images())


@pytest.mark.parametrize(
    ("tokens", "queries", "keys", "width"),
    [(3000, 100, 100, 1024), (60000, 2000, 2000, 1024), (5000, 5000, 5000, 64), (8000, 0, 0, 512), (10000, 0, 3000, 1024)],
)
def test_the_estimate_agrees_with_the_rule_by_which_sites_decide(tokens: int, queries: int, keys: int, width: int) -> None:
    shares = SparseShares(100_000_000, 64)
    rule: BreakEven = break_even_of(H100, shares)
    dense, sparse = (H100.milliseconds(width, tokens, share) for share in (None, shares.of_scores(tokens, queries, keys)))
    assert rule.pays(width, tokens, queries, tokens, keys, tokens) == (sparse < dense)
