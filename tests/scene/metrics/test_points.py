"""Point errors against scikit-learn and all distances, closed forms, invariances, and the mistakes of published code."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lite3r_plugin.errors import InputError
from lite3r_plugin.scene.geometry import unproject
from lite3r_plugin.scene.metrics import Geometry, cloud_metrics, fit_similarity, point_metrics

MakeGeometry = Callable[..., Geometry]
LENGTHS = ("accuracy", "completeness", "chamfer", "threshold")
SHARES = ("f_score", "precision", "recall")


def noisy(points: Tensor, sigma: float = 0.05) -> Tensor:
    return points + sigma * torch.randn(points.shape, generator=torch.Generator().manual_seed(1), dtype=points.dtype)


@pytest.mark.parametrize("seed", range(3))
def test_nearest_distances_equal_independent_ones(seed: int) -> None:
    neighbours = pytest.importorskip("sklearn.neighbors").NearestNeighbors(n_neighbors=1, algorithm="brute")
    generator = torch.Generator().manual_seed(seed)
    mine, true = torch.randn(300, 3, generator=generator), torch.randn(200, 3, generator=generator)
    found = cloud_metrics(mine, true, 0.3)
    there, back = (neighbours.fit(b.numpy()).kneighbors(a.numpy())[0][:, 0] for a, b in ((mine, true), (true, mine)))
    every = torch.cdist(mine.double(), true.double())
    for nearest, name in ((every.amin(1), "accuracy"), (every.amin(0), "completeness")):
        assert getattr(found, name) == pytest.approx(nearest.mean().item(), rel=1e-12)
    assert (found.accuracy, found.completeness) == pytest.approx((there.mean(), back.mean()), rel=1e-5)
    precision, recall = (there < 0.3).mean(), (back < 0.3).mean()
    assert (found.precision, found.recall) == pytest.approx((precision, recall))
    assert found.f_score == pytest.approx(2 / (1 / precision + 1 / recall))
    assert found.chamfer == pytest.approx((found.accuracy + found.completeness) / 2)


def test_closed_form() -> None:
    """The prediction is the left half of a line of points, lifted by 0.5."""
    true = torch.arange(10.0)[:, None] * torch.tensor([1.0, 0, 0])
    mine = true[:5] + torch.tensor([0, 0.5, 0])
    found = cloud_metrics(mine, true, 0.6)
    missing = [math.hypot(k, 0.5) for k in range(1, 6)]
    assert found.accuracy == pytest.approx(0.5)
    assert found.completeness == pytest.approx((5 * 0.5 + sum(missing)) / 10)
    assert (found.precision, found.recall, found.f_score) == pytest.approx((1, 0.5, 2 / 3))
    assert cloud_metrics(mine, true, 0.4).f_score == 0


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-2, 1e2), order=st.permutations(range(3)))
def test_invariances(scene: MakeGeometry, rotations: Callable[..., Tensor], seed: int, scale: float, order: list[int]) -> None:
    true = scene(seed).points()
    mine = noisy(true)
    turn, shift = rotations(1, seed)[0], torch.tensor([1.0, -2, 3], dtype=torch.float64)
    one = point_metrics(mine, true)
    for other in (point_metrics(scale * mine @ turn.T + shift, true), point_metrics(mine[order], true[order])):
        for name in (*LENGTHS, *SHARES):
            assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-6)
    unit = point_metrics(mine, scale * true @ turn.T + shift)
    assert [getattr(unit, name) for name in LENGTHS] == pytest.approx([scale * getattr(one, name) for name in LENGTHS], rel=1e-6)
    assert [getattr(unit, name) for name in SHARES] == pytest.approx([getattr(one, name) for name in SHARES], rel=1e-6)


def test_scale_is_aligned(scene: MakeGeometry) -> None:
    """Without a scale, models of other units differ by their units alone: F-scores near 0 for the right shape."""
    true = scene().points()
    right = point_metrics(0.5 * true, true)
    assert (right.chamfer, right.f_score, right.scale) == pytest.approx((0, 1, 2))
    for align in ("se3", "none"):
        wrong = point_metrics(0.5 * true, true, align=align)
        assert wrong.f_score < 0.5
        assert wrong.scale == 1


def test_inverted_extrinsics_are_wrong(scene: MakeGeometry) -> None:
    """Points that are carried to view 0 by ``inv(E0) @ Ei`` instead of ``E0 @ inv(Ei)`` are no similar copy of the scene."""
    truth = scene(2)
    last = torch.tensor([0.0, 0, 0, 1]).expand(3, 1, 4)
    cameras = torch.cat((truth.world_to_camera, last), 1)
    to_first = {"right": cameras[:1] @ torch.linalg.inv(cameras), "wrong": torch.linalg.inv(cameras[:1]) @ cameras}
    found = {}
    for name, transform in to_first.items():
        points = unproject(truth.depth, torch.linalg.inv(transform)[:, :3], truth.intrinsics)
        found[name] = point_metrics(points, truth.points())
    assert found["right"].chamfer < 1e-5
    assert found["right"].f_score == 1
    assert found["wrong"].chamfer > 0.1
    assert found["wrong"].f_score < 0.6


def test_one_sample_of_pixels_for_both_sides(scene: MakeGeometry) -> None:
    """Two independent samples of one cloud are a distance apart, which published code reports as error."""
    true = scene().points()
    found = point_metrics(true, true, max_points=100)
    assert (found.chamfer, found.f_score) == (pytest.approx(0, abs=1e-9), 1)
    cloud = true.reshape(-1, 3)
    first, second = (cloud[torch.randperm(len(cloud))[:100]] for _ in range(2))
    assert cloud_metrics(first, second, found.threshold).chamfer > 0.05
    mine = noisy(true)
    assert point_metrics(mine, true, max_points=100) == point_metrics(mine, true, max_points=100)
    assert point_metrics(mine, true, max_points=100) != point_metrics(mine, true, max_points=100, seed=1)
    assert point_metrics(mine, true, max_points=100).scale == point_metrics(mine, true).scale  # the alignment sees every pixel


def test_points_are_left_out(scene: MakeGeometry) -> None:
    true = scene().points()
    mine = noisy(true)
    whole = point_metrics(mine[:2], true[:2])
    mask = torch.ones(true.shape[:3], dtype=torch.bool)
    mask[2] = False
    assert point_metrics(mine, true, mask) == whole
    damaged = true.clone()
    damaged[2, ..., 1] = math.nan
    assert point_metrics(mine, damaged) == whole
    holes = mine.clone()
    holes[2] = math.nan
    found = point_metrics(holes, true)
    assert found.completeness > 2 * whole.completeness  # what the prediction lacks is missing
    assert found.precision > found.recall


def test_the_threshold_is_a_share_of_the_size(scene: MakeGeometry) -> None:
    true = scene().points()
    points = true.reshape(-1, 3)
    size = (points - points.mean(0)).norm(dim=1).median().item()
    assert point_metrics(noisy(true), true).threshold == pytest.approx(0.02 * size)
    assert point_metrics(noisy(true), true, threshold=1e3).f_score == 1


def test_a_list_of_points_will_do(scene: MakeGeometry) -> None:
    true = scene().points()
    flat = [x.reshape(-1, 3) for x in (noisy(true), true)]
    assert point_metrics(*flat) == point_metrics(noisy(true), true)
    aligned = fit_similarity(*flat)(flat[0])
    again = point_metrics(aligned, flat[1], align="none")
    assert again.chamfer == pytest.approx(point_metrics(*flat).chamfer)


NAN = torch.full((2, 3, 4, 3), math.nan)


@pytest.mark.parametrize(
    ("predicted", "reference", "mask", "message"),
    [
        (torch.ones(2, 3, 4, 3), torch.ones(2, 4, 3, 3), None, "points must both be"),
        (torch.ones(8, 2), torch.ones(8, 2), None, "three coordinates"),
        (torch.ones(8, 3), torch.ones(8, 3), torch.ones(8, 3, dtype=torch.bool), "mask must be bool"),
        (torch.ones(2, 3, 4, 3), NAN, None, "here at 0 pixels"),
        (NAN, torch.ones(2, 3, 4, 3), None, "here at 0 pixels"),
        (torch.randn(8, 3), torch.randn(8, 3), torch.arange(8) < 2, "here at 2 pixels"),
        (torch.randn(8, 3), torch.ones(8, 3), None, "all at one place"),
    ],
)
def test_bad_input(predicted: Tensor, reference: Tensor, mask: Tensor | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        point_metrics(predicted, reference, mask)


def test_bad_options() -> None:
    cloud = torch.randn(8, 3)
    with pytest.raises(InputError, match="align is"):
        point_metrics(cloud, cloud, align="icp")
    with pytest.raises(InputError, match="positive length"):
        point_metrics(cloud, cloud, threshold=0)
    with pytest.raises(InputError, match="predicted cloud"):
        cloud_metrics(torch.zeros(0, 3), cloud, 1)
    with pytest.raises(InputError, match="reference cloud"):
        cloud_metrics(cloud, cloud * math.nan, 1)
