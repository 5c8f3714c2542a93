"""Trials of attention sites: what tells modules apart, and weights that are elsewhere or are not plain."""

from __future__ import annotations

import copy
import threading
import time
from typing import Any

import hosts
import peft
import pytest
import torch
from torch import Tensor, nn
from toys import Adapter, Attention, Toy, images, toy_adapter

from lite3r_plugin import AttentionSite, FusedQKV, Rope2D, Routed, SeparateQKV, apply_lite3r, describe, lite3r_disabled
from lite3r_plugin.attention.trial import Trials
from lite3r_plugin.errors import NoSitesError
from lite3r_plugin.testing import TEST_CONFIG

__all__ = ["toy_adapter"]  # the fixture
SITE = AttentionSite("a", "global", 16, FusedQKV(2))
SPARSE = TEST_CONFIG.replace(keep_ratio=0.3)


class Gained(Attention):
    """A fork whose instances differ in an attribute."""

    gain: Any

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) * self.gain


def gained(gain: Any) -> Gained:
    made = Gained(32, 2)
    made.gain = gain
    return made


@pytest.mark.parametrize("gain", [1.5, torch.tensor(1.5), {"a": 1.5}, lambda x: x])
def test_instances_are_told_apart(gain: Any) -> None:
    trials = Trials()
    assert trials.of(SITE, gained(1.0)).refused is None
    assert trials.of(SITE, gained(gain)).refused is not None
    assert trials.of(SITE, gained(1.0)).refused is None


def test_a_buffer_counts_by_its_value() -> None:
    trials = Trials()
    for value, same in ((1.0, True), (1.5, False)):
        host = Gained(32, 2)
        host.register_buffer("gain", torch.tensor(value))
        assert (trials.of(SITE, host).refused is None) == same


def test_a_parameter_counts_whatever_its_value() -> None:
    host = gained(nn.Parameter(torch.ones(())))
    assert "differs from the host's own forward by" in str(Trials().of(SITE, host).refused)


def test_alike_modules_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = Attention.forward
    monkeypatch.setattr(Attention, "forward", lambda self, *args: (calls.append(1), real(self, *args))[1])
    trials = Trials()
    for _ in range(5):
        trials.of(SITE, Attention(32, 2))
    assert len(calls) == 1
    trials.of(SITE, Attention(48, 3))  # another size
    trials.of(AttentionSite("b", "global", 8, FusedQKV(4)), Attention(32, 2))  # another description
    assert len(calls) == 3


@pytest.mark.parametrize("fork", [False, True])
def test_weights_may_be_anywhere_and_of_any_kind(fork: bool) -> None:
    def made() -> nn.Module:
        return gained(1.5 if fork else 1.0)

    with torch.device("meta"):
        meta = made()
    half = made().bfloat16()
    adapted = made()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["qkv"]), adapted)
    hooked = made()
    hooked.qkv.register_forward_hook(lambda *_: None)
    tiny_scales = made()
    nn.init.constant_(tiny_scales.proj.weight, 1e-8)
    for host in (meta, half, adapted, hooked, tiny_scales):
        assert (Trials().of(SITE, host).refused is not None) == fork


def test_a_trial_leaves_no_trace() -> None:
    host = gained(1.0).train()
    before, state = copy.deepcopy(host.state_dict()), torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert Trials().of(SITE, host).refused is None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), host.state_dict().values(), strict=True))
    assert host.training
    assert all(parameter.requires_grad for parameter in host.parameters())


def test_a_module_that_holds_another_one_as_an_attribute() -> None:
    host, other = gained(1.0), nn.Linear(4, 4)
    vars(host)["parents"] = [other, host]
    assert Trials().of(SITE, host).refused is None


@pytest.mark.parametrize(("held", "fused"), [(torch.nn.functional, True), (threading.Lock(), False), ([{"of": threading.Lock()}], False)])
def test_what_cannot_be_copied_is_not_tried(held: Any, fused: bool) -> None:
    """Such as a process group: what a forward does with it, nobody else may try."""
    model = nn.Sequential(Attention(32, 2)).eval()
    model[0].held = held
    x = torch.randn(1, 24, 32)
    expected = model(x)
    apply_lite3r(model, keep_ratio=1.0, sites=[AttentionSite("0", "global", 16, FusedQKV(2))])
    assert ("q, k and v of the host's own code: it cannot be copied to be tried" in str(describe(model))) != fused
    torch.testing.assert_close(model(x), expected)


