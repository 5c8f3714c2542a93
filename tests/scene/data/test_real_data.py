"""Loaders on real samples: ``--data-root`` names a folder with a folder for each layout in it; skipped without.

Matched points must lie on the epipolar lines of the cameras, which needs OpenCV, and views must agree where depth warps them.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor
from written_scenes import inverted

from lite3r_plugin.scene.data import Scene, Scenes, Views, open_scenes
from lite3r_plugin.scene.procedural import reprojection_check

LOG = logging.getLogger(__name__)  # the numbers are shown with --log-cli-level=INFO
LONGER_SIDE = 960
EPIPOLAR_PIXELS = 1.5


@pytest.fixture
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def scenes(layout: str, pytestconfig: pytest.Config) -> Scenes:
    root = pytestconfig.getoption("--data-root")
    if root is None or not (folder := Path(root) / layout).is_dir():
        pytest.skip(f"needs --data-root with a folder {layout}")
    return open_scenes(f"{layout}:{folder}")


def epipolar_distances(views: Views, first: int, second: int, poses: Tensor) -> Tensor:
    """Distances in pixels between matched points of the second view and the lines that the cameras predict for them."""
    cv2 = pytest.importorskip("cv2")
    found = []
    for i in (first, second):
        grey = (views.images[i].mean(0) * 255).byte().numpy()
        found.append(cv2.SIFT_create(2000).detectAndCompute(grey, None))
    pairs = cv2.BFMatcher().knnMatch(found[0][1], found[1][1], k=2)
    sure = [a for a, b in pairs if a.distance < 0.7 * b.distance]
    p = torch.tensor([found[0][0][a.queryIdx].pt for a in sure]).double() + 0.5  # OpenCV's pixel centres are at whole numbers
    q = torch.tensor([found[1][0][a.trainIdx].pt for a in sure]).double() + 0.5
    assert views.intrinsics is not None
    K, (R, t) = views.intrinsics.double(), poses.double().split((3, 1), -1)
    R, t = R[second] @ R[first].T, (t[second] - R[second] @ R[first].T @ t[first])[:, 0]
    cross = torch.linalg.cross(t.expand(3, 3), R.T).T  # [t]x R
    F = torch.linalg.inv(K[second]).T @ cross @ torch.linalg.inv(K[first])
    ones = torch.ones(len(p), 1).double()
    lines = torch.cat((p, ones), 1) @ F.T
    return (lines * torch.cat((q, ones), 1)).sum(1).abs() / lines[:, :2].norm(dim=1)


def shape(scene: Scene) -> tuple[int, int]:
    height, width = scene.sample([0]).images.shape[-2:]
    scale = min(1, LONGER_SIDE / max(height, width))
    return round(height * scale), round(width * scale)


@pytest.mark.parametrize("layout", ["dtu", "dtu-idr", "strecha", "colmap", "7scenes"], indirect=True)
def test_matches_lie_on_epipolar_lines(scenes: Scenes) -> None:
    for scene in scenes:
        size = shape(scene)
        step = 20 if len(scene) > 200 else 1
        views = scene.sample([0, step, 2 * step], size)
        assert views.world_to_camera is not None
        right = [epipolar_distances(views, i, j, views.world_to_camera).median().item() for i, j in ((0, 1), (1, 2))]
        wrong = [
            epipolar_distances(views, i, j, inverted({"w2c": views.world_to_camera})["w2c"]).median().item() for i, j in ((0, 1), (1, 2))
        ]
        LOG.info("%s at %s: pixels off the line %s; inverted poses: %s", scene.name, size, right, wrong)
        assert max(right) < EPIPOLAR_PIXELS * (4 if len(scene) > 200 else 1)  # the poses of a tracker are rougher
        assert min(b / a for a, b in zip(right, wrong, strict=True)) > 3


@pytest.mark.parametrize("layout", ["blendedmvs", "7scenes"], indirect=True)
def test_warped_views_agree(scenes: Scenes) -> None:
    for scene in scenes[:4]:
        rows, wrong = [], []
        step = 20 if len(scene) > 200 else 1
        for start in range(0, len(scene) - 4 * step, max(step, len(scene) // 5)):
            sample = scene.sample(range(start, start + 4 * step + 1, step), (240, 320)).relative().as_sample()
            rows.append(reprojection_check(sample))
            wrong.append(reprojection_check(inverted(sample)))
        seen, warped, unwarped = torch.cat(rows).nanmean(0).tolist()
        numbers = (scene.name, seen, warped, unwarped, *torch.cat(wrong).nanmean(0)[:2].tolist())
        LOG.info("%s: covisible %.3f, warped %.3f, unwarped %.3f; inverted poses: covisible %.3f, warped %.3f", *numbers)
        assert seen > 0.3
        assert warped < 0.6 * unwarped
        assert torch.cat(wrong)[:, 0].mean() < 0.5 * seen
