"""Each layout, written and read back: the same cameras, and views that agree where they are warped onto each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from written_scenes import WRITERS, Sample, inverted, render, write_layout

from lite3r_plugin.errors import InputError
from lite3r_plugin.scene.data import Scene, Views, open_scenes
from lite3r_plugin.scene.procedural import reprojection_check

POSED = [layout for layout in WRITERS if layout != "images"]
WITH_DEPTH = ("blendedmvs", "7scenes", "colmap", "colmap-text", "nerfstudio")


@pytest.fixture(scope="module")
def sample() -> Sample:
    return render()


def layout_of(kind: str) -> str:
    return kind.removesuffix("-training").removesuffix("-text")


def opened(sample: Sample, kind: str, path: Path) -> Scene:
    (scene,) = open_scenes(f"{layout_of(kind)}:{write_layout(sample, kind, path)}")
    return scene


def with_true_depth(views: Views, sample: Sample) -> Sample:
    return {**views.as_sample(), "depth": sample["depth"][None], "valid": (sample["depth"] > 0)[None]}


@pytest.mark.parametrize("kind", POSED)
def test_cameras_are_read_as_written(sample: Sample, kind: str, tmp_path: Path) -> None:
    views = opened(sample, kind, tmp_path).sample(range(4))
    assert views.intrinsics is not None
    assert views.world_to_camera is not None
    torch.testing.assert_close(views.intrinsics, sample["K"], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(views.world_to_camera, sample["w2c"], atol=1e-4, rtol=1e-4)
    assert (views.images - sample["rgb"]).abs().mean() < 0.01


@pytest.mark.parametrize("kind", WITH_DEPTH)
def test_depth_is_read_as_written(sample: Sample, kind: str, tmp_path: Path) -> None:
    views = opened(sample, kind, tmp_path).sample(range(4))
    torch.testing.assert_close(views.depth, sample["depth"], atol=6e-4, rtol=0)
    assert torch.equal(views.valid, sample["depth"] > 0)


@pytest.mark.parametrize("kind", POSED)
def test_warped_views_agree(sample: Sample, kind: str, tmp_path: Path) -> None:
    views = opened(sample, kind, tmp_path).sample(range(4)).relative()
    seen, warped, unwarped = reprojection_check(with_true_depth(views, sample)).T
    assert (seen > 0.3).all()
    assert (warped < 0.4 * unwarped).all()


def test_inverted_poses_do_not_agree(sample: Sample, tmp_path: Path) -> None:
    views = opened(sample, "blendedmvs", tmp_path).sample(range(4))
    right = reprojection_check(views.as_sample())[:, 0]
    wrong = reprojection_check(inverted(views.as_sample()))[:, 0]
    assert (wrong < 0.3 * right).all()


@pytest.mark.parametrize("kind", WITH_DEPTH)
@pytest.mark.parametrize("size", [(30, 34), (48, 48), (64, 96)])
def test_resized_and_cropped_views_agree(sample: Sample, kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    views = opened(sample, kind, tmp_path).sample(range(4), size)
    assert views.images.shape == (4, 3, *size)
    seen, warped, unwarped = reprojection_check(views.as_sample(), tolerance=0.04).T
    assert (seen > 0.25).all()
    assert (warped < 0.5 * unwarped).all()


def test_the_first_camera_is_the_world(sample: Sample, tmp_path: Path) -> None:
    views = opened(sample, "strecha", tmp_path).sample([2, 0, 3]).relative()
    assert views.world_to_camera is not None
    torch.testing.assert_close(views.world_to_camera[0], torch.eye(3, 4))
    R, t = sample["w2c"][[2, 0]].split((3, 1), -1)
    torch.testing.assert_close(views.world_to_camera[1][:, :3], R[1] @ R[0].T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(views.world_to_camera[1][:, 3:], t[1] - R[1] @ R[0].T @ t[0], atol=1e-4, rtol=1e-4)


def test_training_layout_of_dtu_has_small_depth(sample: Sample, tmp_path: Path) -> None:
    views = opened(sample, "dtu-training", tmp_path).sample(range(4), (12, 16))
    torch.testing.assert_close(views.depth, sample["depth"][:, 2::4, 2::4])
    assert views.intrinsics is not None
    torch.testing.assert_close(views.intrinsics[:, :2], sample["K"][:, :2] / 4)


def test_photographs_have_no_cameras(sample: Sample, tmp_path: Path) -> None:
    views = opened(sample, "images", tmp_path).sample([0, 1])
    assert views.intrinsics is None
    assert views.world_to_camera is None
    assert not views.valid.any()
    for use in (views.relative, views.as_sample, views.geometry):
        with pytest.raises(InputError, match="open a layout with cameras"):
            use()


def test_procedural_scenes_are_the_same_every_time_and_agree() -> None:
    spec = "procedural:scenes=4,views=3,size=32,textures=6"
    train, test = (open_scenes(spec, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (3, 1)
    views = train[1].sample(range(3))
    assert torch.equal(views.images, open_scenes(spec)[1].sample(range(3)).images)
    assert not torch.equal(views.images, test[0].sample(range(3)).images)
    assert views.valid.any()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("blendedmvs", "LAYOUT:PATH"),
        ("kitti:somewhere", "LAYOUT one of blendedmvs, dtu"),
        ("dtu:/no/such/folder", "/no/such/folder is no folder"),
        ("procedural:views=1", "views >= 2"),
        ("procedural:colour=3", "scenes=NUMBER"),
        ("procedural:device=tpu", "on the cpu"),
    ],
)
def test_wrong_names_are_refused(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_scenes(spec)


@pytest.mark.parametrize("layout", sorted({layout_of(kind) for kind in WRITERS}))
def test_an_empty_folder_is_refused_by_name(layout: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=str(tmp_path)):
        open_scenes(f"{layout}:{tmp_path}")
