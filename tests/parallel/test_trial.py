"""What lets views meet is found by running a model on a few small images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lite3r_plugin.errors import ParallelError
from lite3r_plugin.parallel.trial import Verdict, one_by_one, try_views

IMAGES = torch.zeros(2, 3, 3, 32, 40)


def tried(model: Callable[[Tensor], Any], images: Tensor = IMAGES) -> Verdict:
    return try_views(lambda args, kwargs: model(*args, **kwargs), (images,), {}, images, [(4, 4)], rough=False)


def per_view(x: Tensor) -> Tensor:
    return x.square().mean((-1, -2))


def with_reference(x: Tensor) -> Tensor:
    first = torch.arange(x.shape[1]) == 0
    return per_view(x) + first[:, None]


def test_views_that_do_not_meet_pass() -> None:
    assert tried(per_view) == Verdict(False, frozenset())


def test_a_first_view_that_is_special_is_the_reference() -> None:
    assert tried(with_reference).reference


def test_images_without_a_batch_pass() -> None:
    assert not tried(lambda x: x.mean((-1, -2)), IMAGES[0]).reference


def test_what_is_not_along_views_is_common() -> None:
    assert tried(lambda x: {"depth": per_view(x), "scale": torch.ones(3)}) == Verdict(False, frozenset({1}))


def chosen_by_content(x: Tensor) -> Tensor:
    best = per_view(x).sum(-1).argmax(1)
    return per_view(x) + (torch.arange(x.shape[1]) == best[:, None])[..., None]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda x: per_view(x) / per_view(x).mean(), "views meet"),
        (lambda x: per_view(x) + per_view(x)[:, -1:], "views meet"),
        (lambda x: per_view(x) + per_view(x)[:, :1], "views meet"),
        (lambda x: per_view(x) * torch.arange(1.0, x.shape[1] + 1)[:, None], "place or on the number"),
        (lambda x: per_view(x) / x.shape[1], "place or on the number"),
        (chosen_by_content, "views meet|chosen by what is in it"),
        (lambda x: x.mean(), "not along views and yet depends"),
        (lambda x: [per_view(x)] * x.shape[1], "more tensors of some images"),
        (lambda x: x.view(7, -1), "does not run"),
    ],
)
def test_views_that_meet_do_not(model: Callable[[Tensor], Any], said: str) -> None:
    with pytest.raises(ParallelError, match=said):
        tried(model)


def test_a_module_is_run_on_each_view_alone() -> None:
    def mixing(x: Tensor) -> dict[str, Tensor]:
        return {"mean": x - x.mean(1, keepdim=True)}

    x = torch.arange(6.0).view(1, 3, 2)
    assert one_by_one(mixing, (x,), {}, 3, bare=False)["mean"].tolist() == [[[0, 0]] * 3]
