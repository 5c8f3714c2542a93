"""The conformance kit passes a right adapter and names what is wrong with a wrong one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import hosts
import pytest
import torch
from torch import Tensor, nn

from lite3r_plugin import AttentionSite, FusedQKV, PreNormBlock, Rope2D, Routed, TokenSource, apply_lite3r, hookimpl
from lite3r_plugin.adapter.plugins import get_manager
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.errors import AdapterError, AlreadyAppliedError, LayoutError, UnknownModelError
from lite3r_plugin.ops.dispatch import SlowPathWarning
from lite3r_plugin.testing import check_adapter

IMAGES = (1, 3, 3, 56, 98)


class Net(nn.Module):
    """One global attention module over patches and one special token per view, which no built-in adapter knows."""

    def __init__(self) -> None:
        super().__init__()
        self.rope = hosts.AxialRope("base")
        self.patches = hosts.Patches(14, 32)
        self.special = nn.Parameter(torch.randn(1, 32))
        self.across = hosts.PosAttention(32, 2, self.rope, qk_norm=True)
        self.spare = hosts.PosAttention(32, 2)
        self.noise = 0.0

    def forward(self, images: Tensor) -> dict[str, Any]:
        batch, views, _, height, width = images.shape
        x = self.patches(images.flatten(0, 1))
        x = torch.cat((self.special.expand(len(x), -1, -1), x), 1).unflatten(0, (batch, views)).flatten(1, 2)
        pos = hosts.grid_positions(views, height // 14, width // 14, 1).flatten(0, 1).expand(batch, -1, -1)
        x = x + self.across(x, pos=pos) + self.noise
        return {"tokens": x, "pair": [x.mean(), (x > 0)], "name": "net"}


TOKENS = TokenSource("patches", (14, 14), 1)
RIGHT = AttentionSite("across", "global", 16, FusedQKV(2, q_norm="q_norm", k_norm="k_norm", rope=Rope2D(100.0), positions="pos"), TOKENS)
Register = Callable[..., None]


@pytest.fixture
def register() -> Iterator[Register]:
    """Registers the adapter that answers with the given sites for `Net`, in the place of the one before."""

    def register(*sites: AttentionSite) -> None:
        class Plugin:
            @hookimpl
            def lite3r_attention_sites(self, model: nn.Module) -> list[AttentionSite] | None:
                return list(sites) if any(isinstance(m, Net) for m in model.modules()) else None

        remove()
        get_manager().register(Plugin(), name="test")

    def remove() -> None:
        if get_manager().has_plugin("test"):
            get_manager().unregister(name="test")

    yield register
    remove()


@pytest.fixture
def net() -> nn.Module:
    return Net().eval()


def check(net: nn.Module, **options: Any) -> Any:
    return check_adapter(net, (torch.rand(IMAGES),), **options)


def test_a_right_adapter_passes_and_the_report_reads_well(register: Register, net: nn.Module) -> None:
    register(RIGHT)
    report = check(net)
    assert report.scopes == {"global": 1}
    assert report.tokens == 3 * (1 + 4 * 7)
    assert report.dense_error <= 1e-5 < report.sparse_change
    assert str(report).startswith("adapter 'test' is fine: 1 global sites of up to 87 tokens, error ")


def test_routed_passes_too(register: Register, net: nn.Module) -> None:
    register(dataclasses.replace(RIGHT, projections=Routed()))
    assert check(net).dense_error == 0


def test_a_block_that_is_not_as_described(register: Register, net: nn.Module) -> None:
    net.across = hosts.Block(net.across, 32).eval()
    block = PreNormBlock("across", up="mlp.0", down="mlp.2")
    register(dataclasses.replace(RIGHT, fqn="across.attn", block=block))
    check(net)
    register(dataclasses.replace(RIGHT, fqn="across.attn", block=dataclasses.replace(block, activation="gelu_tanh")))
    with pytest.raises(AdapterError, match=r"site 'across\.attn': the block 'across' gives something else than described.*activation"):
        check(net)


def test_inputs_may_be_keywords_or_a_function(register: Register, net: nn.Module) -> None:
    register(RIGHT)
    images = torch.rand(IMAGES)
    check_adapter(net, {"images": images})
    check_adapter(net, lambda model: model(images))


@pytest.mark.parametrize(
    "wrong",
    [
        FusedQKV(2, rope=Rope2D(100.0), positions="pos"),  # norms forgotten
        FusedQKV(2, q_norm="q_norm", k_norm="k_norm", positions="pos"),  # rotary embedding forgotten
        FusedQKV(2, q_norm="q_norm", k_norm="k_norm", rope=Rope2D(50.0), positions="pos"),
        FusedQKV(2, q_norm="k_norm", k_norm="k_norm", rope=Rope2D(100.0), positions="pos"),
    ],
)
def test_wrong_projections_are_found(register: Register, net: nn.Module, wrong: FusedQKV) -> None:
    nn.init.normal_(net.across.q_norm.weight)
    register(dataclasses.replace(RIGHT, projections=wrong))
    with pytest.raises(AdapterError, match=r"site 'across': the projections do not describe .* (differs from the host's|cannot be tried)"):
        check(net)
    assert not lite3r_modules(net)


def test_positions_that_the_adapter_does_not_know_are_found(register: Register, net: nn.Module) -> None:
    net.across.rope = None
    register(dataclasses.replace(RIGHT, projections=FusedQKV(2, q_norm="q_norm", k_norm="k_norm")))
    with pytest.warns(SlowPathWarning), pytest.raises(AdapterError, match=r"was to run dense but ran .*: it is given pos"):
        check(net)


def test_the_message_says_what_to_look_at(register: Register, net: nn.Module) -> None:
    register(dataclasses.replace(RIGHT, projections=FusedQKV(2, positions="pos")))
    with pytest.raises(AdapterError, match=r"by [\d.e+-]+, where the largest number is .*rotary base"):
        check(net)


def test_wrong_head_dim(register: Register, net: nn.Module) -> None:
    register(dataclasses.replace(RIGHT, head_dim=8))
    with pytest.raises(AdapterError, match="num_heads or head_dim"):
        check(net)


def test_wrong_layout(register: Register, net: nn.Module) -> None:
    register(dataclasses.replace(RIGHT, tokens=TokenSource("patches", (14, 14), 0)))
    with pytest.raises(LayoutError, match="special_tokens"):
        check(net)
    assert not lite3r_modules(net)
    assert not net.patches._forward_pre_hooks


def test_missing_module(register: Register, net: nn.Module) -> None:
    register(dataclasses.replace(RIGHT, fqn="acros"))
    with pytest.raises(AdapterError, match="no such module"):
        check(net)


def test_site_that_never_runs(register: Register, net: nn.Module) -> None:
    register(RIGHT, AttentionSite("spare", "global", 16, FusedQKV(2)))
    with pytest.raises(AdapterError, match="1 of 2 sites never ran, such as 'spare'"):
        check(net)


def test_unknown_model() -> None:
    with pytest.raises(UnknownModelError):
        check(Net().eval())


def test_too_few_tokens(register: Register, net: nn.Module) -> None:
    register(RIGHT)
    with pytest.raises(AdapterError, match="too small to drop anything: 5 tokens at 'across'"):
        check_adapter(net, (torch.rand(1, 1, 3, 28, 28),))


def test_no_effect_on_the_output(register: Register, net: nn.Module) -> None:
    register(RIGHT)
    nn.init.zeros_(net.across.proj.weight)
    with pytest.raises(AdapterError, match=r"changed the output by .* only"):
        check(net)


def test_training_mode(register: Register, net: nn.Module) -> None:
    register(RIGHT)
    net.across.proj.train()
    with pytest.raises(AdapterError, match=r"across.proj is in training mode; call model.eval\(\)"):
        check(net)


def test_half_precision(register: Register, net: nn.Module) -> None:
    register(RIGHT)
    with pytest.raises(AdapterError, match=r"torch.bfloat16; .* model.float\(\)"):
        check(net.bfloat16())


def test_options_that_check_nothing(register: Register, net: nn.Module) -> None:
    register(RIGHT)
    with pytest.raises(AdapterError, match="drops nothing"):
        check(net, keep_ratio=1.0)
    with pytest.raises(AdapterError, match="dense_below"):
        check(net, dense_below=None)


def test_indeterministic_model(register: Register, net: nn.Module) -> None:
    register(RIGHT)
    calls = iter(range(100))
    with pytest.raises(AdapterError, match="two different outputs"):
        check_adapter(net, lambda model: next(calls) * model(torch.ones(IMAGES))["tokens"])


def test_output_without_tensors(register: Register, net: nn.Module) -> None:
    register(RIGHT)
    with pytest.raises(AdapterError, match="no tensor"):
        check_adapter(net, lambda model: "nothing")


def test_model_that_carries_lite3r_is_left_as_it_was(register: Register, net: nn.Module) -> None:
    register(RIGHT)
    apply_lite3r(net)
    with pytest.raises(AlreadyAppliedError):
        check(net)
    assert list(lite3r_modules(net)) == ["across"]


def test_model_that_cannot_be_pickled(register: Register, net: nn.Module) -> None:
    register(RIGHT)
    net.hook = lambda: None
    assert not check(net).pickled


def test_the_model_is_left_as_it_was(register: Register, net: nn.Module) -> None:
    register(RIGHT)
    images = torch.rand(IMAGES)
    before, state = net(images)["tokens"], {k: v.clone() for k, v in net.state_dict().items()}
    attention, random = net.across, torch.get_rng_state()
    check_adapter(net, (images,))
    assert torch.equal(torch.get_rng_state(), random)
    assert net.across is attention
    assert torch.equal(net(images)["tokens"], before)
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    assert not net.patches._forward_pre_hooks
