"""Rewrites are compared with the host's own methods before they are put in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interruptions import contents
from rewriting import rewrite_exactly
from torch import Tensor, nn

from lite3r_plugin import hookimpl
from lite3r_plugin.adapter import AdapterWarning, ExactRewrite, Trial, get_manager
from lite3r_plugin.runtime.rewrites import plan_rewrites
from lite3r_plugin.wrapper import RewrittenMethod, RewrittenModule


class Part(nn.Module):
    """Doubles, and halves by a method."""

    def halve(self, x: Tensor) -> Tensor:
        return x / 2

    def forward(self, x: Tensor) -> Tensor:
        return x + x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Part()

    def forward(self, x: Tensor) -> Tensor:
        return self.part.halve(self.part(x))


class Twice(RewrittenModule):
    def rewritten(self, x: Tensor) -> Tensor:
        return 2 * x


class Half(RewrittenMethod):
    def rewritten(self, x: Tensor) -> Tensor:
        return 0.5 * x


def trial(module: nn.Module) -> Trial:
    return Trial(module, [(torch.ones(2, 3),), (torch.tensor([3.0]),)])


def half(module: nn.Module) -> Half:
    return Half(module, "halve")


TWICE = ExactRewrite("part", "doubled at once", Twice, trial)
HALF = ExactRewrite("part", "halved", half, trial, "halve")

Answer = Callable[[list[ExactRewrite] | None], None]


@pytest.fixture
def answer() -> Iterator[Answer]:
    """Let an adapter answer with these rewrites."""
    given: list[Any] = [None]

    def change(rewrites: Any) -> None:
        given[0] = rewrites

    get_manager().register(SimpleNamespace(lite3r_exact_rewrites=hookimpl(lambda model: given[0])), name="rewrites")
    yield change
    get_manager().unregister(name="rewrites")


def plan(model: nn.Module, **arguments: Any) -> Any:
    return plan_rewrites(model, dict(model.named_modules(remove_duplicate=False)), **arguments)


def test_what_agrees_is_put_in(answer: Answer) -> None:
    answer([TWICE, HALF])
    model = Model()
    done = rewrite_exactly(model)
    assert done is not None
    assert done.done == ("part: doubled at once", "part: halved")
    assert done.left == {}
    assert isinstance(model.part, Twice)
    assert torch.equal(model(torch.arange(3.0)), torch.arange(3.0))
    again = rewrite_exactly(model)
    assert again is not None
    assert (again.done, again.left) == ((), {})  # it is there already


def test_planning_changes_nothing(answer: Answer) -> None:
    answer([TWICE, HALF])
    model = Model()
    before = contents(model), torch.get_rng_state()
    assert len(plan(model).made) == 2
    assert contents(model) == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def odd(forward: Callable[[Any, Tensor], Any]) -> nn.Module:
    model = Model()
    model.part = type("Odd", (Part,), {"forward": forward})()
    return model


def raising(self: Part, x: Tensor) -> Tensor:
    raise RuntimeError("not today\nand more")


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda self, x: x + x + 1e-3, r"differs from the host's own forward by 0.001, where the largest number is 2"),
        (lambda self, x: (x + x) * float("nan"), "differs from the host's own forward by nan"),
        (lambda self, x: (x + x).double(), r"gives float64 \[2, 3\] and not float32 \[2, 3\]"),
        (lambda self, x: (x + x)[:1], r"gives float32 \[1, 3\] and not"),
        (lambda self, x: (x + x, 1), "gives 2 values and not 1"),
        (lambda self, x: None, "gives None and not a tensor, float32"),
        (raising, "not today"),
    ],
)
def test_a_fork_that_differs_keeps_its_own(answer: Answer, forward: Callable[..., Any], reason: str) -> None:
    answer([TWICE, HALF])
    model = odd(forward)
    before = contents(model)
    done = rewrite_exactly(model)
    assert done is not None
    assert done.done == ("part: halved",)
    (why,) = done.left.values()
    assert re.search(reason, why), why
    assert contents(model) == before


class MorePart(Part):
    """A fork whose methods take more, and need less."""

    def halve(self, x: Tensor, times: int = 1) -> Tensor:
        return x / 2**times

    def forward(self, x: Tensor | None = None, *, twice: bool = False) -> Tensor:
        return torch.zeros(1) if x is None else (2 if twice else 1) * super().forward(x)


@pytest.mark.parametrize(
    ("call", "own"),
    [
        (lambda part, x: part(x), False),
        (lambda part, x: part(x=x), False),
        (lambda part, x: part(x, twice=True), True),
        (lambda part, x: part(), True),
        (lambda part, x: part.halve(x), False),
        (lambda part, x: part.halve(x, 2), True),
        (lambda part, x: part.halve(x, times=2), True),
    ],
)
def test_arguments_that_a_rewrite_does_not_take_go_to_the_hosts_own(
    answer: Answer, monkeypatch: pytest.MonkeyPatch, call: Callable[[Any, Tensor], Tensor], own: bool
) -> None:
    model, x, ran = Model(), torch.ones(2, 3), []
    model.part = MorePart()
    expected = call(model.part, x)
    answer([TWICE, HALF])
    rewrite_exactly(model)
    for kind in (Twice, Half):
        host: Any = kind.run_host
        monkeypatch.setattr(kind, "run_host", lambda self, *a, host=host, **k: ran.append(self) or host(self, *a, **k))
    assert torch.equal(call(model.part, x), expected)
    assert bool(ran) == own


def test_what_somebody_has_exchanged_is_left(answer: Answer) -> None:
    answer([TWICE])
    model = Model()
    model.part.forward = lambda x: x
    done = rewrite_exactly(model)
    assert done is not None
    assert "its forward was exchanged by somebody else" in done.left["part: doubled at once"]
    assert torch.equal(model.part(torch.ones(1)), torch.ones(1))


def test_what_cannot_be_there_is_said(answer: Answer) -> None:
    answer([ExactRewrite("nowhere", "a", Twice, None), ExactRewrite("", "b", Twice, None), ExactRewrite("part", "c", Twice, None, "halve")])
    left = plan(Model()).left
    assert "no such module" in left["nowhere: a"]
    assert "cannot take the place of forward" in left["the model: b"]
    assert "cannot take the place of halve" in left["part: c"]


def test_what_needs_another_rewrite_is_left_with_it(answer: Answer) -> None:
    needs = ExactRewrite("part", "halved", half, trial, "halve", needs=("part",))
    answer([TWICE, needs])
    assert len(plan(Model()).made) == 2
    assert plan(odd(raising)).left["part: halved"] == "the forward of part is the host's own"


def test_other_dtypes_are_for_those_who_ask(answer: Answer) -> None:
    answer([HALF, ExactRewrite("part", "halved in another dtype", half, trial, "halve", keeps_dtype=False)])
    assert plan(Model()).done == ("part: halved",)
    assert plan(Model(), wanted=lambda rewrite: True).done == ("part: halved in another dtype",)


@pytest.mark.parametrize("wrong", ["words", 5, [5], ["words"]])
def test_rewrites_are_descriptions(answer: Answer, wrong: Any) -> None:
    answer(wrong)
    with pytest.warns(AdapterWarning, match="'rewrites'.*not .* ?of ExactRewrite|not a list of ExactRewrite"):
        assert plan(Model()) is None


def test_a_model_of_no_adapter_has_none() -> None:
    model = Model()
    assert plan(model) is None
    assert rewrite_exactly(model) is None
