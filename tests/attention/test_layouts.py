"""Sites whose sequences are laid out in any way, compiled: one graph without a break, and the same errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from layout_toys import PATCH, RIGHT, SOURCE, Tokens, describe_as
from torch import nn

from lite3r_plugin import TokenSource, apply_lite3r
from lite3r_plugin.errors import LayoutError
from lite3r_plugin.testing import TEST_CONFIG

__all__ = ["describe_as"]  # the fixture
Describe = Callable[[Tokens, Tokens], None]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def applied(name: str, describe_as: Describe, tokens: tuple[Tokens, Tokens] | None = None) -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(0)
    make, inputs, right = RIGHT[name]
    describe_as(*(tokens or right))
    return apply_lite3r(make().eval(), TEST_CONFIG), inputs


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("mixed grids", "packed"))) for name in RIGHT])
def test_compiled_it_is_the_same(name: str, describe_as: Describe) -> None:
    model, inputs = applied(name, describe_as)
    with torch.no_grad():
        expected = model(*inputs)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), expected)
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(compiled(*inputs), expected)


@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        ("mixed grids", False),
        pytest.param("mixed grids", True, marks=pytest.mark.slow),
        ("a grid for each layer", False),
        pytest.param("a grid for each layer", True, marks=pytest.mark.slow),
    ],
)
def test_mixed_grids_raise(name: str, compiled: bool, describe_as: Describe) -> None:
    model, inputs = applied(name, describe_as, (SOURCE, SOURCE))
    run = torch.compile(model, backend="eager") if compiled else model
    with torch.no_grad(), pytest.raises(LayoutError, match="given images of 6 x 10, 10 x 6 patches in one forward"):
        run(*inputs)


def test_orders_are_kept_by_layout(describe_as: Describe) -> None:
    model, inputs = applied("a grid for each layer", describe_as)
    orders = model.first.state.orders
    with torch.no_grad():
        for _ in range(3):
            model(*inputs)
    assert len(orders) == 2


def test_sites_see_their_layout(describe_as: Describe) -> None:
    """Also observers and what takes the place of an attention, such as calibration."""
    model, inputs = applied("register-only layer", describe_as)
    seen: list[Any] = []
    observed = model.first.observe(lambda site, given, out: seen.append(given.layout))
    with torch.no_grad(), observed, model.second.substitute(lambda site, given: seen.append(given.layout) or given.v):
        model(*inputs)
    source = TokenSource("embed", (PATCH, PATCH), 4)
    assert seen[0] == source.layout((4, 6), 3 * 28)
    assert seen[1].parts == (12,)