class Pair(nn.Module):
    """Gives attention weights besides."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(32, 32) for _ in range(4))
        self.scale = scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (f(x).unflatten(-1, (2, 16)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        weights = (q @ k.mT * self.scale).softmax(-1)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2)), weights


def test_eager_attention_with_its_own_scale() -> None:
    site = AttentionSite("a", "global", 16, SeparateQKV(2, returns_weights=True))
    assert Trials().of(site, Pair(0.25)) == Trials().of(site, Pair(16**-0.5))
    assert Trials().of(site, Pair(0.25)).refused is None
    other = Trials().of(site, Pair(1.0))
    assert other.refused is not None
    assert other.attention_calls == 0
    assert Trials().of(AttentionSite("a", "global", 16, SeparateQKV(2)), Pair(0.25)).refused is not None  # a pair, not a tensor


def test_coordinates_that_are_ignored() -> None:
    class Ignores(hosts.XposAttention):
        def forward(self, x: Tensor, attn_bias: None = None, xpos: Tensor | None = None) -> Tensor:
            return self.attend(x, None)

    def site(rope: Rope2D | None) -> AttentionSite:
        return AttentionSite("a", "global", 16, FusedQKV(2, rope=rope, positions="xpos"))

    assert Trials().of(site(None), Ignores(32, 2)).refused is None
    assert Trials().of(site(Rope2D(100.0)), Ignores(32, 2)).refused is not None


class Eager(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_a_fork_that_calls_no_attention_function_is_left_to_the_host(adapter: Adapter) -> None:
    model = Toy(make=Eager)
    with pytest.raises(NoSitesError, match=r"would become sparse: .*; it calls scaled_dot_product_attention 0 times, not once"):
        apply_lite3r(model, SPARSE)
    model.cross[0] = Attention(32, 2)
    expected = model(images())
    apply_lite3r(model, SPARSE, keep_ratio=1.0)
    assert (model(images()) - expected).abs().max() < 1e-5
    report = describe(model)
    assert [site.left for site in report.sites] == [None, "it calls scaled_dot_product_attention 0 times, not once"]
    assert set(report.routed) == {"cross.1"}
    assert "1 global site dense, in the host's own code: it calls scaled_dot_product_attention 0 times, not once" in str(report)
    with lite3r_disabled(model):
        assert torch.equal(model(images()), expected)


def test_a_fork_is_sparse_in_its_own_code(adapter: Adapter) -> None:
    class Scaled(Attention):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(x * 1.5, mask)

    model = Toy(make=Scaled)
    expected = model(images())
    report = describe(apply_lite3r(model, SPARSE))
    assert [type(site.projections) for site in model.cross[0].state.sites if site.scope == "global"] == [Routed, Routed]
    assert "2 sites with q, k and v of the host's own code: it differs from the host's own forward by" in str(report)
    assert not torch.allclose(model(images()), expected)
    assert [site.calls.sparse for site in describe(model).sites] == [1, 1]


def test_trials_of_a_large_model_take_less_than_a_second() -> None:
    """24 + 24 sites of VGGT-1B's width, half of which differ in an attribute; by far more on a slow machine would be noticed."""
    with torch.device("meta"):
        blocks = [hosts.PosAttention(1024, 16, hosts.AxialRope("base"), qk_norm=True) for _ in range(48)]
    for i, block in enumerate(blocks[:12]):
        vars(block)["index"] = i
    shared = blocks[0].rope
    for block in blocks:
        block.rope = shared
    site = AttentionSite("a", "global", 64, FusedQKV(16, q_norm="q_norm", k_norm="k_norm", rope=Rope2D(100.0), positions="pos"))
    trials, started = Trials(), time.process_time()
    assert {trials.of(site, block).refused for block in blocks} == {None}
    assert time.process_time() - started < 10
