"""The testbed model: shapes, symmetries, sites, files, and a training that trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lite3r_plugin import apply_lite3r, remove_lite3r
from lite3r_plugin.errors import ConfigError, InputError
from lite3r_plugin.scene.geometry import unproject
from lite3r_plugin.scene.procedural import ARCS, ProcScenes, TextureBank
from lite3r_plugin.testbed import Testbed, TestbedConfig
from lite3r_plugin.testbed.cameras import decode_pose, fov_of, relative_to_first
from lite3r_plugin.testbed.evaluate import auc, evaluate, pose_errors
from lite3r_plugin.testbed.losses import TrainingModel, correspondences, match_loss

TINY = TestbedConfig(dim=64, depth=2, stem=16)


@pytest.fixture(scope="module")
def sample() -> dict[str, torch.Tensor]:
    return ProcScenes(TextureBank.procedural(12, 32), seed=1, arcs=ARCS[:2])(2, 4, 48, 64)


@pytest.fixture
def model() -> Testbed:
    return Testbed(TINY).eval()


@torch.no_grad()
def test_shapes(model: Testbed) -> None:
    out = model(torch.rand(2, 3, 3, 40, 56))
    assert {name: tuple(value.shape) for name, value in out.items()} == {
        "depth": (2, 3, 40, 56), "depth_conf": (2, 3, 40, 56), "points": (2, 3, 40, 56, 3), "points_conf": (2, 3, 40, 56),
        "pose_enc": (2, 3, 9), "world_to_camera": (2, 3, 3, 4), "intrinsics": (2, 3, 3, 3),
    }  # fmt: skip
    assert (out["depth"] > 0).all()
    rotation = out["world_to_camera"][..., :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand_as(rotation), atol=1e-5, rtol=0)


def test_default_size() -> None:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Testbed().parameters())
    assert 18e6 < parameters < 22e6  # at most 44 MB in FP16


@torch.no_grad()
def test_views_after_the_first_have_no_order(model: Testbed) -> None:
    images, order = torch.rand(1, 4, 3, 32, 32), [0, 3, 1, 2]
    out, permuted = model(images), model(images[:, order])
    for name, value in out.items():
        torch.testing.assert_close(permuted[name], value[:, order], atol=1e-4, rtol=1e-4)
    swapped = model(images[:, [1, 0, 2, 3]])
    assert not torch.allclose(swapped["pose_enc"][:, [1, 0, 2, 3]], out["pose_enc"], atol=1e-5)


def test_images_of_another_shape_are_refused(model: Testbed) -> None:
    with pytest.raises(InputError, match="multiples of 8"):
        model(torch.rand(1, 2, 3, 30, 32))


def test_config_is_checked() -> None:
    with pytest.raises(ConfigError, match="multiple of head_dim"):
        TestbedConfig(dim=100)


@torch.no_grad()
def test_the_vggt_adapter_knows_it(model: Testbed) -> None:
    images = torch.rand(1, 3, 3, 64, 64)
    dense = model(images)
    apply_lite3r(model, keep_ratio=1.0, dense_below=0)
    kept = model(images)
    for name, value in dense.items():
        torch.testing.assert_close(kept[name], value, atol=1e-4, rtol=1e-4)
    remove_lite3r(model)
    apply_lite3r(model, keep_ratio=0.25, dense_below=0, block_q=16, block_k=16)
    sites = [m for n, m in model.named_modules() if n.startswith("aggregator.global_blocks") and hasattr(m, "proj_lin")]
    assert len(sites) == TINY.depth
    assert not torch.equal(model(images)["depth"], dense["depth"])
    assert all(site.calls.sparse == 1 for site in sites)


@torch.no_grad()
def test_save_and_load(model: Testbed, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = Testbed.from_pretrained(tmp_path)
    images = torch.rand(1, 2, 3, 32, 32)
    assert again.config == TINY
    torch.testing.assert_close(again(images)["depth"], model(images)["depth"], atol=1e-2, rtol=1e-2)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="cannot be read"):
        Testbed.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="no testbed weights"):
        Testbed.from_pretrained(tmp_path / "nowhere")


def test_pose_encoding_round_trip(sample: dict[str, torch.Tensor]) -> None:
    fov = fov_of(sample["K"], 48, 64)
    identity = torch.tensor([0.1, 0.2, 0.3, 0, 0, 0, 1]).expand(2, 4, 7)
    world_to_camera, intrinsics = decode_pose(torch.cat((identity, fov), -1), 48, 64)
    torch.testing.assert_close(intrinsics, sample["K"], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(world_to_camera[0, 0], torch.tensor([[1, 0, 0, 0.1], [0, 1, 0, 0.2], [0, 0, 1, 0.3]]))


def test_pose_errors_and_auc(sample: dict[str, torch.Tensor]) -> None:
    pose, ok = sample["w2c"], torch.ones(2, 4, dtype=torch.bool)
    rotation, translation = pose_errors(relative_to_first(pose), pose, ok)
    assert rotation.shape == (12,)
    assert rotation.max() < 0.1
    assert translation.max() < 0.5
    assert auc(torch.tensor([0.0, 15.0, 90.0]), 30) == pytest.approx(50)


def test_true_matches_have_the_lowest_loss(sample: dict[str, torch.Tensor]) -> None:
    """Features that are the world points themselves (as a smooth random code) match better than shuffled ones."""
    index, weight = correspondences(sample, 8)
    assert 0.1 < (weight.sum(-1) > 0.5).float().mean() < 1
    grid = (48 // 8, 64 // 8)
    points = unproject(sample["depth"], sample["w2c"], sample["K"])[:, :, 4::8, 4::8].flatten(2, 3)
    code = (points @ torch.randn(3, 64) * 2 + torch.rand(64) * 6).sin()
    scale = torch.tensor(3.0)
    true = match_loss(code, grid, index, weight, scale)
    shuffled = match_loss(code[:, :, torch.randperm(code.shape[2])], grid, index, weight, scale)
    assert true < 0.6 * shuffled


def test_training_lowers_the_loss(sample: dict[str, torch.Tensor]) -> None:
    training = TrainingModel(Testbed(TINY), feature_dim=32)
    optimizer = torch.optim.AdamW(training.parameters(), 2e-3)
    totals = []
    for _ in range(25):
        loss, parts = training(sample, 0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(parts["total"].item())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in training.parameters())
    assert totals[-1] < 0.75 * totals[0]
    measures = evaluate(training.model, sample)
    assert measures["abs_rel"] < measures["mean_abs_rel"]
