"""Losses against their formulas in numpy, over batches, in half precision, with unknown labels; nothing is kept but what they are given."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from lite3r_plugin.adapter import ModelOutputs
from lite3r_plugin.errors import AdapterError, InputError
from lite3r_plugin.scene.geometry import relative_to_first, unproject
from lite3r_plugin.training.losses import feature_loss, label_losses, prediction_losses, scene_scale, tensor_losses, weight_at
from lite3r_plugin.training.outputs import OutputReader

B, S, H, W = 2, 3, 6, 8


def poses(*sizes: int) -> Tensor:
    rotation = torch.linalg.qr(torch.randn(*sizes, 3, 3)).Q
    return torch.cat((rotation * torch.linalg.det(rotation)[..., None, None], torch.randn(*sizes, 3, 1)), -1)


def scene() -> ModelOutputs:
    """Everything, of scenes that do not know each other; points fit to depth and cameras."""
    depth, pose = torch.rand(B, S, H, W) + 1, poses(B, S)
    intrinsics = torch.eye(3).repeat(B, S, 1, 1)
    intrinsics[..., 0, 0], intrinsics[..., 1, 1], intrinsics[..., 0, 2], intrinsics[..., 1, 2] = 7.0, 9.0, W / 2, H / 2
    return ModelOutputs(depth, unproject(depth, pose, intrinsics), pose, intrinsics, torch.randn(B, S, 9), (torch.randn(B, S, H, W),))


def near(outputs: ModelOutputs, size: float = 0.1) -> ModelOutputs:
    """`outputs` changed a little, with gradients."""
    changed = {
        field.name: (value * (1 + size * torch.rand_like(value))).requires_grad_()
        for field in dataclasses.fields(outputs)
        if isinstance(value := getattr(outputs, field.name), Tensor)
    }
    return ModelOutputs(**changed, other=tuple((x + size).requires_grad_() for x in outputs.other))


def moved(outputs: ModelOutputs, scale: Tensor) -> ModelOutputs:
    """The same scenes in another world each, and in another unit."""
    turn, shift = poses(B).split((3, 1), -1)  # [B, 3, 3], [B, 3, 1]
    rotation = outputs.world_to_camera[..., :3] @ turn[:, None].mT
    translation = scale[:, None, None, None] * outputs.world_to_camera[..., 3:] - rotation @ shift[:, None]
    points = scale[:, None, None] * outputs.points.flatten(1, 3) @ turn.mT + shift.mT
    return ModelOutputs(
        depth=scale[:, None, None, None] * outputs.depth,
        points=points.unflatten(1, (S, H, W)),
        world_to_camera=torch.cat((rotation, translation), -1),
        intrinsics=outputs.intrinsics,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_feature_losses_are_their_formulas(dtype: torch.dtype) -> None:
    student, teacher = torch.randn(3, 7, 5, dtype=dtype, requires_grad=True), torch.randn(3, 7, 5, dtype=dtype)
    s, t = (x.detach().double().numpy() for x in (student, teacher))
    expected = {
        "normalized": np.mean([np.square(a - b).sum() / np.square(b).sum() for a, b in zip(s, t, strict=True)]),
        "mse": np.square(s - t).mean(),
        "cosine": np.mean(1 - (s * t).sum(-1) / np.linalg.norm(s, axis=-1) / np.linalg.norm(t, axis=-1)),
    }
    with torch.autocast("cpu"):
        for kind, value in expected.items():
            loss = feature_loss(student, teacher, kind)  # pyright: ignore[reportArgumentType]
            assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert loss.item() == pytest.approx(value, rel=1e-5)
    (gradient,) = torch.autograd.grad(feature_loss(student, teacher), student)
    exact = 2 * (s - t) / np.square(t).sum((1, 2), keepdims=True) / 3
    np.testing.assert_allclose(gradient.double().numpy(), exact, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)
    assert gradient.dtype == dtype
    assert feature_loss(student, student).item() == 0
    with pytest.raises(AdapterError, match=r"\[3, 7, 5\].*\[3, 7, 4\]"):
        feature_loss(student, teacher[..., :4])


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4, 2)])
def test_gradients_of_feature_losses(shape: tuple[int, ...]) -> None:
    student, teacher = torch.randn(*shape, dtype=torch.float64, requires_grad=True), torch.randn(*shape, dtype=torch.float64)
    teacher.view(-1)[1] = torch.inf
    assert torch.autograd.gradcheck(lambda x: 3 * feature_loss(x, teacher), student)


def test_what_the_teacher_does_not_know_does_not_count() -> None:
    student, teacher = torch.ones(1, 4, requires_grad=True), torch.tensor([[2.0, torch.nan, torch.inf, 2.0]])
    loss = feature_loss(student, teacher)
    assert loss.item() == pytest.approx(2 / 8)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient[0, 1:3].tolist() == [0, 0]
    assert feature_loss(student, torch.zeros(1, 4)).isfinite()


@pytest.mark.parametrize("broken", ["depth", "points", "world_to_camera", "intrinsics", "camera"])
def test_a_teacher_that_knows_nothing_is_not_met(broken: str) -> None:
    nothing = dataclasses.replace(scene(), **{broken: torch.full_like(getattr(scene(), broken), torch.nan)})
    assert torch.stack(list(prediction_losses(nothing, nothing).values())).sum().isnan()
    features = torch.full((B, H, W), torch.nan)
    assert feature_loss(features, features).isnan()


def test_a_loss_keeps_nothing_but_features_for_the_backward_pass() -> None:
    student, teacher = torch.randn(2, 5000, 8, dtype=torch.bfloat16, requires_grad=True), torch.randn(2, 5000, 8, dtype=torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = sum(feature_loss(student, teacher, kind) for kind in ("normalized", "mse", "cosine"))
    assert {x.dtype for x in kept if x.numel() >= student.numel()} <= {torch.bfloat16}
    loss.backward()
    assert student.grad is not None


def test_prediction_losses_are_their_formulas() -> None:
    teacher = scene()
    student = near(teacher)
    losses = {name: loss.item() for name, loss in prediction_losses(student, teacher).items()}
    s, t = ({f.name: getattr(x, f.name) for f in dataclasses.fields(x)} for x in (student, teacher))
    s, t = ({k: v.detach().double().numpy() for k, v in x.items() if isinstance(v, Tensor)} for x in (s, t))
    size = t["depth"].mean((1, 2, 3))  # [B]
    signed = lambda x: np.sign(x) * np.log1p(np.abs(x))  # noqa: E731
    unit = size[:, None, None, None, None]
    turn = s["world_to_camera"][..., :3] - t["world_to_camera"][..., :3]
    shift = (s["world_to_camera"] - t["world_to_camera"])[..., 3] / size[:, None, None]
    focal = np.log(s["intrinsics"] / np.where(t["intrinsics"] == 0, np.nan, t["intrinsics"]))
    other = [
        (a.detach() - b).square().sum((1, 2, 3)) / b.square().sum((1, 2, 3)) for a, b in zip(student.other, teacher.other, strict=True)
    ]
    expected = {
        "depth": np.abs(np.log(s["depth"] / t["depth"])).mean(),
        "points": np.abs(signed(s["points"] / unit) - signed(t["points"] / unit)).sum(-1).mean(),
        "rotation": np.sqrt(np.square(turn).sum((-1, -2))).mean(),
        "translation": np.linalg.norm(shift, axis=-1).mean(),
        "focal": np.abs(np.stack((focal[..., 0, 0], focal[..., 1, 1]))).mean(),
        "camera": np.abs(s["camera"] - t["camera"]).mean(),
        "other": torch.stack(other).mean().item(),
    }
    assert losses == pytest.approx(expected, rel=1e-4)
    sum(prediction_losses(student, teacher).values()).backward()
    for field in dataclasses.fields(student):
        for tensor in x if isinstance(x := getattr(student, field.name), tuple) else (x,):
            assert tensor.grad is not None
            assert tensor.grad.isfinite().all()
            assert tensor.grad.abs().max() > 0
    assert all(loss == 0 for loss in prediction_losses(teacher, teacher).values())


def test_what_only_one_of_them_has_is_left_out() -> None:
    teacher = scene()
    only = ModelOutputs(depth=teacher.depth, world_to_camera=teacher.world_to_camera)
    assert set(prediction_losses(only, teacher.__class__(**{**vars(teacher), "other": ()}))) == {"depth", "rotation", "translation"}
    with pytest.raises(AdapterError, match="nothing in common"):
        prediction_losses(ModelOutputs(depth=teacher.depth), ModelOutputs(camera=teacher.camera))
    with pytest.raises(AdapterError, match="1 tensors of the student, 0"):
        prediction_losses(teacher, ModelOutputs(depth=teacher.depth))
    with pytest.raises(AdapterError, match="depth of the model"):
        prediction_losses(ModelOutputs(depth=teacher.depth[:, :2]), ModelOutputs(depth=teacher.depth))


def test_scales_of_scenes() -> None:
    full = scene()
    assert torch.equal(scene_scale(full), full.depth.flatten(1).mean(1))
    spread = full.points.flatten(1, 3)
    spread = (spread - spread.mean(1, keepdim=True)).norm(dim=-1).mean(1)
    torch.testing.assert_close(scene_scale(ModelOutputs(points=full.points)), spread)
    assert scene_scale(ModelOutputs(world_to_camera=full.world_to_camera)).shape == (B,)
    assert scene_scale(ModelOutputs(camera=full.camera)).tolist() == 1
    assert scene_scale(ModelOutputs(depth=torch.zeros(B, S, H, W))).tolist() == [1, 1]


def test_labels_may_be_of_another_world_and_unit() -> None:
    predicted = scene()
    labels = moved(predicted, torch.tensor([0.3, 20.0]))
    for given in (labels, dataclasses.replace(labels, points=None), dataclasses.replace(labels, depth=None), dataclasses.replace(
        labels, depth=None, points=None
    )):  # fmt: skip
        losses = label_losses(predicted, given)
        assert {"rotation", "translation", "focal"} <= losses.keys()
        assert all(loss < 1e-4 for loss in losses.values()), losses
    assert "points" in label_losses(predicted, dataclasses.replace(labels, points=None))  # made from depth and cameras


def test_no_gradient_goes_through_the_scale() -> None:
    """A change of unit of the whole prediction leaves the loss as it is; one of depth alone does not leave poses and points so."""
    predicted, labels = scene(), moved(scene(), torch.ones(B))
    losses = label_losses(predicted, labels)
    larger = moved(predicted, torch.full((B,), 3.0))
    for name, loss in label_losses(larger, labels).items():
        assert loss.item() == pytest.approx(losses[name].item(), rel=1e-3)
    stretched = dataclasses.replace(predicted, depth=2 * predicted.depth)
    assert label_losses(stretched, labels)["depth"].item() == pytest.approx(losses["depth"].item(), rel=1e-4)
    assert label_losses(stretched, labels)["translation"] != losses["translation"]


def test_unknown_labels_do_not_count() -> None:
    predicted = near(scene())
    known = moved(scene(), torch.ones(B))
    unknown = dataclasses.replace(known, **{name: getattr(known, name).clone() for name in ("depth", "points", "world_to_camera")})
    unknown.depth[:, 0], unknown.depth[0, 1, 0, 0], unknown.depth[0, 1, 1, 1] = 0, torch.nan, torch.inf
    unknown.points[:, 1] = torch.nan
    unknown.world_to_camera[:, 2] = torch.nan
    losses = label_losses(predicted, unknown)
    total = sum(losses.values())
    total.backward()
    assert total.isfinite()
    for value in (predicted.depth, predicted.points, predicted.world_to_camera):
        assert value.grad.isfinite().all()
    assert (predicted.depth.grad[:, 0] == 0).all()
    assert (predicted.points.grad[:, 1] == 0).all()
    assert (predicted.world_to_camera.grad[:, 2] == 0).all()
    expected = relative_to_first(predicted.world_to_camera)[:, :2] - relative_to_first(known.world_to_camera)[:, :2]
    assert losses["rotation"].item() == pytest.approx(expected[..., :3].flatten(-2).norm(dim=-1).mean().item(), rel=1e-4)


def test_labels_without_anything_valid_or_predicted() -> None:
    predicted = scene()
    with pytest.raises(InputError, match="no label is valid"):
        label_losses(predicted, ModelOutputs(depth=torch.zeros(B, S, H, W)))
    with pytest.raises(InputError, match="nothing that the model predicts"):
        label_losses(ModelOutputs(camera=predicted.camera), ModelOutputs(depth=predicted.depth))
    with pytest.raises(AdapterError, match="depth of the model is"):
        label_losses(predicted, ModelOutputs(depth=torch.ones(B, S, H, W + 1)))
    only_points = ModelOutputs(depth=torch.zeros(B, S, H, W), points=predicted.points, world_to_camera=predicted.world_to_camera)
    assert label_losses(predicted, only_points)["points"] < 1e-5
    one = ModelOutputs(depth=torch.stack((predicted.depth[0], torch.zeros(S, H, W))))  # the other scene is not labelled
    assert label_losses(predicted, one)["depth"] < 1e-6


def test_outputs_of_which_nobody_says_what_they_mean() -> None:
    def made(x: float, found: int = 5) -> dict[str, Tensor]:
        output = {"a": torch.full((2, 3), 1 + x), "b": [torch.full((4,), 2 + x), torch.arange(3)], "c": torch.ones(found)}
        read = OutputReader(None).read(output)
        assert isinstance(read, dict)
        return read

    assert list(tensor_losses(made(0.5), made(0.0))) == ["other"]
    assert tensor_losses(made(0.5), made(0.0))["other"].item() == pytest.approx((0.25 + 0.0625 + 0) / 3)
    for found in (4, 0):
        assert tensor_losses(made(0.5, found), made(0.0))["other"].item() == pytest.approx((0.25 + 0.0625) / 2)
    assert tensor_losses(made(0.5, 0), made(0.0, 0))["other"].item() == pytest.approx((0.25 + 0.0625) / 2), "tracks of no points"
    with pytest.raises(AdapterError, match="not made alike"):
        tensor_losses(made(0), {"a": torch.ones(2, 3)})
    with pytest.raises(AdapterError, match="no floating-point tensor"):
        tensor_losses({}, {})
    with pytest.raises(AdapterError, match="no floating-point tensor"):
        tensor_losses({"": torch.ones(2)}, {"": torch.ones(3)})


def test_weights() -> None:
    assert weight_at(0.3, 0.3, 0.7) == pytest.approx(0.3)
    assert [weight_at(0.1, 0.01, share) for share in (0, 0.5, 1, 2)] == pytest.approx([0.1, 0.055, 0.01, 0.01])
