"""Textures with mip pyramids, and a bank of procedural ones: fractal noise, dead leaves, bricks, wood, Voronoi cells."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError


def _periodic_noise(n: int, size: int, cells: int, g: torch.Generator, device: torch.device | str) -> Tensor:
    """Tileable value noise [n,size,size] in [0,1], smoothstep-interpolated from a cells x cells lattice."""
    lat = torch.rand(n, 1, cells, cells, generator=g, device=device)
    x = torch.arange(size, device=device) / size * cells
    i = x.floor().long()
    f = x - i
    f = f * f * (3 - 2 * f)
    i0, i1 = i % cells, (i + 1) % cells
    a = lat[:, 0][:, i0][:, :, i0]
    b = lat[:, 0][:, i0][:, :, i1]
    c = lat[:, 0][:, i1][:, :, i0]
    d = lat[:, 0][:, i1][:, :, i1]
    fx, fy = f[None, None, :], f[None, :, None]
    return (a * (1 - fx) + b * fx) * (1 - fy) + (c * (1 - fx) + d * fx) * fy


def fractal(
    n: int, size: int, g: torch.Generator, device: torch.device | str, base: int = 2, octaves: int = 6, gain: float = 0.55
) -> Tensor:
    """Tileable fractal noise ``[n, size, size]`` in [0, 1]: octaves of `_periodic_noise`."""
    out, amp, tot = torch.zeros(n, size, size, device=device), 1.0, 0.0
    for o in range(octaves):
        cells = base * 2**o
        if cells > size // 2:
            break
        out = out + amp * _periodic_noise(n, size, cells, g, device)
        tot += amp
        amp *= gain
    return out / tot


def uniform(shape: tuple[int, ...], g: torch.Generator, device: torch.device | str, lo: float = 0.0, hi: float = 1.0) -> Tensor:
    """Uniform numbers in [lo, hi)."""
    return torch.rand(shape, generator=g, device=device) * (hi - lo) + lo


class TextureBank:
    """All textures with their mip pyramids in one flat buffer ``[T * texels, 3]`` (FP16 on a GPU).

    Args:
        tex: ``[T, 3, S, S]`` in [0, 1], S a power of two. Photographs may be among them.

    Raises:
        InputError: the textures have another shape.
    """

    def __init__(self, tex: Tensor) -> None:
        if tex.dim() != 4 or tex.shape[1] != 3 or tex.shape[2] != tex.shape[3] or tex.shape[3] & (tex.shape[3] - 1):
            raise InputError(f"textures are [T, 3, S, S] with S a power of two, got {list(tex.shape)}")
        T, _, _, S = tex.shape
        levels, offs, sizes, cur, off = [], [], [], tex.float(), 0
        while True:
            s = cur.shape[-1]
            levels.append(cur.permute(0, 2, 3, 1).reshape(T, s * s, 3))
            offs.append(off)
            sizes.append(s)
            off += s * s
            if s == 1:
                break
            cur = F.avg_pool2d(cur, 2)
        self.T, self.S, self.n_levels, self.stride = T, S, len(levels), off
        self.flat = torch.cat(levels, 1).reshape(T * off, 3).contiguous()
        if tex.is_cuda:
            self.flat = self.flat.half()
        self.offs = torch.tensor(offs, device=tex.device)
        self.sizes = torch.tensor(sizes, device=tex.device)

    def sample(self, tid: Tensor, u: Tensor, v: Tensor, lod: Tensor) -> Tensor:
        """Trilinear, wrapped look-up. tid: textures ``[N]``; u, v: ``[N]`` in repeats; lod: mip level ``[N]``. Returns ``[N, 3]``."""
        lod = lod.clamp(0, self.n_levels - 1.001)
        l0 = lod.floor().long()
        w = (lod - l0).unsqueeze(-1)
        return self._bilinear(tid, u, v, l0) * (1 - w) + self._bilinear(tid, u, v, l0 + 1) * w

    def _bilinear(self, tid: Tensor, u: Tensor, v: Tensor, lev: Tensor) -> Tensor:
        s = self.sizes[lev]
        base = tid * self.stride + self.offs[lev]
        sf = s.to(u.dtype)
        x = (u - u.floor()) * sf - 0.5
        y = (v - v.floor()) * sf - 0.5
        x0, y0 = x.floor(), y.floor()
        fx, fy = (x - x0).unsqueeze(-1), (y - y0).unsqueeze(-1)
        x0, y0 = x0.long() % s, y0.long() % s
        x1, y1 = (x0 + 1) % s, (y0 + 1) % s

        def texel(row: Tensor, column: Tensor) -> Tensor:
            return self.flat[base + row * s + column].float()

        above = texel(y0, x0) * (1 - fx) + texel(y0, x1) * fx
        below = texel(y1, x0) * (1 - fx) + texel(y1, x1) * fx
        return above * (1 - fy) + below * fy

    @staticmethod
    def procedural_images(n: int = 256, size: int = 128, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
        """Tileable textures ``[n, 3, size, size]`` in [0, 1], of six kinds in turn."""
        g = torch.Generator(device=device).manual_seed(seed)
        S = size
        yy, xx = torch.meshgrid(torch.arange(S, device=device) / S, torch.arange(S, device=device) / S, indexing="ij")
        kind = torch.arange(n, device=device) % 6
        # base: fractal noise through a random 5-colour palette
        f = fractal(n, S, g, device, base=2)
        f = (f - f.amin((1, 2), True)) / (f.amax((1, 2), True) - f.amin((1, 2), True))
        # palettes: one base hue per texture with small deviations, mostly muted (natural images are)
        hue = uniform((n, 1, 3), g, device)
        pal = (0.5 * hue + 0.5 * uniform((n, 5, 3), g, device)) * uniform((n, 5, 1), g, device, 0.25, 1.25)
        sat = uniform((n, 1, 1), g, device) ** 1.7
        pal = (pal.mean(-1, True) * (1 - sat) + pal * sat).clamp(0, 1)
        z = (f * uniform((n, 1, 1), g, device, 1.0, 2.5)) % 1.0 * 3.999
        k = z.long()
        fr = (z - k).unsqueeze(-1)
        bi = torch.arange(n, device=device)[:, None, None]
        img = pal[bi, k] * (1 - fr) + pal[bi, k + 1] * fr  # [n,S,S,3]
        # kind 1,5: dead leaves (discs and rectangles, power-law radius), tileable
        leaves = (kind == 1) | (kind == 5)
        m = int(leaves.sum())
        if m:
            li = img[leaves].clone()
            rough = fractal(m, S, g, device, base=4)[..., None]
            lsat = sat[leaves][..., None]
            for _ in range(220):
                r = 0.02 * (uniform((m, 1, 1), g, device, 0.02, 1.0) ** -0.55)
                cx, cy = uniform((m, 1, 1), g, device), uniform((m, 1, 1), g, device)
                dx = (xx[None] - cx + 0.5) % 1.0 - 0.5
                dy = (yy[None] - cy + 0.5) % 1.0 - 0.5
                asp = uniform((m, 1, 1), g, device, 0.4, 1.6)
                isrect = uniform((m, 1, 1), g, device) < 0.4
                inside = torch.where(isrect, torch.maximum(dx.abs() * asp, dy.abs()) < r, (dx * asp) ** 2 + dy**2 < r * r)[..., None]
                lc = uniform((m, 1, 1, 3), g, device)
                col = (lc.mean(-1, True) * (1 - lsat) + lc * lsat) * (0.6 + 0.8 * rough)
                li = torch.where(inside, col.clamp(0, 1), li)
            img[leaves] = li
        # kind 2: bricks / tiles with mortar
        br = kind == 2
        m = int(br.sum())
        if m:
            ny = torch.randint(2, 9, (m, 1, 1), generator=g, device=device).float()
            nx = torch.randint(1, 6, (m, 1, 1), generator=g, device=device).float() * 2
            row = (yy[None] * ny).floor()
            xs = xx[None] * nx + 0.5 * (row % 2) * (uniform((m, 1, 1), g, device) < 0.7)
            col_i = xs.floor() % nx
            fx, fy = xs - xs.floor(), yy[None] * ny - row
            mort = (fx < 0.06) | (fy < 0.10)
            h = torch.sin(row * 12.9898 + col_i * 78.233 + torch.arange(m, device=device)[:, None, None]) * 43758.5453
            h = h - h.floor()
            c0, c1 = pal[br][:, 0][:, None, None], pal[br][:, 1][:, None, None]
            base = (c0 * (1 - h[..., None]) + c1 * h[..., None]) * (0.55 + 0.9 * f[br][..., None])
            img[br] = torch.where(mort[..., None], pal[br][:, 2][:, None, None] * (0.7 + 0.6 * f[br][..., None]), base)
        # kind 3: wood / stripes with warped phase
        wd = kind == 3
        m = int(wd.sum())
        if m:
            fq = torch.randint(2, 14, (m, 1, 1), generator=g, device=device).float()
            ph = torch.where(uniform((m, 1, 1), g, device) < 0.5, xx[None], yy[None]) * fq + uniform((m, 1, 1), g, device, 0.2, 2.5) * f[wd]
            s = 0.5 + 0.5 * torch.sin(2 * math.pi * ph)
            hard = uniform((m, 1, 1), g, device) < 0.35
            s = torch.where(hard, (s > 0.5).float(), s)[..., None]
            img[wd] = (pal[wd][:, 0][:, None, None] * (1 - s) + pal[wd][:, 1][:, None, None] * s) * (0.75 + 0.5 * f[wd][..., None])
        # kind 4: Voronoi cells
        vo = kind == 4
        m = int(vo.sum())
        if m:
            P = 40
            px, py = uniform((m, P), g, device), uniform((m, P), g, device)
            d1 = torch.full((m, S, S), 9.0, device=device)
            d2 = d1.clone()
            idx = torch.zeros(m, S, S, dtype=torch.long, device=device)
            for p in range(P):
                dx = (xx[None] - px[:, p, None, None] + 0.5) % 1.0 - 0.5
                dy = (yy[None] - py[:, p, None, None] + 0.5) % 1.0 - 0.5
                d = (dx * dx + dy * dy).sqrt()
                closer = d < d1
                d2 = torch.where(closer, d1, torch.minimum(d2, d))
                idx = torch.where(closer, torch.full_like(idx, p), idx)
                d1 = torch.where(closer, d, d1)
            cc = uniform((m, P, 3), g, device)
            cc = cc.mean(-1, True) * (1 - sat[vo]) + cc * sat[vo]
            col = cc[torch.arange(m, device=device)[:, None, None], idx] * (0.6 + 0.8 * f[vo][..., None])
            img[vo] = torch.where(((d2 - d1) < 0.02)[..., None], col * 0.25, col)
        # fine grain on everything, random contrast
        grain = fractal(n, S, g, device, base=16, octaves=3)[..., None] - 0.5
        img = img + grain * uniform((n, 1, 1, 1), g, device, 0.05, 0.5)
        mean = img.mean((1, 2), True)
        img = (img - mean) * uniform((n, 1, 1, 1), g, device, 0.8, 1.5) + mean
        return img.clamp(0.02, 1).permute(0, 3, 1, 2).contiguous()

    @classmethod
    def procedural(cls, n: int = 256, size: int = 128, device: torch.device | str = "cpu", seed: int = 0) -> TextureBank:
        """A bank of `procedural_images`."""
        return cls(cls.procedural_images(n, size, device, seed))
