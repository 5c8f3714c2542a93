"""Depth errors against scikit-learn, closed forms and invariances."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lite3r_plugin.errors import InputError
from lite3r_plugin.scene.metrics import depth_metrics


def pair(seed: int, views: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reference = 1 + 4 * torch.rand(views, 6, 7, generator=generator)
    return reference * torch.exp(0.3 * torch.randn(reference.shape, generator=generator)), reference


@pytest.mark.parametrize("seed", range(5))
def test_equals_independent_implementations(seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    predicted, reference = pair(seed)
    reference[0, 0] = 0
    reference[1, 1] = torch.nan
    found = depth_metrics(predicted, reference)
    known = reference > 0
    mine, true = predicted[known].tolist(), reference[known].tolist()
    scale = statistics.median_low(t / m for m, t in zip(mine, true, strict=True))
    mine = [scale * m for m in mine]
    assert found.scales == pytest.approx((scale,))
    assert found.abs_rel == pytest.approx(metrics.mean_absolute_percentage_error(true, mine))
    assert found.rmse == pytest.approx(metrics.root_mean_squared_error(true, mine))
    for k, delta in enumerate((found.delta1, found.delta2, found.delta3), 1):
        assert delta == pytest.approx(statistics.mean(max(m / t, t / m) < 1.25**k for m, t in zip(mine, true, strict=True)))


def test_closed_form() -> None:
    """Three quarters of the pixels are right; the others are 1.5 times too deep."""
    reference = torch.full((1, 4, 4), 2.0)
    predicted = reference.clone()
    predicted[0, 0] *= 1.5
    found = depth_metrics(predicted, reference)
    assert (found.abs_rel, found.rmse) == pytest.approx((0.125, math.sqrt(0.25)))
    assert (found.delta1, found.delta2, found.delta3) == (0.75, 1.0, 1.0)
    assert (found.coverage, found.scales) == (1.0, (1.0,))
    assert (found.abs_rel_p95, found.abs_rel_max) == pytest.approx((0.5, 0.5))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3), order=st.permutations(range(3)), align=st.sampled_from(["scene", "view"]))
def test_invariances(seed: int, scale: float, order: list[int], align: str) -> None:
    predicted, reference = (x.double() for x in pair(seed))
    one = depth_metrics(predicted, reference, align=align)
    other = depth_metrics(scale * predicted[order], reference[order], align=align)
    for name in ("abs_rel", "rmse", "delta1", "delta2", "delta3", "coverage"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-9)
    unit = depth_metrics(predicted, scale * reference, align=align)
    assert unit.abs_rel == pytest.approx(one.abs_rel)
    assert unit.rmse == pytest.approx(scale * one.rmse)


def test_scale_is_aligned_once_per_scene() -> None:
    """Without alignment a model in other units looks broken; with one scale per view a model that confuses views looks perfect."""
    _, reference = pair(0)
    other_unit, confused = 0.1 * reference, reference * torch.tensor([1.0, 1.0, 2.0])[:, None, None]
    assert depth_metrics(other_unit, reference).abs_rel == pytest.approx(0, abs=1e-6)
    assert depth_metrics(other_unit, reference, align="none").abs_rel == pytest.approx(0.9)
    assert depth_metrics(confused, reference).abs_rel == pytest.approx(1 / 3)
    per_view = depth_metrics(confused, reference, align="view")
    assert per_view.abs_rel == pytest.approx(0, abs=1e-6)
    assert per_view.scales == pytest.approx((1, 1, 0.5))


def test_pixels_are_left_out() -> None:
    predicted, reference = pair(1)
    whole = depth_metrics(predicted[:2], reference[:2])
    for unknown in (0.0, -1.0, math.nan, math.inf):
        damaged = reference.clone()
        damaged[2] = unknown
        assert depth_metrics(predicted, damaged) == whole
    mask = torch.ones_like(reference, dtype=torch.bool)
    mask[2] = False
    assert depth_metrics(predicted, reference, mask) == whole
    holes = predicted.clone()
    holes[2] = math.nan
    found = depth_metrics(holes, reference)
    assert (found.abs_rel, found.coverage) == (whole.abs_rel, pytest.approx(2 / 3))
    per_view = depth_metrics(holes, reference, align="view")
    assert math.isnan(per_view.scales[2])
    assert per_view.to_dict()["scales"][2] is None
    assert math.isfinite(per_view.abs_rel)


@pytest.mark.parametrize(
    ("predicted", "reference", "mask", "message"),
    [
        (torch.ones(2, 3, 4), torch.ones(2, 4, 3), None, r"both be \[views, height, width\]"),
        (torch.ones(3, 4), torch.ones(3, 4), None, r"both be \[views, height, width\]"),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.ones(2, 3, 4), "mask must be bool"),
        (torch.ones(2, 3, 4), torch.zeros(2, 3, 4), None, "reference depth has no valid pixel"),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.bool), "reference depth has no valid pixel"),
        (torch.full((2, 3, 4), math.nan), torch.ones(2, 3, 4), None, "predicted depth is not finite"),
    ],
)
def test_bad_input(predicted: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        depth_metrics(predicted, reference, mask)


def test_bad_alignment() -> None:
    with pytest.raises(InputError, match="align is"):
        depth_metrics(torch.ones(1, 2, 2), torch.ones(1, 2, 2), align="pixel")
