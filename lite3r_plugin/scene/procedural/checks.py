"""Measures on rendered (or real) samples: is the geometry consistent, and how much do views share?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reprojection_check(s: dict[str, Tensor], tolerance: float = 0.02) -> Tensor:
    """Warp each view j > 0 into view 0 with depth and cameras.

    Args:
        s: A sample of `ProcScenes`, or real data with the same keys rgb, depth, valid, K and w2c.
        tolerance: Relative difference of depth up to which a point counts as seen.

    Returns:
        ``[B * (V - 1), 3]``: share of covisible pixels, their median photometric difference, and the mean difference
        without warping.
    """
    B, V, H, W = s["depth"].shape
    K, E = s["K"], s["w2c"]
    vv, uu = torch.meshgrid(*(torch.arange(size, device=K.device).to(K) + 0.5 for size in (H, W)), indexing="ij")
    pixels = torch.stack([uu, vv, torch.ones_like(uu)], -1)
    rows = []
    for b in range(B):
        camera = pixels @ torch.linalg.inv(K[b, 0]).T * s["depth"][b, 0][..., None]
        world = (camera - E[b, 0, :, 3]) @ E[b, 0, :, :3]
        for j in range(1, V):
            other = world @ E[b, j, :, :3].T + E[b, j, :, 3]
            q = other @ K[b, j].T
            uv = q[..., :2] / q[..., 2:].clamp(min=1e-6)
            grid = torch.stack([uv[..., 0] / W * 2 - 1, uv[..., 1] / H * 2 - 1], -1)[None]
            depth = F.grid_sample(s["depth"][b, j][None, None], grid, align_corners=False, mode="nearest")[0, 0]
            rgb = F.grid_sample(s["rgb"][b, j][None], grid, align_corners=False)[0]
            seen = (grid.abs() < 1).all(-1)[0] & (other[..., 2] > 0) & s["valid"][b, 0]
            seen &= (depth - other[..., 2]).abs() / other[..., 2] < tolerance
            error = (rgb - s["rgb"][b, 0]).abs().mean(0)[seen]
            unwarped = (s["rgb"][b, j] - s["rgb"][b, 0]).abs().mean()
            rows.append((seen.float().mean().item(), error.median().item() if seen.any() else float("nan"), unwarped.item()))
    return torch.tensor(rows, device="cpu")


@torch.no_grad()
def covisibility(s: dict[str, Tensor], step: int = 8, tolerance: float = 0.03) -> Tensor:
    """Share of view i's valid pixels that view j sees, ``[B, V, V]``, from every `step`-th pixel."""
    B, V, H, W = s["depth"].shape
    device = s["depth"].device
    rows, columns = torch.arange(step // 2, H, step, device=device), torch.arange(step // 2, W, step, device=device)
    vv, uu = torch.meshgrid(rows, columns, indexing="ij")
    z = s["depth"][:, :, vv, uu].reshape(B, V, -1)
    valid = s["valid"][:, :, vv, uu].reshape(B, V, -1)
    pixels = torch.stack([uu.reshape(-1) + 0.5, vv.reshape(-1) + 0.5, torch.ones_like(uu.reshape(-1))], -1).to(z)
    R, t = s["w2c"][..., :3], s["w2c"][..., 3]
    camera = torch.einsum("bvij,nj->bvni", torch.linalg.inv(s["K"]), pixels) * z[..., None]
    world = torch.einsum("bvji,bvnj->bvni", R, camera - t[:, :, None])  # R^T (x - t)
    other = torch.einsum("bjkl,binl->bijnk", R, world) + t[:, None, :, None]
    q = torch.einsum("bjkl,bijnl->bijnk", s["K"], other)
    uv = (q[..., :2] / q[..., 2:].clamp(min=1e-6)).floor().long()
    inside = (uv[..., 0] >= 0) & (uv[..., 0] < W) & (uv[..., 1] >= 0) & (uv[..., 1] < H) & (other[..., 2] > 0)
    index = uv[..., 1].clamp(0, H - 1) * W + uv[..., 0].clamp(0, W - 1)
    depth = s["depth"].reshape(B, 1, V, H * W).expand(B, V, V, H * W).gather(-1, index)
    seen = inside & valid[:, :, None] & ((depth - other[..., 2]).abs() < tolerance * other[..., 2])
    return seen.float().sum(-1) / valid.sum(-1).clamp(min=1)[:, :, None]
