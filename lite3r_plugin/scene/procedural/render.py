"""The renderer: batches of procedural scenes as images with exact depth and cameras."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import SceneSampler
from .textures import TextureBank
from .tracing import SceneTensors, shade, trace, unshadowed

ARCS = (0.35, 0.8, 1.6, 3.1, 6.28)


class ProcScenes:
    """Draws rooms and open ground full of boxes, ellipsoids and cylinders, and renders views of them.

    The same arguments, number of the call and device type give the same scenes.

    Args:
        bank: The textures.
        device: Where to render.
        seed: Seed of scenes, cameras and noise.
        groups: Pieces of furniture a scene, six boxes each.
        free, pictures, ellipsoids, cylinders: Numbers of single boxes, of pictures on the walls, and of round primitives.
        supersampling: Rays a pixel in each direction, for antialiasing.
        max_views_per_chunk: Views that are rendered together, which bounds the memory.
        augment: Random gain and white balance a view, and noise.
        compile: Compile what every ray does with every primitive: the casting of view rays and of shadow rays.
        arcs: Angles in radians, one of which each scene's cameras spread over.
    """

    def __init__(
        self,
        bank: TextureBank,
        device: torch.device | str = "cpu",
        seed: int = 0,
        *,
        groups: int = 4,
        free: int = 6,
        pictures: int = 6,
        ellipsoids: int = 5,
        cylinders: int = 5,
        supersampling: int = 1,
        max_views_per_chunk: int = 64,
        augment: bool = True,
        compile: bool = False,
        arcs: tuple[float, ...] = ARCS,
    ) -> None:
        self.bank, self.device, self.supersampling, self.augment = bank, torch.device(device), supersampling, augment
        self.sampler = SceneSampler(bank.T, self.device, seed, groups, free, pictures, ellipsoids, cylinders, arcs)
        self.max_views_per_chunk = max_views_per_chunk
        self._trace = torch.compile(trace, dynamic=False) if compile else trace
        self._unshadowed = torch.compile(unshadowed, dynamic=False) if compile else unshadowed

    @torch.no_grad()
    def __call__(self, B: int = 1, V: int = 4, H: int = 224, W: int = 224, want_points: bool = False) -> dict[str, Tensor]:
        """Render B new scenes, V views each.

        Returns a dict of
            rgb: ``[B, V, 3, H, W]`` in [0, 1]; depth: ``[B, V, H, W]`` along the optical axis, in metres;
            valid: ``[B, V, H, W]`` bool, False for the sky and in views whose camera is ``not ok``; ok: ``[B, V]``;
            normal: ``[B, V, 3, H, W]`` in the world; K: ``[B, V, 3, 3]`` in pixels, pixel centres at +0.5;
            w2c: ``[B, V, 3, 4]``, OpenCV; points: ``[B, V, H, W, 3]`` in the world, only if `want_points`.
        """
        scene = self.sampler.scene(B)
        cameras = self.sampler.cameras(scene, V, H, W)
        n = max(1, self.max_views_per_chunk // (V * self.supersampling**2))
        parts = [
            self._render({k: x[i : i + n] for k, x in scene.items()}, {k: x[i : i + n] for k, x in cameras.items()}, H, W)
            for i in range(0, B, n)
        ]
        rgb, depth, valid, normal = (torch.cat(x) for x in zip(*parts, strict=True))
        out = {"rgb": self._tone(rgb), "depth": depth, "valid": valid, "normal": normal}
        out |= {"K": cameras["K"], "w2c": cameras["w2c"], "ok": cameras["ok"]}
        if want_points:
            d = rays(cameras["R"], cameras["K"], H, W)
            out["points"] = (cameras["pos"][:, :, None] + d * depth.reshape(B, V, -1, 1)).reshape(B, V, H, W, 3)
        return out

    def _render(self, s: SceneTensors, cameras: SceneTensors, H: int, W: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        counts, ss = self.sampler.counts, self.supersampling
        o, f = cameras["pos"], cameras["K"][..., 0, 0]
        B, V = o.shape[:2]

        def cast(ss: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            d = rays(cameras["R"], cameras["K"], H, W, ss)
            t, k = self._trace(counts, s["c"], s["M"], s["on"], o, d)
            above_ground = o[:, :, None, 2] + d[..., 2] * t > 1e-2
            return d, t, k, s["outdoor"][:, None, None] & (k == counts.room) & above_ground

        d, t, k, sky = cast(ss)
        colour, n = shade(counts, self.bank, s, o, d, t, k, f * ss, self._unshadowed)
        elevation = F.normalize(d, dim=-1)[..., 2].clamp(0, 1)[..., None]
        horizon, zenith = torch.tensor([[0.75, 0.82, 0.9], [0.25, 0.45, 0.8]], device=d.device)
        colour = torch.where(sky[..., None], (horizon * (1 - elevation) + zenith * elevation) * 0.9, colour)
        rgb = colour.reshape(B, V, H * ss, W * ss, 3).permute(0, 1, 4, 2, 3)
        if ss > 1:
            rgb = F.avg_pool2d(rgb.flatten(0, 1), ss).reshape(B, V, 3, H, W)
            d, t, k, sky = cast(1)
            n = n.reshape(B, V, H, ss, W, ss, 3)[:, :, :, ss // 2, :, ss // 2]
        valid = (~sky).reshape(B, V, H, W) & cameras["ok"][:, :, None, None]
        normal = F.normalize(n.reshape(B, V, H, W, 3), dim=-1).permute(0, 1, 4, 2, 3)
        return rgb, t.reshape(B, V, H, W), valid, normal

    def _tone(self, rgb: Tensor) -> Tensor:
        """Exposure a scene, gain and white balance a view, a soft shoulder, display gamma and noise."""
        B, V = rgb.shape[:2]
        r = self.sampler.r
        x = rgb / rgb.mean((1, 2, 3, 4), True).clamp(min=1e-3) * 0.28
        if self.augment:
            x = x * torch.exp((r(B, V, 1, 1, 1) - 0.5) * 0.25) * (1 + (r(B, V, 3, 1, 1) - 0.5) * 0.06)
        x = (x / (1 + 0.35 * x)).clamp(0, 1) ** (1 / 2.2)
        if self.augment:
            x = x + torch.randn(x.shape, generator=self.sampler.g, device=x.device) * r(B, 1, 1, 1, 1, lo=0, hi=0.02)
        return x.clamp(0, 1)


def rays(R: Tensor, K: Tensor, H: int, W: int, supersampling: int = 1) -> Tensor:
    """World directions ``[B, V, H * W, 3]`` of all pixels, of length 1 along the optical axis.

    R: ``[B, V, 3, 3]`` world to camera; K: ``[B, V, 3, 3]``.
    """
    u = (torch.arange(W * supersampling, device=R.device) + 0.5) / supersampling
    v = (torch.arange(H * supersampling, device=R.device) + 0.5) / supersampling
    vv, uu = torch.meshgrid(v, u, indexing="ij")
    x = (uu.reshape(-1) - K[..., 0, 2, None]) / K[..., 0, 0, None]
    y = (vv.reshape(-1) - K[..., 1, 2, None]) / K[..., 1, 1, None]
    return torch.stack([x, y, torch.ones_like(x)], -1) @ R  # R^T d, as row vectors
