"""Training losses of the testbed: depth, points, cameras, and correspondence of tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..scene.geometry import unproject
from .cameras import fov_of, relative_to_first
from .model import Testbed

Batch = dict[str, Tensor]


class TrainingModel(nn.Module):
    """A `Testbed` with its losses, and with the heads of the correspondence loss, which only training needs.

    The targets are in the first view's frame, in units of the mean distance of the scene's points from it, as in VGGT.
    """

    def __init__(self, model: Testbed, feature_dim: int = 128) -> None:
        super().__init__()
        self.model = model
        depth = model.config.depth
        self.taps = sorted({depth // 3, max(depth - 2, 0)})
        self.matchers = nn.ModuleList(nn.Linear(2 * model.config.dim, feature_dim) for _ in self.taps)
        self.log_scale = nn.Parameter(torch.full((len(self.taps),), 2.3))

    def forward(self, batch: Batch, match_weight: float, camera_weight: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss, and its parts detached.

        Args:
            batch: A sample of `lite3r_plugin.scene.procedural.ProcScenes`.
            match_weight: Weight of the correspondence loss.
            camera_weight: Weight of the losses of rotation and translation, against the first view and between all pairs.
        """
        outputs, fine = self.model.aggregator(batch["rgb"])
        predicted = self.model.decode(outputs, fine)
        with torch.autocast(batch["rgb"].device.type, enabled=False):
            losses = self.losses(predicted, [outputs[tap] for tap in self.taps], batch)
        camera = losses["rotation"] + losses["translation"] + 0.5 * (losses["pair_rotation"] + losses["pair_translation"])
        total = losses["depth"] + losses["points"] + losses["fov"] + 0.1 * losses["confidence"]
        total = total + camera_weight * camera + match_weight * losses["match"]
        return total, {"total": total.detach()} | {name: value.detach() for name, value in losses.items()}

    def losses(self, predicted: dict[str, Tensor], tapped: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        """All parts of the loss, unweighted; a function of tensors alone, which a trainer may compile."""
        start, patch = self.model.aggregator.patch_start_idx, self.model.aggregator.patch_size
        grid = (batch["rgb"].shape[-2] // patch, batch["rgb"].shape[-1] // patch)
        index, weight = correspondences(batch, patch)
        match = [
            match_loss(matcher(tokens[:, :, start:].float()), grid, index, weight, log_scale)
            for tokens, matcher, log_scale in zip(tapped, self.matchers, self.log_scale, strict=True)
        ]
        return supervised_losses(predicted, batch) | {"match": torch.stack(match).mean()}


def supervised_losses(predicted: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Losses of `Testbed.forward`'s result against the sample it was computed from.

    Depth and points are compared by the L1 norm of their logarithms, rotations by the Frobenius norm, and the confidence of a
    pixel is fitted to its error, which it does not change. Translations between pairs of views are compared in units of their
    distance, because angles between views are what counts (as in Pi3, arXiv 2507.13347, which has no reference view at all).
    """
    height, width = batch["depth"].shape[-2:]
    pose = relative_to_first(batch["w2c"])
    ok = batch["ok"] & batch["ok"][:, :1]
    valid = batch["valid"] & ok[..., None, None]
    points = torch.where(valid[..., None], unproject(batch["depth"], pose, batch["K"]), 0)
    count = valid.sum((1, 2, 3)).clamp(min=1)
    scale = (points.norm(dim=-1).sum((1, 2, 3)) / count).clamp(min=1e-2)
    depth = torch.where(valid, batch["depth"] / scale[:, None, None, None], 1).clamp(min=1e-4)
    points = points / scale[:, None, None, None, None]

    depth_error = (predicted["depth"].log() - depth.log()).abs()
    point_error = (signed_log1p(predicted["points"]) - signed_log1p(points)).abs().sum(-1)
    confidence = _nll(predicted["depth_conf"], depth_error) + _nll(predicted["points_conf"], point_error)
    target = torch.cat((pose[..., :3], pose[..., 3:] / scale[:, None, None, None]), -1)
    turn, shift = (predicted["world_to_camera"] - target).split((3, 1), -1)
    pair_turn, pair_shift, pairs = _pair_errors(predicted["world_to_camera"], target, ok)
    fov = predicted["pose_enc"][..., 7:] - fov_of(batch["K"], height, width)
    return {
        "depth": _mean(depth_error, valid),
        "points": _mean(point_error, valid),
        "confidence": _mean(confidence, valid),
        "rotation": _mean((turn.square().sum((-1, -2)) + 1e-6).sqrt(), ok),
        "translation": _mean((shift.square().sum((-1, -2)) + 1e-6).sqrt(), ok),
        "pair_rotation": _mean(pair_turn, pairs),
        "pair_translation": _mean(pair_shift, pairs),
        "fov": _mean(fov.abs().sum(-1), ok),
    }


def _pair_errors(predicted: Tensor, target: Tensor, ok: Tensor, nearest: float = 0.05) -> tuple[Tensor, Tensor, Tensor]:
    """Errors of rotation and of translation over its length, and which pairs count, each ``[B, S, S]``."""

    def relative(pose: Tensor) -> tuple[Tensor, Tensor]:
        rotation, translation = pose[..., :3], pose[..., 3]
        turn = torch.einsum("bjkl,biml->bijkm", rotation, rotation)
        return turn, translation[:, None] - torch.einsum("bijkm,bim->bijk", turn, translation)

    (turn, shift), (true_turn, true_shift) = relative(predicted), relative(target)
    distance = true_shift.norm(dim=-1)
    pairs = ok[:, :, None] & ok[:, None] & (distance > nearest)
    turn_error = ((turn - true_turn).square().sum((-1, -2)) + 1e-6).sqrt()
    shift_error = ((shift - true_shift).square().sum(-1) + 1e-6).sqrt() / distance.clamp(min=nearest)
    return turn_error, shift_error, pairs


@torch.no_grad()
def correspondences(batch: Batch, patch: int, max_queries: int = 256, tolerance: float = 0.03) -> tuple[Tensor, Tensor]:
    """Where the centres of the patches of each view are seen in each other view.

    Args:
        batch: The sample.
        patch: Patch size in pixels.
        max_queries: With more patches a view, every second row and column is used.
        tolerance: Relative difference of depth above which a point counts as hidden.

    Returns:
        Patches of the other view ``[B, S, n, S, 4]`` around each query, and their bilinear weights, which are zero where the
        point is not seen and within the same view.
    """
    _, views, height, width = batch["depth"].shape
    rows, columns = height // patch, width // patch
    step = 1 if rows * columns <= max_queries else 2
    offset = patch // 2
    z = batch["depth"][:, :, offset :: patch * step, offset :: patch * step]
    grid_v = torch.arange(offset, height, patch * step, device=z.device) + 0.5
    grid_u = torch.arange(offset, width, patch * step, device=z.device) + 0.5
    v, u = torch.meshgrid(grid_v, grid_u, indexing="ij")
    K, pose = batch["K"], batch["w2c"]
    x = (u - K[..., 0, 2, None, None]) / K[..., 0, 0, None, None]
    y = (v - K[..., 1, 2, None, None]) / K[..., 1, 1, None, None]
    camera = (torch.stack((x, y, torch.ones_like(x)), -1) * z[..., None]).flatten(2, 3)  # [B, S, n, 3]
    world = (camera - pose[:, :, None, :, 3]) @ pose[..., :3]
    other = torch.einsum("bjkl,binl->binjk", pose[..., :3], world) + pose[:, None, None, :, :, 3]
    depth = other[..., 2].clamp(min=1e-3)
    K = K[:, None, None]
    px = other[..., 0] / depth * K[..., 0, 0] + K[..., 0, 2]
    py = other[..., 1] / depth * K[..., 1, 1] + K[..., 1, 2]
    inside = (px > 0) & (px < width) & (py > 0) & (py < height) & (other[..., 2] > 1e-3)
    px, py = torch.where(inside, px, 0.5), torch.where(inside, py, 0.5)

    pixel = py.long().clamp(0, height - 1) * width + px.long().clamp(0, width - 1)  # [B, S, n, S]
    of_view = torch.arange(views, device=z.device)
    flat = pixel + of_view * height * width
    seen_depth = batch["depth"].flatten(1).gather(1, flat.flatten(1)).view_as(flat)
    seen_valid = batch["valid"].flatten(1).gather(1, flat.flatten(1)).view_as(flat)
    valid = batch["valid"][:, :, offset :: patch * step, offset :: patch * step].flatten(2)[..., None]
    seen = inside & seen_valid & valid & ((seen_depth - depth).abs() < tolerance * depth)
    seen &= of_view[:, None, None] != of_view

    fx, fy = px / patch - 0.5, py / patch - 0.5
    left, top = fx.floor(), fy.floor()
    index, weight = [], []
    for dy in (0, 1):
        for dx in (0, 1):
            column, row = (left + dx).clamp(0, columns - 1), (top + dy).clamp(0, rows - 1)
            index.append((row * columns + column).long())
            weight.append((1 - (fx - left - dx).abs()) * (1 - (fy - top - dy).abs()))
    return torch.stack(index, -1), torch.stack(weight, -1) * seen[..., None]


def match_loss(features: Tensor, grid: tuple[int, int], index: Tensor, weight: Tensor, log_scale: Tensor) -> Tensor:
    """InfoNCE of each query against all patches of each other view, with the `correspondences` as targets.

    features: ``[B, S, patches, F]``; grid: rows and columns of patches; index, weight: ``[B, S, n, S, 4]``; log_scale:
    logarithm of the inverse temperature.
    """
    features = F.normalize(features, dim=-1)
    asked = features
    if index.shape[2] < features.shape[2]:
        asked = features.unflatten(2, grid)[:, :, ::2, ::2].flatten(2, 3)  # every second row and column
    logits = torch.einsum("binf,bjpf->binjp", asked, features) * log_scale.clamp(max=4.6).exp()
    log_probability = logits.log_softmax(-1).gather(-1, index)
    return -(log_probability * weight).sum() / weight.sum().clamp(min=1)


def signed_log1p(x: Tensor) -> Tensor:
    """``sign(x) * log(1 + |x|)``, the inverse of `model.signed_expm1`."""
    return x.sign() * x.abs().log1p()


def _mean(value: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, value, 0).sum() / mask.sum().clamp(min=1)


def _nll(confidence: Tensor, error: Tensor, regularity: float = 0.2) -> Tensor:
    return confidence * error.detach() - regularity * confidence.log()
