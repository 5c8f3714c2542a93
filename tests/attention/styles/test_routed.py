"""`Routed` sites: self-attention is told from cross-attention of the same length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint
from toys import Adapter, Attention, Toy, images, toy_adapter

from lite3r_plugin import AttentionSite, Routed, apply_lite3r, remove_lite3r
from lite3r_plugin.ops.dispatch import SlowPathWarning
from lite3r_plugin.testing import TEST_CONFIG

SPARSE = TEST_CONFIG.replace(keep_ratio=0.3)

__all__ = ["toy_adapter"]  # the fixture
pytestmark = pytest.mark.usefixtures("adapter", "inference")


@pytest.fixture
def inference() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def one_site(projections: Routed) -> Any:
    return lambda model: [AttentionSite("cross.0", "global", 16, projections)]


class TwoInputs(nn.Module):
    """Attention to `context`, or to x where `crosses` is False; both are turned by `rope`."""

    def __init__(self, dim: int, num_heads: int, crosses: bool) -> None:
        super().__init__()
        self.num_heads, self.crosses = num_heads, crosses
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        source = x if context is None or not self.crosses else context
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(source).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if rope is not None:
            q, k = (torch.cat((y[..., :2], y[..., 2:] * rope[0]), -1) + rope[1] for y in (q, k))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def two_inputs() -> dict[str, Any]:
    return dict(context=torch.randn(1, 246, 32), rope=(torch.rand(246, 14), torch.rand(246, 16)))


def test_cross_attention_of_equal_lengths_is_dense(adapter: Adapter) -> None:
    model, inputs = Toy(make=lambda dim, heads: TwoInputs(dim, heads, True)), two_inputs()
    expected = model(images(), **inputs)
    apply_lite3r(model, SPARSE)
    hint = r"let the adapter say Routed\(same_tokens=True\)"
    with pytest.warns(SlowPathWarning, match=rf"it is cross-attention, whose queries and values come from.*{hint}"):
        assert torch.equal(model(images(), **inputs), expected)
    assert torch.equal(torch.compile(model, backend="eager")(images(), **inputs), expected)
    remove_lite3r(model)
    adapter.answer = one_site(Routed(2, same_tokens=True))
    assert apply_lite3r(model, SPARSE)(images(), **two_inputs()).isfinite().all()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_self_attention_may_be_given_more_than_its_tokens(compiled: bool) -> None:
    model = apply_lite3r(Toy(make=lambda dim, heads: TwoInputs(dim, heads, False)), SPARSE)
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    assert run(images(), **two_inputs()).isfinite().all()


def test_the_same_tokens_under_two_names_are_self_attention(adapter: Adapter) -> None:
    adapter.answer = one_site(Routed(2))
    site = apply_lite3r(Toy(make=lambda dim, heads: TwoInputs(dim, heads, True)), SPARSE).cross[0]
    x = torch.randn(1, 246, 32)
    assert site(x, x, (torch.rand(246, 14), torch.rand(246, 16))).isfinite().all()


class LearnedValues(Attention):
    """Values that no input has a part in."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, _ = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, torch.ones(q.shape))
        return out.transpose(1, 2).flatten(2)


def test_values_from_nowhere_raise(adapter: Adapter) -> None:
    adapter.answer = one_site(Routed(2))
    site = apply_lite3r(Toy(make=lambda dim, heads: LearnedValues(dim, heads, "routed")), SPARSE).cross[0]
    with pytest.warns(SlowPathWarning, match="its values come from no argument of its forward"):
        site(torch.randn(1, 246, 32), torch.randn(246, 32))


def test_what_a_compiler_hides_is_asked_for_once_without_it() -> None:
    """`q, k, v = tensor` unpacks without a trace under `torch.compile`, but not in a call before."""

    class Unpacks(TwoInputs):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            q, k, v = torch.cat((self.q(x), self.kv(x)), -1).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    context = dict(context=torch.randn(1, 246, 32))
    model = apply_lite3r(Toy(make=lambda dim, heads: Unpacks(dim, heads, False)), SPARSE)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="run the model without it once before"):
        torch.compile(model, backend="eager", fullgraph=True)(images(), **context)
    expected = model(images(), **context)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(images(), **context), expected)


class CheckpointedInside(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=self.variant == "reentrant")


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointing_inside_a_module_is_not_sparse_once_and_dense_again(adapter: Adapter) -> None:
    """What is run again in the backward pass is dense attention."""
    adapter.answer = one_site(Routed(2))
    model = apply_lite3r(Toy(make=lambda dim, heads: CheckpointedInside(dim, heads, "other")), SPARSE)
    with torch.no_grad():
        assert model(images()).isfinite().all()
    with torch.enable_grad(), pytest.raises(CheckpointError, match="number of tensors"):
        model(images()).sum().backward()
    remove_lite3r(model)
    model = apply_lite3r(Toy(make=lambda dim, heads: CheckpointedInside(dim, heads, "reentrant")), SPARSE)
    with torch.enable_grad(), pytest.warns(SlowPathWarning, match="checkpoint the module as a whole"):
        model(images()).sum().backward()


class Normed(Attention):
    """Queries, keys and values in FP32, whatever autocast makes of Linears."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).float().unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("keep_ratio", [0.3, 1.0])
def test_autocast_is_honoured_as_the_host_has_it(adapter: Adapter, keep_ratio: float) -> None:
    adapter.answer = one_site(Routed(2))
    site = apply_lite3r(Toy(make=lambda dim, heads: Normed(dim, heads)), SPARSE, keep_ratio=keep_ratio).cross[0]
    seen: list[torch.dtype] = []
    x = torch.randn(1, 246, 32)
    with site.observe(lambda _, inputs, out: seen.extend((inputs.q.dtype, out.dtype))):
        with torch.autocast("cpu", torch.bfloat16):
            site(x)
        site(x)
    assert seen == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model, x = nn.Sequential(Attention(32, 2)), torch.rand(1, 24, 32)
    apply_lite3r(model, keep_ratio=0.5, sites=[AttentionSite("0", "global", 16, Routed())])
    assert model(x).shape == x.shape
