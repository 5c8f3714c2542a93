"""`check_adapter` passes a right layout of every kind, and finds a wrong one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from layout_toys import (
    PATCH,
    RIGHT,
    SOURCE,
    WINDOW,
    Tokens,
    describe_as,
    first_of_pair,
    mixed,
    one_window,
    only_special,
    second_of_pair,
    views_of,
    windows_in_a_row,
)
from torch import Tensor

from lite3r_plugin import LayoutFunction, TokenLayout, TokenSource, Views
from lite3r_plugin.errors import AdapterError, Lite3RError
from lite3r_plugin.testing import AdapterReport, check_adapter

__all__ = ["describe_as"]  # the fixture
Describe = Callable[[Tokens, Tokens], None]
SIZE = PATCH, PATCH


def check(name: str, describe_as: Describe, tokens: tuple[Tokens, Tokens] | None = None) -> AdapterReport:
    torch.manual_seed(0)
    make, inputs, right = RIGHT[name]
    describe_as(*(tokens or right))
    return check_adapter(make().eval(), inputs)


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_layout_passes_and_was_compared(name: str, describe_as: Describe) -> None:
    assert not check(name, describe_as).unchecked


def turned(function: Callable[..., TokenLayout]) -> Callable[..., TokenLayout]:
    """The same with rows and columns exchanged."""

    def other(*args: Any) -> TokenLayout:
        layout = function(*args)
        parts = tuple(p if isinstance(p, int) else Views((p.grid[1], p.grid[0]), p.count) for p in layout.parts)
        return TokenLayout(parts, layout.reference)

    return other


def backwards(views: list[Tensor]) -> TokenLayout:
    return mixed([views[i] for i in (1, 0, 2)])


def in_front(images: Tensor) -> TokenLayout:
    return TokenLayout((1, *views_of(images).parts))


@pytest.mark.parametrize(
    ("name", "first", "second", "message"),
    [
        ("trailing", TokenSource("embed", SIZE, 2), None, "the layout at site 'first' is wrong: a change of image 0"),
        ("trailing", TokenSource("embed", SIZE, 1, trailing_tokens=1), None, "the layout at site 'first' is wrong"),
        ("trailing", SOURCE, SOURCE, "got 78 tokens, but a view has 24"),
        ("once per sequence", SOURCE, SOURCE, "got 73 tokens, but a view has 24 .*sequence_tokens"),
        ("once per sequence", LayoutFunction(in_front, ""), None, "the layout at site 'first' is wrong"),
        ("register-only layer", TokenSource("embed", SIZE, 4), TokenSource("embed", SIZE, 4), "site 'second' got 12 tokens"),
        ("register-only layer", LayoutFunction(only_special), None, "all of which are kept|is wrong"),
        ("mixed grids", SOURCE, SOURCE, "given images of 6 x 10, 10 x 6 patches in one forward"),
        ("mixed grids", TokenSource("embed", SIZE, sizes_change=True), None, "the layout at site 'first' is wrong"),
        ("mixed grids", LayoutFunction(backwards, ""), None, "the layout at site 'first' is wrong"),
        ("mixed grids", LayoutFunction(turned(mixed), ""), None, "the layout at site 'first' is wrong"),
        ("a grid for each layer", SOURCE, SOURCE, "given images of 6 x 10, 10 x 6 patches in one forward"),
        ("a grid for each layer", TokenSource("embed", SIZE, sizes_change=True), None, "the layout at site 'first' is wrong"),
        ("a grid for each layer", LayoutFunction(second_of_pair, ""), LayoutFunction(first_of_pair, ""), "'first' is wrong"),
        ("windows", SOURCE, SOURCE, "got 24 tokens, but a view has 96 .*windows"),
        ("windows", LayoutFunction(turned(one_window)), None, "the layout at site 'first' is wrong"),
        ("packed", SOURCE, SOURCE, "the layout at site 'first' is wrong"),
        ("packed", LayoutFunction(turned(windows_in_a_row)), None, "the layout at site 'first' is wrong"),
        ("merged", SOURCE, SOURCE, "got 48 tokens, but a view has 36 .*merged"),
        ("images by a method", SOURCE, SOURCE, "ran before 'embed' saw any image.*methods called on it"),
        ("images by a method", LayoutFunction(turned(views_of), ""), None, "the layout at site 'first' is wrong"),
    ],
)
def test_a_wrong_layout_is_found(name: str, first: Tokens, second: Tokens, message: str, describe_as: Describe) -> None:
    with pytest.raises(Lite3RError, match=message):
        check(name, describe_as, (first, second))


def test_what_could_not_be_compared_is_said(describe_as: Describe) -> None:
    """Patches that are mixed before the first site."""
    make, inputs, tokens = RIGHT["images by a method"]
    torch.manual_seed(0)
    model = make().eval()
    embed = model.embed.forward_features
    model.embed.forward_features = lambda images: embed(images).mean(1, keepdim=True).expand_as(embed(images))
    describe_as(*tokens)
    report = check_adapter(model, inputs)
    assert report.unchecked == (
        "the layout at 'first' was not compared: no patch of the images changes one of its tokens far more than the others",
    )
    assert str(report).endswith("; " + report.unchecked[0])


def test_the_window_is_no_square() -> None:
    """Otherwise rows and columns could be exchanged unseen."""
    assert WINDOW[0] != WINDOW[1]
    with pytest.raises(AdapterError):
        TokenLayout((Views(WINDOW),), reference=1)
