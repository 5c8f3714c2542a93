"""Point clouds and pictures: what is written is what was predicted, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from lite3r_plugin.errors import InputError
from lite3r_plugin.files import check_output
from lite3r_plugin.scene.export import Panel, PointCloud, point_cloud, render, save_picture, save_ply
from lite3r_plugin.scene.geometry import unproject
from lite3r_plugin.scene.prediction import Prediction


def prediction(views: int = 2, height: int = 12, width: int = 16) -> Prediction:
    """A tilted plane in random colours, with a confidence that grows from pixel to pixel."""
    depth = torch.linspace(1, 3, views * height * width).view(views, height, width)
    camera = torch.eye(3, 4).expand(views, 3, 4)
    intrinsics = torch.tensor([[20.0, 0, width / 2], [0, 20.0, height / 2], [0, 0, 1]]).expand(views, 3, 3)
    confidence = torch.arange(depth.numel()).view(depth.shape)
    return Prediction(depth, confidence, unproject(depth, camera, intrinsics), camera, intrinsics, torch.rand(*depth.shape, 3))


def test_ply_holds_the_points_and_colours(tmp_path: Path) -> None:
    scene = prediction()
    save_ply(point_cloud(scene, drop_percent=0), tmp_path / "scene.ply")
    read = trimesh.load(tmp_path / "scene.ply")
    np.testing.assert_allclose(read.vertices, scene.points.flatten(0, 2), atol=1e-6)
    np.testing.assert_array_equal(read.colors[:, :3], (scene.images.flatten(0, 2) * 255).round().byte())
    assert [p.name for p in tmp_path.iterdir()] == ["scene.ply"]


def test_least_confident_points_are_dropped() -> None:
    scene = prediction()
    cloud = point_cloud(scene, drop_percent=25)
    torch.testing.assert_close(cloud.points, scene.points.flatten(0, 2)[96:])


def test_equal_confidence_drops_nothing() -> None:
    scene = prediction()
    scene.confidence.fill_(1.0)
    assert len(point_cloud(scene, drop_percent=50).points) == 384


def test_subset_is_seeded() -> None:
    scene = prediction()
    one, same, other = (point_cloud(scene, max_points=50, seed=seed).points for seed in (0, 0, 1))
    assert len(one) == 50
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_invalid_pixels_are_left_out() -> None:
    scene = prediction()
    scene.points[0, 0, 0] = torch.nan
    scene.depth[0, 0, 1] = -1
    scene.confidence[0, 0, 2] = torch.inf
    assert len(point_cloud(scene, drop_percent=0).points) == 381


def test_wrong_arguments() -> None:
    scene = prediction()
    with pytest.raises(InputError, match=r"\[0, 100\)"):
        point_cloud(scene, drop_percent=100)
    with pytest.raises(InputError, match="at least 1"):
        point_cloud(scene, max_points=0)
    scene.points.fill_(torch.nan)
    with pytest.raises(InputError, match="no valid point"):
        point_cloud(scene)


def test_outputs_are_checked(tmp_path: Path) -> None:
    check_output(tmp_path / "a.ply", ".ply")
    (tmp_path / "dir.ply").mkdir()
    for path, message in (
        (tmp_path / "a.obj", "must end in .ply"),
        (tmp_path / "dir.ply", "is a folder"),
        (tmp_path / "no" / "a.ply", "does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            check_output(path, ".ply")


def test_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "scene.ply").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        save_ply(point_cloud(prediction()), tmp_path / "scene.ply")
    assert [p.name for p in tmp_path.iterdir()] == ["scene.ply"]


def test_render_shows_the_nearest_point() -> None:
    green, red = torch.tensor([0, 255, 0], dtype=torch.uint8), torch.tensor([255, 0, 0], dtype=torch.uint8)
    plane = torch.stack(torch.meshgrid(torch.linspace(-1, 1, 200), torch.linspace(-1, 1, 200), indexing="ij"), -1).flatten(0, 1)
    near, far = (torch.cat((plane, torch.full((len(plane), 1), z)), 1) for z in (2.0, 3.0))
    cloud = PointCloud(torch.cat((far, near)), torch.cat((red.expand(len(far), 3), green.expand(len(near), 3))))
    picture = render(cloud, (90, 120), turn=0, lift=0)
    assert picture.shape == (90, 120, 3)
    assert torch.equal(picture[45, 60], green)
    assert (picture[0, 0] == 255).all()


@pytest.mark.parametrize("views", [1, 2, 11])
def test_picture(tmp_path: Path, views: int) -> None:
    depth = torch.rand(views, 12, 16)
    depth[0, 0, 0] = torch.nan
    panels = [
        Panel("views", torch.rand(views, 12, 16, 3), "image"),
        Panel("depth", depth, "depth"),
        Panel("difference", depth / 10, "error"),
    ]
    look = torch.zeros(20, 30, 3, dtype=torch.uint8)
    save_picture(tmp_path / "a.png", panels, "title", [("dense", look), ("Lite3R", look)])
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 500
        assert np.asarray(picture).std() > 10
