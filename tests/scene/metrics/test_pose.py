"""Pose errors against evo, SciPy and scikit-learn, closed forms, invariances, and the mistakes of published code."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lite3r_plugin.errors import InputError
from lite3r_plugin.scene.metrics import auc, pair_errors, pose_metrics, published_auc

Make = Callable[..., Tensor]
PROPERTY = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


def inverted(world_to_camera: Tensor) -> Tensor:
    rotation = world_to_camera[:, :, :3].mT
    return torch.cat((rotation, -rotation @ world_to_camera[:, :, 3:]), 2)


def square(world_to_camera: Tensor) -> Tensor:
    last = torch.tensor([0.0, 0, 0, 1], dtype=world_to_camera.dtype).expand(len(world_to_camera), 1, 4)
    return torch.cat((world_to_camera, last), 1)


def about_z(degrees: float) -> Tensor:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float64)


def from_centre(rotation: Tensor, *centre: float) -> Tensor:
    return torch.cat((rotation, -rotation @ torch.tensor(centre, dtype=torch.float64)[:, None]), 1)


@pytest.mark.parametrize("seed", range(4))
def test_equals_scipy(cameras: Make, seed: int) -> None:
    rotation_of = pytest.importorskip("scipy.spatial.transform").Rotation.from_matrix
    mine, true = square(cameras(5, seed)).numpy(), square(cameras(5, seed + 100)).numpy()
    found = pair_errors(torch.tensor(mine), torch.tensor(true))
    for k, (i, j) in enumerate(itertools.combinations(range(5), 2)):
        assert found.views[k].tolist() == [i, j]
        angles = []
        for a, b in ((i, j), (j, i)):
            relative, expected = mine[b] @ np.linalg.inv(mine[a]), true[b] @ np.linalg.inv(true[a])
            turn = np.degrees((rotation_of(relative[:3, :3]) * rotation_of(expected[:3, :3]).inv()).magnitude())
            assert found.rotation[k].item() == pytest.approx(turn)
            x, y = relative[:3, 3], expected[:3, 3]
            angles.append(np.degrees(np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y))))
        assert found.translation[k].item() == pytest.approx(np.mean(angles))


@pytest.mark.parametrize("seed", range(4))
def test_trajectory_and_rotation_equal_evo(cameras: Make, moved: Callable[..., Tensor], rotations: Make, seed: int) -> None:
    metrics = pytest.importorskip("evo.core.metrics")
    path = pytest.importorskip("evo.core.trajectory").PosePath3D
    noise = 0.1 * torch.randn(8, 3, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 100))
    true = cameras(8, seed)
    mine = torch.cat((rotations(8, seed + 200, 5.0) @ true[:, :, :3], true[:, :, 3:] + noise), 2)
    mine = moved(mine, rotations(1, seed)[0], torch.tensor([1.0, 2, 3], dtype=torch.float64), 7.0)
    reference, estimate = (path(poses_se3=list(np.linalg.inv(square(x).numpy()))) for x in (true, mine))
    relative = metrics.RPE(metrics.PoseRelation.rotation_angle_deg, delta=1, delta_unit=metrics.Unit.frames)
    relative.process_data((reference, estimate))
    estimate.align(reference, correct_scale=True)
    absolute = metrics.APE(metrics.PoseRelation.translation_part)
    absolute.process_data((reference, estimate))
    found = pose_metrics(mine, true)
    assert found.ate > 0.1
    assert found.ate == pytest.approx(absolute.get_statistic(metrics.StatisticsType.rmse), rel=1e-9)
    errors = pair_errors(mine, true)
    neighbours = errors.views[:, 1] - errors.views[:, 0] == 1
    np.testing.assert_allclose(errors.rotation[neighbours].numpy(), relative.error, atol=1e-6)


@PROPERTY
@given(errors=st.lists(st.floats(0, 180), min_size=1, max_size=40), threshold=st.sampled_from([3.0, 5.0, 15.0, 30.0]))
def test_area_equals_scikit_learn_and_is_below_the_histogram(errors: list[float], threshold: float) -> None:
    area = pytest.importorskip("sklearn.metrics").auc
    found = auc(torch.tensor(errors, dtype=torch.float64), threshold)
    inside = sorted(e for e in errors if e < threshold)
    x = np.repeat([0.0, *inside, threshold], 2)[1:-1]  # a step at every error
    y = np.repeat(np.arange(len(inside) + 1) / len(errors), 2)
    assert found == pytest.approx(100 * area(x, y) / threshold, abs=1e-9)
    histogram, _ = np.histogram(errors, bins=np.arange(threshold + 1))
    above = int(sum(e == threshold for e in errors))  # the last bin of numpy is closed
    histogram[-1] -= above
    binned = 100 * np.mean(np.cumsum(histogram / len(errors)))
    assert found - 1e-9 <= binned <= found + 100 / threshold + 1e-9


@pytest.fixture(scope="module")
def da3bench() -> Any:
    """The measures of Depth Anything 3's benchmark as they are published; what they import for point clouds alone stays away."""
    package = pytest.importorskip("depth_anything_3")
    path = Path(next(iter(package.__path__))) / "bench" / "utils.py"
    spec = importlib.util.spec_from_file_location("da3bench_utils", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("open3d", "addict"):
            if importlib.util.find_spec(name) is None:
                patch.setitem(sys.modules, name, MagicMock())
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("seed", "noise"), [(0, 0.3), (1, 1.0), (2, 4.0), (3, 15.0)])
def test_published_area_equals_the_benchmark(cameras: Make, rotations: Make, da3bench: Any, seed: int, noise: float) -> None:
    true = cameras(9, seed)
    shift = 0.02 * noise * torch.randn(9, 3, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    mine = torch.cat((rotations(9, seed, noise) @ true[:, :, :3], true[:, :, 3:] + shift), 2)
    angles = da3bench.se3_to_relative_pose_error(*(da3bench.align_to_first_camera(square(x)) for x in (mine, true)), 9)
    for threshold in (3, 5, 15, 30):
        expected = 100 * da3bench.calculate_auc_np(*(x.numpy() for x in angles), threshold)[0]
        assert published_auc(mine, true, threshold) == pytest.approx(expected, abs=1e-9)
    found = pose_metrics(mine, true)
    assert (found.published_auc3, found.published_auc30) == (published_auc(mine, true, 3), published_auc(mine, true, 30))
    if noise < 5:
        assert found.published_auc30 > 0
        assert found.published_auc30 != pytest.approx(found.auc30, abs=1e-3)


def test_published_area_closed_form() -> None:
    """Errors count in whole degrees, a camera that goes the opposite way is right, and one that stays is 90 degrees off."""
    true = torch.stack([from_centre(about_z(0), 0, 0, 0), from_centre(about_z(0), 1, 0, 0)])

    def mine(degrees: float, *centre: float) -> Tensor:
        return torch.stack([from_centre(about_z(0), 0, 0, 0), from_centre(about_z(degrees), *centre)])

    assert published_auc(mine(1.5, -2, 0, 0), true, 3) == pytest.approx(100 * 2 / 3)
    assert auc(pair_errors(mine(1.5, -2, 0, 0), true).larger, 3) == 0
    assert published_auc(mine(0, 0, 0, 0), true, 90) == pytest.approx(100 / 90)
    assert published_auc(true, mine(0, 0, 0, 0), 30) == 0
    for threshold in (0, 2.5):
        with pytest.raises(InputError, match="bins of one degree"):
            published_auc(true, true, threshold)  # type: ignore[arg-type]


def test_area_closed_form() -> None:
    assert auc(torch.tensor([0.0, 15.0, 90.0]), 30) == pytest.approx(50)
    assert auc(torch.zeros(4), 3) == 100
    assert auc(torch.tensor([30.0, 31.0]), 30) == 0
    assert math.isnan(auc(torch.zeros(0), 3))
    for bad, threshold in ((torch.tensor([math.nan]), 3), (torch.tensor([-1.0]), 3), (torch.zeros(1), 0)):
        with pytest.raises(InputError, match="area under the curve"):
            auc(bad, threshold)


@PROPERTY
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-2, 1e2), order=st.permutations(range(5)))
def test_invariances(cameras: Make, moved: Callable[..., Tensor], rotations: Make, seed: int, scale: float, order: list[int]) -> None:
    mine, true = cameras(5, seed), cameras(5, seed + 1)
    turn, shift = rotations(1, seed)[0], torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    one = pose_metrics(mine, true).to_dict()
    assert pose_metrics(moved(mine, turn, shift, scale), true).to_dict() == pytest.approx(one, rel=1e-6, abs=1e-8)
    other = pose_metrics(mine[order], true[order]).to_dict()
    other |= {name: one[name] for name in one if name.startswith("published")}  # these depend on which view is the first
    assert other == pytest.approx(one, rel=1e-6, abs=1e-8)
    assert pose_metrics(square(mine), square(true)).to_dict() == one
    unit = pose_metrics(mine, moved(true, turn, shift, scale)).to_dict()
    assert unit.pop("ate") == pytest.approx(scale * one.pop("ate"), rel=1e-6)
    assert unit == pytest.approx(one, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("views", [2, 3, 10])
def test_ten_degrees_are_ten_degrees(views: int) -> None:
    """View 0 is never compared with itself; if it were, 10 degrees at two views would be reported as 5."""
    true = torch.stack([from_centre(about_z(0), k, 0, 0) for k in range(views)])
    mine = torch.stack([from_centre(about_z(10.0 * k), k, 0, 0) for k in range(views)])
    found = pose_metrics(mine[:2], true[:2])
    assert (found.rotation_mean, found.rotation_median, found.pairs) == pytest.approx((10, 10, 1))
    errors = pair_errors(mine, true)
    assert (errors.views[:, 0] < errors.views[:, 1]).all()
    assert len(errors.views) == views * (views - 1) // 2
    torch.testing.assert_close(errors.rotation, 10 * (errors.views[:, 1] - errors.views[:, 0]).double())
    found = pose_metrics(mine[:2], true[:2])
    assert found.auc5 == 0
    assert found.auc30 == pytest.approx(100 * (1 - 10 / 30))


def test_direction_closed_form() -> None:
    """Cameras keep their rotation; the second centre is 20 degrees aside, and three times as far, which no scale tells."""
    true = torch.stack([from_centre(about_z(0), 0, 0, 0), from_centre(about_z(30), 1, 0, 0)])
    aside = 3 * about_z(20)[:, 0]
    mine = torch.stack([from_centre(about_z(0), 0, 0, 0), from_centre(about_z(30), *aside.tolist())])
    found = pose_metrics(mine, true)
    assert found.rotation_mean == pytest.approx(0, abs=1e-9)
    assert found.translation_mean == pytest.approx(20)
    assert found.auc30 == pytest.approx(100 / 3)
    backwards = torch.stack([mine[0], from_centre(about_z(30), -1, 0, 0)])
    assert pose_metrics(backwards, true).translation_mean == pytest.approx(180)


@pytest.mark.parametrize("degrees", [1e-5, 1e-3, 1.0, 90.0, 179.0, 179.999, 180.0])
def test_no_floor_and_no_ceiling(rotations: Make, cameras: Make, degrees: float) -> None:
    """acos in FP32 cannot tell 0.01 degrees from 0."""
    true = cameras(2)
    mine = true.clone()
    mine[1] = torch.cat((rotations(1, 3, degrees)[0] @ true[1, :, :3], true[1, :, 3:]), 1)
    assert pair_errors(mine, true).rotation.item() == pytest.approx(degrees, rel=1e-6)
    assert pair_errors(true, true).rotation.item() == pytest.approx(0, abs=1e-12)


def test_inverted_extrinsics_are_wrong(cameras: Make) -> None:
    true = cameras(6)
    found = pose_metrics(inverted(true), true)
    assert found.rotation_mean > 30
    assert found.auc30 < 20
    assert found.ate > 0.3


def test_world_frames_need_not_agree(cameras: Make) -> None:
    """Predictions are relative to view 0 while references are in the world; comparing them as they stand gives large errors."""
    true = cameras(6, 4)
    mine = (square(true) @ torch.linalg.inv(square(true))[:1])[:, :3]
    torch.testing.assert_close(mine[0], torch.eye(3, 4, dtype=torch.float64))
    naive = mine[:, :, :3] @ true[:, :, :3].mT
    assert torch.rad2deg(((naive.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1).acos()).min() > 30
    found = pose_metrics(mine, true)
    assert found.rotation_mean == pytest.approx(0, abs=1e-6)
    assert found.translation_mean == pytest.approx(0, abs=1e-6)
    assert found.ate == pytest.approx(0, abs=1e-9)


def test_pairs_without_baseline_are_left_out_and_counted(cameras: Make, rotations: Make) -> None:
    true = cameras(4)
    true[3] = torch.cat((rotations(1, 5)[0], -rotations(1, 5)[0] @ (-true[2, :, :3].T @ true[2, :, 3:])), 1)
    for dtype in (torch.float64, torch.float32):
        found = pose_metrics(true.to(dtype), true.to(dtype))
        assert (found.pairs, found.undefined) == (6, 1)
        assert found.auc3 == pytest.approx(100, abs=1e-2)
    assert pair_errors(true, true).translation.isnan().tolist() == [False] * 5 + [True]
    wrong = true.clone()
    wrong[3] = from_centre(about_z(0), 9, 9, 9)
    larger = pair_errors(wrong, true).larger
    assert (larger < 1e-6).tolist() == [True, True, False, True, False]  # 01 02 03 12 13; of 23 there is nothing to say
    assert pose_metrics(wrong, true).auc3 == pytest.approx(60)


def test_a_scene_that_only_turns(rotations: Make) -> None:
    true = torch.cat((rotations(3), torch.zeros(3, 3, 1)), 2)
    found = pose_metrics(true, true)
    assert found.undefined == found.pairs == 3
    values = (found.translation_mean, found.translation_median, found.auc3, found.auc30, found.ate)
    assert all(map(math.isnan, values))
    assert found.rotation_mean == pytest.approx(0, abs=1e-9)
    assert found.to_dict()["auc30"] is None


def test_equal_cameras_are_not_rewarded(cameras: Make) -> None:
    true = cameras(5)
    found = pose_metrics(torch.eye(3, 4).expand(5, 3, 4), true)
    assert (found.translation_mean, found.auc30, found.undefined) == (90, 0, 0)
    centres = -torch.einsum("sji,sj->si", true[:, :, :3], true[:, :, 3])
    assert found.ate == pytest.approx((centres - centres.mean(0)).square().sum(1).mean().sqrt().item())


def test_two_views_have_no_trajectory_error(cameras: Make) -> None:
    assert math.isnan(pose_metrics(cameras(2, 1), cameras(2, 2)).ate)


def shear(cameras: Tensor) -> Tensor:
    return cameras + torch.tensor([0, 0.1, 0, 0], dtype=torch.float64)


def mirrored(cameras: Tensor) -> Tensor:
    return cameras * torch.tensor([[1.0], [1], [-1]])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c[:1], "at least two views, the predicted cameras have 1"),
        (lambda c: c[:3], "3 predicted cameras do not fit 4 reference cameras"),
        (lambda c: c[None], r"\[views, 3, 4\]"),
        (lambda c: c[:, :, :3], r"\[views, 3, 4\]"),
        (lambda c: c.index_put((torch.tensor(2), torch.tensor(1), torch.tensor(3)), torch.tensor(math.nan).double()), "not finite: view 2"),
        (mirrored, r"reflections .* view 0, 1, 2, 3"),
        (shear, "no rotations"),
        (lambda c: torch.cat((2 * c[:, :, :3], c[:, :, 3:]), 2), "no rotations"),
        (lambda c: torch.cat((c, c[:, :1]), 1), "last row"),
    ],
)
def test_bad_input(cameras: Make, damage: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pose_metrics(damage(cameras(4)), cameras(4))


def test_the_reference_is_checked_too(cameras: Make) -> None:
    with pytest.raises(InputError, match="reference cameras have reflections"):
        pose_metrics(cameras(4), mirrored(cameras(4)))


def test_rotations_in_bf16_pass(cameras: Make) -> None:
    true = cameras(50)
    found = pose_metrics(true.bfloat16(), true)
    assert 0 < found.rotation_mean < 0.5
