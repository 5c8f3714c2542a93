"""Held-out measures of a testbed model, with what a model that ignores the images would get."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..scene.metrics import auc, depth_metrics, pair_errors


@torch.no_grad()
def evaluate(model: nn.Module, sample: dict[str, Tensor], scenes_at_once: int = 8, autocast: bool = False) -> dict[str, float]:
    """Depth and pose errors over all scenes of `sample`.

    Args:
        model: A `Testbed`.
        sample: A sample of `lite3r_plugin.scene.procedural.ProcScenes` on the model's device.
        scenes_at_once: Batch size.
        autocast: Run in BF16.

    Returns:
        A dict of
            abs_rel, delta1: of depth, after one median scale a scene, means over scenes;
            rotation, translation: median errors over all pairs of views, in degrees (translation: of the direction);
            auc30, auc5: area under the curve of the larger of the two up to 30 and 5 degrees, in percent;
            mean_abs_rel, mean_rotation, mean_auc30: of constant depth and equal cameras.
    """
    was_training = model.training
    model.eval()
    rows: list[dict[str, Tensor]] = []
    for i in range(0, len(sample["rgb"]), scenes_at_once):
        part = {name: value[i : i + scenes_at_once] for name, value in sample.items()}
        with torch.autocast(part["rgb"].device.type, dtype=torch.bfloat16, enabled=autocast):
            predicted = model(part["rgb"])
        abs_rel, delta1 = depth_errors(predicted["depth"].float(), part["depth"], part["valid"])
        flat, _ = depth_errors(torch.ones_like(part["depth"]), part["depth"], part["valid"])
        rotation, translation = pose_errors(predicted["world_to_camera"].float(), part["w2c"], part["ok"])
        identity = torch.eye(3, 4, device=part["w2c"].device).expand_as(part["w2c"])
        still, aside = pose_errors(identity, part["w2c"], part["ok"])
        poses = {"rotation": rotation, "translation": translation, "still": still, "aside": aside}
        rows.append({"abs_rel": abs_rel, "delta1": delta1, "flat": flat, **poses})
    model.train(was_training)
    every = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    worse = torch.maximum(every["rotation"], every["translation"])
    return {
        "abs_rel": every["abs_rel"].mean().item(),
        "delta1": every["delta1"].mean().item(),
        "rotation": every["rotation"].median().item(),
        "translation": every["translation"].median().item(),
        "auc30": auc(worse, 30),
        "auc5": auc(worse, 5),
        "mean_abs_rel": every["flat"].mean().item(),
        "mean_rotation": every["still"].median().item(),
        "mean_auc30": auc(torch.maximum(every["still"], every["aside"]), 30),
    }


def depth_errors(predicted: Tensor, depth: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """AbsRel and share of pixels within 25 % of each scene that has valid pixels; depth maps are ``[B, S, H, W]``."""
    rows = [depth_metrics(*scene) for scene in zip(predicted, depth, valid, strict=True) if scene[2].any()]
    return torch.tensor([row.abs_rel for row in rows], device="cpu"), torch.tensor([row.delta1 for row in rows], device="cpu")


def pose_errors(predicted: Tensor, world_to_camera: Tensor, ok: Tensor) -> tuple[Tensor, Tensor]:
    """Errors in degrees of relative rotations and of directions of relative translations, over all pairs of views that are `ok`.

    Cameras are world to camera, ``[B, S, 3, 4]``; ok: ``[B, S]``. Returns two ``[pairs]``, of pairs that have a baseline. The
    direction of no motion is 90 degrees off.
    """
    scenes = zip(predicted, world_to_camera, ok, strict=True)
    pairs = [pair_errors(mine[mask], true[mask]) for mine, true, mask in scenes if mask.sum() > 1]
    if not pairs:
        return torch.zeros(0, device="cpu"), torch.zeros(0, device="cpu")
    return torch.cat([p.rotation[p.defined] for p in pairs]), torch.cat([p.translation[p.defined] for p in pairs])
