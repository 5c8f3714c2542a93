"""Whole scenes: unprojection with the right cameras, the constant prediction, fidelity to the teacher."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lite3r_plugin.errors import InputError
from lite3r_plugin.scene.metrics import Comparison, Geometry, constant_geometry, fidelity, scene_metrics

MakeGeometry = Callable[..., Geometry]


def in_other_world(scene: Geometry, moved: Callable[..., Tensor], rotations: Callable[..., Tensor], scale: float) -> Geometry:
    turn, shift = rotations(1, 9)[0], torch.tensor([3.0, 1, -2], dtype=torch.float64)
    return dataclasses.replace(
        scene, depth=scale * scene.depth.double(), world_to_camera=moved(scene.world_to_camera.double(), turn, shift, scale)
    )


def test_a_right_scene_in_another_world_is_right(
    scene: MakeGeometry, moved: Callable[..., Tensor], rotations: Callable[..., Tensor]
) -> None:
    truth = scene()
    found = scene_metrics(in_other_world(truth, moved, rotations, 4.0), truth)
    assert found.depth.abs_rel == pytest.approx(0, abs=1e-6)
    assert found.pose.rotation_mean == pytest.approx(0, abs=1e-4)
    assert found.pose.ate == pytest.approx(0, abs=1e-5)
    assert (found.points.chamfer, found.points.f_score, found.points.scale) == pytest.approx((0, 1, 0.25), abs=1e-5)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["pose"]["pairs"] == 3


def test_a_scene_uses_its_own_cameras(scene: MakeGeometry) -> None:
    """A wrong focal length, or inverted extrinsics, of the prediction shows in its points."""
    truth = scene()
    wide = dataclasses.replace(truth, intrinsics=truth.intrinsics * torch.tensor([[0.5], [0.5], [1]]) + 0)
    assert scene_metrics(wide, truth).points.f_score < 0.7
    rotation = truth.world_to_camera[:, :, :3].mT
    inverted = torch.cat((rotation, -rotation @ truth.world_to_camera[:, :, 3:]), 2)
    found = scene_metrics(dataclasses.replace(truth, world_to_camera=inverted), truth)
    assert found.points.f_score < 0.7
    assert found.pose.auc30 < 50
    assert found.depth.abs_rel == pytest.approx(0, abs=1e-6)


def test_points_from_elsewhere(scene: MakeGeometry) -> None:
    truth = scene()
    given = dataclasses.replace(truth, world_points=truth.points() * torch.tensor([1.0, 1, 1.2]))
    assert scene_metrics(given, truth).points.chamfer > 0.01
    again = dataclasses.replace(truth, world_points=truth.points())
    assert scene_metrics(again, truth) == scene_metrics(truth, truth)


def test_unknown_pixels_count_nowhere(scene: MakeGeometry) -> None:
    truth, mine = scene(1), scene(1)
    mine.depth[0, :5] = 100
    assert scene_metrics(mine, truth).points.f_score < 0.9
    holes = truth.depth.clone()
    holes[0, :5] = 0
    valid = torch.ones_like(truth.depth, dtype=torch.bool)
    valid[0, :5] = False
    for reference in (dataclasses.replace(truth, depth=holes), dataclasses.replace(truth, valid=valid)):
        found = scene_metrics(mine, reference)
        assert (found.depth.abs_rel, found.points.chamfer) == pytest.approx((0, 0), abs=1e-6)


def test_the_constant_prediction(scene: MakeGeometry) -> None:
    truth = scene(3)
    found = scene_metrics(constant_geometry(truth), truth)
    middle = truth.depth.median()
    assert found.depth.abs_rel == pytest.approx(((truth.depth - middle).abs() / truth.depth).mean().item())
    assert found.depth.scales == pytest.approx((1,))
    assert found.pose.translation_mean == 90
    assert found.pose.auc30 == 0


@pytest.mark.parametrize("how", ["no depth", "nothing valid"])
def test_a_reference_with_cameras_alone(scene: MakeGeometry, how: str) -> None:
    truth, mine = scene(1), scene(2)
    unknown = (
        dict(depth=torch.zeros_like(truth.depth)) if how == "no depth" else dict(valid=torch.zeros_like(truth.depth, dtype=torch.bool))
    )
    cameras = dataclasses.replace(truth, **unknown)
    found = scene_metrics(mine, cameras)
    assert found.depth is None
    assert found.points is None
    assert found.pose == scene_metrics(mine, truth).pose
    assert found.to_dict()["depth"] is None
    comparison = Comparison()
    comparison.add(cameras, {"dense": mine, "lite3r": mine})
    assert comparison.rows()[0] == "rotation, degrees"
    assert "AbsRel" not in comparison.rows()
    assert math.isnan(comparison.mean("dense", "AbsRel"))


@pytest.mark.parametrize("field", ["world_to_camera", "intrinsics", "depth"])
def test_parts_that_do_not_fit(scene: MakeGeometry, field: str) -> None:
    truth = scene()
    broken = dataclasses.replace(truth, **{field: getattr(truth, field)[:2]})
    with pytest.raises(InputError, match="fit"):
        broken.points()
    with pytest.raises(InputError):
        scene_metrics(broken, truth)


def test_intrinsics_are_checked(scene: MakeGeometry) -> None:
    truth = scene()
    for bad in (torch.zeros(3, 3, 3), truth.intrinsics * math.nan, truth.intrinsics.mT, 2 * truth.intrinsics):
        with pytest.raises(InputError, match="intrinsics"):
            dataclasses.replace(truth, intrinsics=bad).points()


def test_one_view_is_refused(scene: MakeGeometry) -> None:
    with pytest.raises(InputError, match="two views"):
        scene_metrics(scene(views=1), scene(views=1))


def test_fidelity_of_the_teacher_itself(scene: MakeGeometry) -> None:
    found = fidelity(scene(), scene())
    assert (found.depth_abs_rel, found.points, found.depth_delta1, found.depth_scale, found.coverage) == (0, 0, 1, 1, 1)
    assert (found.rotation_max, found.translation_mean) == pytest.approx((0, 0), abs=1e-5)


def test_fidelity_sees_a_change_of_scale(scene: MakeGeometry) -> None:
    teacher = scene()
    bigger = dataclasses.replace(teacher, depth=1.1 * teacher.depth, world_to_camera=teacher.world_to_camera * torch.tensor([1, 1, 1, 1.1]))
    found = fidelity(bigger, teacher)
    assert (found.depth_abs_rel, found.depth_scale) == pytest.approx((0.1, 1 / 1.1), rel=1e-5)
    assert found.points > 0.05
    assert found.rotation_max == pytest.approx(0, abs=1e-5)
    assert scene_metrics(bigger, teacher).depth.abs_rel == pytest.approx(0, abs=1e-6)


def test_fidelity_closed_form(scene: MakeGeometry) -> None:
    """All points are moved by a hundredth of the size of the cloud; one camera of three turns by 3 degrees."""
    teacher = scene()
    points = teacher.points().reshape(-1, 3)
    size = (points - points.mean(0)).norm(dim=1).median().item()
    turned = teacher.world_to_camera.double()
    c, s = math.cos(math.radians(3)), math.sin(math.radians(3))
    turned[2] = torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float64) @ turned[2]
    shifted = teacher.points() + torch.tensor([0, 0.01 * size, 0])
    found = fidelity(dataclasses.replace(teacher, world_to_camera=turned, world_points=shifted), teacher)
    assert found.points == pytest.approx(0.01)
    assert (found.rotation_mean, found.rotation_max) == pytest.approx((2, 3), abs=1e-4)


def test_fidelity_of_what_does_not_fit(scene: MakeGeometry) -> None:
    teacher = scene()
    other = dataclasses.replace(teacher, world_points=torch.zeros(3, 2, 2, 3))
    with pytest.raises(InputError, match="other shapes"):
        fidelity(other, teacher)
    nowhere = dataclasses.replace(teacher, world_points=torch.full((3, 18, 24, 3), math.nan))
    with pytest.raises(InputError, match="no valid point in common"):
        fidelity(nowhere, teacher)
