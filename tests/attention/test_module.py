"""Those who watch the attention of a site, or take its place."""

from __future__ import annotations

import contextlib
import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import SPECIAL, Toy, images, toy_adapter

from lite3r_plugin import apply_lite3r, lite3r_disabled
from lite3r_plugin.attention.inputs import AttentionInputs
from lite3r_plugin.attention.module import SparseLinearAttention
from lite3r_plugin.config import Pin
from lite3r_plugin.testing import TEST_CONFIG

__all__ = ["toy_adapter"]  # the fixture
pytestmark = pytest.mark.usefixtures("adapter")


@pytest.fixture
def model() -> Toy:
    return apply_lite3r(Toy().eval().requires_grad_(False), TEST_CONFIG)


class Seen:
    """What an observer was told."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []

    def __call__(self, site: SparseLinearAttention, inputs: AttentionInputs, out: Tensor) -> None:
        assert inputs.v.shape == out.shape
        self.outputs.append(out)


def test_observers_change_nothing_and_several_see_the_same(model: Toy) -> None:
    expected = model(images())
    one, other, site = Seen(), Seen(), model.cross[0]
    with site.observe(one):
        with site.observe(other):
            assert torch.equal(model(images()), expected)
        model(images())
    model(images())
    assert (len(one.outputs), len(other.outputs)) == (2, 1)
    assert one.outputs[0] is other.outputs[0]
    assert site.calls.sparse == 4


@pytest.mark.parametrize(
    ("pin", "queries", "keys"),
    [("none", False, False), ("special", False, False), ("reference_keys", False, True), ("reference", True, True)],
)
def test_what_is_pinned_of_the_reference_view(pin: Pin, queries: bool, keys: bool) -> None:
    """Whether its patches attend to all, and whether all attend to them."""
    model = apply_lite3r(Toy().eval().requires_grad_(False), TEST_CONFIG, pin=pin, keep_ratio=0.01, linear_branch="none", block_means=False)
    site: Any = model.cross[0]
    seen: list[AttentionInputs] = []
    with site.observe(lambda _, inputs, out: seen.append(inputs)):
        model(images(6))
    inputs = seen[0]
    assert inputs.layout is not None
    patches = slice(SPECIAL, inputs.layout.num_tokens // 6)
    out, dense = site.sparse_linear(inputs, None), site.dense(inputs)
    assert torch.allclose(out[:, :, patches], dense[:, :, patches], atol=1e-5) == queries
    inputs.v[:, :, patches.stop - 1] += 1e6  # in no block with a special token
    assert bool((site.sparse_linear(inputs, None) != out).any(-1).all()) == keys


def test_what_takes_the_place_of_attention_is_what_observers_see(model: Toy) -> None:
    seen, site = Seen(), model.cross[1]
    with site.observe(seen), site.substitute(lambda site, inputs: inputs.v), site.substitute(lambda site, inputs: 2 * inputs.v):
        model(images())
    with site.substitute(lambda site, inputs: 2 * inputs.v):
        out = model(images())
    assert seen.outputs[0].abs().sum() > 0
    assert site.calls.sparse == 0
    assert not torch.equal(model(images()), out)


@pytest.mark.parametrize("kind", ["observe", "substitute"])
def test_they_go_after_errors_and_in_any_order(model: Toy, kind: str) -> None:
    expected, site = model(images()), model.cross[0]

    def fails(*given: Any) -> Tensor:
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"), getattr(site, kind)(fails):
        model(images())
    assert torch.equal(model(images()), expected)
    first, second = getattr(site, kind)(fails), getattr(site, kind)(fails)
    with contextlib.ExitStack() as stack:
        stack.enter_context(first)
        with contextlib.ExitStack() as inner:
            inner.enter_context(second)
            stack.close()  # the one that was opened first goes first
    assert torch.equal(model(images()), expected)


def test_nothing_is_seen_where_the_host_runs(model: Toy) -> None:
    seen = Seen()
    with model.cross[0].observe(seen), lite3r_disabled(model):
        model(images())
    assert seen.outputs == []


def test_children_may_be_replaced_and_models_copied(model: Toy) -> None:
    """Also after a call: nothing is remembered of them."""
    model(images())
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for copied in copies:
        assert torch.equal(copied(images()), model(images()))
    before = model(images())
    model.cross[0].qkv = torch.nn.Linear(32, 96)
    assert not torch.equal(model(images()), before)
    for copied in copies:
        assert torch.equal(copied(images()), before)
