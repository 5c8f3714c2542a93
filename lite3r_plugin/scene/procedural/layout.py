"""What stands where in a procedural scene, and where the cameras are."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .textures import uniform
from .tracing import Primitives, SceneTensors, trace

# furniture templates in a unit footprint: rows of (cx,cy,cz, hx,hy,hz), z from 0 to ~1, 6 boxes each
_TEMPLATES = torch.tensor(
    [
        # table
        [
            [0, 0, 0.95, 1, 1, 0.05],
            [-0.9, -0.9, 0.45, 0.07, 0.07, 0.45],
            [0.9, -0.9, 0.45, 0.07, 0.07, 0.45],
            [-0.9, 0.9, 0.45, 0.07, 0.07, 0.45],
            [0.9, 0.9, 0.45, 0.07, 0.07, 0.45],
            [0.4, 0.2, 1.1, 0.3, 0.25, 0.1],
        ],
        # shelf
        [
            [-0.95, 0, 0.5, 0.05, 0.5, 0.5],
            [0.95, 0, 0.5, 0.05, 0.5, 0.5],
            [0, 0, 0.05, 1, 0.5, 0.04],
            [0, 0, 0.5, 1, 0.5, 0.04],
            [0, 0, 0.96, 1, 0.5, 0.04],
            [0, 0.47, 0.5, 1, 0.03, 0.5],
        ],
        # chair
        [
            [0, 0, 0.45, 0.5, 0.5, 0.05],
            [0, 0.46, 0.75, 0.5, 0.05, 0.3],
            [-0.43, -0.43, 0.2, 0.06, 0.06, 0.2],
            [0.43, -0.43, 0.2, 0.06, 0.06, 0.2],
            [-0.43, 0.43, 0.2, 0.06, 0.06, 0.2],
            [0.43, 0.43, 0.2, 0.06, 0.06, 0.2],
        ],
        # stairs
        [
            [-0.83, 0, 0.08, 0.17, 0.7, 0.08],
            [-0.5, 0, 0.16, 0.17, 0.7, 0.16],
            [-0.17, 0, 0.25, 0.17, 0.7, 0.25],
            [0.17, 0, 0.33, 0.17, 0.7, 0.33],
            [0.5, 0, 0.41, 0.17, 0.7, 0.41],
            [0.83, 0, 0.5, 0.17, 0.7, 0.5],
        ],
        # sofa
        [
            [0, 0, 0.2, 1, 0.5, 0.2],
            [0, 0.42, 0.45, 1, 0.1, 0.35],
            [-0.92, 0, 0.32, 0.1, 0.5, 0.28],
            [0.92, 0, 0.32, 0.1, 0.5, 0.28],
            [-0.4, -0.05, 0.45, 0.35, 0.35, 0.06],
            [0.4, -0.05, 0.45, 0.35, 0.35, 0.06],
        ],
        # stack
        [
            [0, 0, 0.15, 0.7, 0.6, 0.15],
            [0.1, 0.05, 0.4, 0.5, 0.5, 0.1],
            [-0.1, 0.1, 0.58, 0.4, 0.35, 0.08],
            [0.6, -0.6, 0.3, 0.2, 0.2, 0.3],
            [-0.7, 0.5, 0.45, 0.15, 0.15, 0.45],
            [0.05, 0, 0.72, 0.2, 0.25, 0.06],
        ],
    ],
    device="cpu",
)


def _rot_z(angle: Tensor) -> Tensor:
    """Rotations about the vertical axis, ``[...] -> [..., 3, 3]``."""
    c, s, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([c, -s, zero, s, c, zero, zero, zero, one], -1).unflatten(-1, (3, 3))


def _rand_rot(shape: tuple[int, ...], g: torch.Generator, device: torch.device) -> Tensor:
    """Uniform rotations ``[*shape, 3, 3]``."""
    q = torch.randn(*shape, 4, generator=g, device=device)
    w, x, y, z = F.normalize(q, dim=-1).unbind(-1)
    return torch.stack(
        [
            1 - 2 * (y * y + z * z),
            2 * (x * y - w * z),
            2 * (x * z + w * y),
            2 * (x * y + w * z),
            1 - 2 * (x * x + z * z),
            2 * (y * z - w * x),
            2 * (x * z - w * y),
            2 * (y * z + w * x),
            1 - 2 * (x * x + y * y),
        ],
        -1,
    ).reshape(*shape, 3, 3)


class SceneSampler:
    """Draws scenes and cameras from one random generator.

    Args:
        textures: Number of textures to choose from.
        device, seed: Of the generator.
        groups: Pieces of furniture, six boxes each.
        free, pictures, ellipsoids, cylinders: Numbers of single primitives.
        arcs: Angles in radians, one of which each scene's cameras spread over.
    """

    def __init__(
        self, textures: int, device: torch.device, seed: int, groups: int, free: int, pictures: int, ellipsoids: int, cylinders: int,
        arcs: tuple[float, ...],
    ) -> None:  # fmt: skip
        self.textures, self.device, self.arcs = textures, device, arcs
        self.fov = (42.0, 85.0)  # over the longer side, in degrees
        self.g = torch.Generator(device=device).manual_seed(seed)
        self.groups, self.free, self.pictures = groups, free, pictures
        self.counts = Primitives(groups * 6 + free + pictures, ellipsoids, cylinders)

    def r(self, *shape: int, lo: float = 0.0, hi: float = 1.0) -> Tensor:
        """Uniform numbers in [lo, hi)."""
        return uniform(shape, self.g, self.device, lo, hi)

    def scene(self, B: int) -> SceneTensors:
        """B scenes: centres ``c``, half sizes ``h``, rotations ``R`` (local to world), maps ``M`` (world to unit local), which exist
        (``on``), textures a face ``tex``, their repeats a metre ``rep``, offsets ``off``, ``tint``, specular weight ``spec``, lights
        ``lpos``, ``lcol``, ``amb``, and the cluster that cameras look at (``ctr``, ``rad``, ``table_h``). The room is the last box."""
        dev, g, r = self.device, self.g, self.r
        half = torch.stack([r(B, lo=1.8, hi=4.5), r(B, lo=1.8, hi=4.5), r(B, lo=1.15, hi=1.9)], -1)
        outdoor = r(B) < 0.2
        half = torch.where(outdoor[:, None], half * torch.tensor([8.0, 8.0, 10.0], device=dev), half)
        rad = torch.exp(r(B, lo=math.log(0.5), hi=math.log(1.6)))  # size of the interesting cluster
        ctr = torch.zeros(B, 3, device=dev)
        room_xy = half[:, :2].clamp(max=5.0)
        ctr[:, :2] = (r(B, 2) - 0.5) * 0.5 * room_xy
        table_h = torch.where(r(B) < 0.4, r(B, lo=0.4, hi=0.8), torch.zeros(B, device=dev))
        # furniture groups around the room / cluster
        G = self.groups
        tmpl = _TEMPLATES.to(dev)[torch.randint(0, len(_TEMPLATES), (B, G), generator=g, device=dev)]  # B,G,6,6
        gsz = torch.stack([r(B, G, lo=0.3, hi=0.9), r(B, G, lo=0.3, hi=0.9), r(B, G, lo=0.5, hi=1.6)], -1)
        gpos = torch.zeros(B, G, 3, device=dev)
        gpos[..., :2] = (r(B, G, 2) - 0.5) * 2 * (room_xy - 0.4)[:, None]
        yaw = torch.where(r(B, G) < 0.6, torch.randint(0, 4, (B, G), generator=g, device=dev) * (math.pi / 2), r(B, G) * 2 * math.pi)
        # group 0 is a table-like base under the cluster where table_h > 0
        is_tab = table_h > 0
        tmpl[:, 0] = torch.where(is_tab[:, None, None], _TEMPLATES[0].to(dev)[None], tmpl[:, 0])
        gpos[:, 0] = torch.where(is_tab[:, None], ctr, gpos[:, 0])
        gsz[:, 0] = torch.where(is_tab[:, None], torch.stack([rad * 0.8, rad * 0.8, table_h], -1), gsz[:, 0])
        Rg = _rot_z(yaw)
        lc = tmpl[..., :3] * gsz[:, :, None]
        c_g = (torch.einsum("bgij,bgkj->bgki", Rg, lc) + gpos[:, :, None]).reshape(B, G * 6, 3)
        h_g = (tmpl[..., 3:] * gsz[:, :, None]).reshape(B, G * 6, 3)
        R_g = Rg[:, :, None].expand(B, G, 6, 3, 3).reshape(B, G * 6, 3, 3)
        # free boxes, ellipsoids, cylinders inside the cluster, resting near the support height

        def cluster(n: int, tilt: float) -> tuple[Tensor, Tensor, Tensor]:
            """Centres, half sizes and rotations of n primitives a scene; a share `tilt` of them is turned freely."""
            h = torch.exp(r(B, n, 3, lo=math.log(0.05), hi=math.log(0.38))) * rad[:, None, None] * 0.8
            c = torch.empty(B, n, 3, device=dev)
            ang, rr = r(B, n) * 2 * math.pi, r(B, n).sqrt() * rad[:, None] * 0.75
            c[..., 0], c[..., 1] = ctr[:, None, 0] + rr * ang.cos(), ctr[:, None, 1] + rr * ang.sin()
            stacked = torch.where(r(B, n) < 0.3, r(B, n) * rad[:, None] * 0.7, torch.zeros(B, n, device=dev))
            c[..., 2] = table_h[:, None] + h[..., 2] + stacked
            R = _rot_z(r(B, n) * 2 * math.pi)
            full = _rand_rot((B, n), g, dev)
            R = torch.where((r(B, n) < tilt)[..., None, None], full, R)
            return c, h, R

        c_f, h_f, R_f = cluster(self.free, 0.3)
        c_e, h_e, R_e = cluster(self.counts.ellipsoids, 0.5)
        c_c, h_c, R_c = cluster(self.counts.cylinders, 0.3)
        h_c[..., 1] = h_c[..., 0]
        # thin picture boxes on the four walls
        n = self.pictures
        wall = torch.randint(0, 4, (B, n), generator=g, device=dev)
        ax, sgn = wall % 2, (wall // 2) * 2.0 - 1.0
        along = (r(B, n) - 0.5) * 1.5
        hx = half[:, None, 0].expand(B, n)
        hy = half[:, None, 1].expand(B, n)
        c_p = torch.empty(B, n, 3, device=dev)
        c_p[..., 0] = torch.where(ax == 0, sgn * hx, along * hx)
        c_p[..., 1] = torch.where(ax == 0, along * hy, sgn * hy)
        c_p[..., 2] = half[:, None, 2] * r(B, n, lo=0.5, hi=1.5)
        w, hh, th = r(B, n, lo=0.2, hi=0.8), r(B, n, lo=0.2, hi=0.7), r(B, n, lo=0.02, hi=0.12)
        h_p = torch.stack([torch.where(ax == 0, th, w), torch.where(ax == 0, w, th), hh], -1)
        R_p = torch.eye(3, device=dev).expand(B, n, 3, 3)

        c = torch.cat([c_g, c_f, c_p, c_e, c_c], 1)
        h = torch.cat([h_g, h_f, h_p, h_e, h_c], 1)
        R = torch.cat([R_g, R_f, R_p, R_e, R_c], 1)
        on = r(B, self.counts.room) < r(B, 1, lo=0.5, hi=1.0)
        on_g = (r(B, G, 1) < 0.75).expand(B, G, 6).reshape(B, G * 6).clone()
        on_g[:, :6] |= is_tab[:, None]
        on[:, : G * 6] = on_g
        # room last (index Kp)
        rc = torch.stack([torch.zeros(B, device=dev), torch.zeros(B, device=dev), half[:, 2]], -1)
        c = torch.cat([c, rc[:, None]], 1)
        h = torch.cat([h, half[:, None]], 1)
        R = torch.cat([R, torch.eye(3, device=dev).expand(B, 1, 3, 3)], 1)
        on = torch.cat([on, torch.ones(B, 1, dtype=torch.bool, device=dev)], 1)
        K1 = self.counts.room + 1
        # surface properties; room faces get own textures: 6 faces -> table [B,K1,6]
        T = self.textures
        tex = torch.randint(0, T, (B, K1, 1), generator=g, device=dev).expand(B, K1, 6).clone()
        per_face = r(B, K1) < 0.25
        tex = torch.where(per_face[..., None], torch.randint(0, T, (B, K1, 6), generator=g, device=dev), tex)
        room = torch.randint(0, T, (B, 3), generator=g, device=dev)  # walls, floor, ceiling
        tex[:, -1] = torch.stack([room[:, 0]] * 4 + [room[:, 1], room[:, 2]], -1)
        rep = torch.exp(r(B, K1, lo=math.log(0.35), hi=math.log(2.5))) / rad[:, None].clamp(min=0.6)
        rep[:, -1] = torch.exp(r(B, lo=math.log(0.25), hi=math.log(1.0)))
        tint = 1 + (r(B, K1, 3) - 0.5) * 0.5
        spec = torch.where(r(B, K1) < 0.3, r(B, K1, lo=0.1, hi=0.5), torch.zeros(B, K1, device=dev))
        off = r(B, K1, 2)
        lim = half.clamp(max=6.0)
        lpos = (r(B, 2, 3) - 0.5) * 1.6 * lim[:, None]
        lpos[..., 2] = lim[:, None, 2] * r(B, 2, lo=1.2, hi=1.9)
        lcol = (1 + (r(B, 2, 3) - 0.5) * 0.4) * torch.stack([torch.ones(B, device=dev), r(B, lo=0, hi=0.7)], 1)[..., None]
        amb = r(B, 1, lo=0.25, hi=0.7) * (1 + (r(B, 3) - 0.5) * 0.3)
        M = R.transpose(-1, -2) / h[..., None]  # world -> unit local
        return dict(
            c=c,
            h=h,
            R=R,
            M=M,
            on=on,
            tex=tex,
            rep=rep,
            tint=tint,
            spec=spec,
            off=off,
            lpos=lpos,
            lcol=lcol,
            amb=amb,
            outdoor=outdoor,
            half=half,
            ctr=ctr,
            rad=rad,
            table_h=table_h,
        )

    def cameras(self, s: SceneTensors, V: int, H: int, W: int) -> SceneTensors:
        """V cameras a scene on an arc around its cluster: ``pos``, ``R`` (rows are the camera's axes), ``K``, ``w2c``, and ``ok``:
        False where the camera is inside or too near to something and no better one was found."""
        dev, g, r = self.device, self.g, self.r
        B = s["c"].shape[0]
        C = max(4 * V, 16)
        pos, tgt = self.candidates(s, C)
        fwd = F.normalize(tgt - pos, dim=-1)
        up = torch.tensor([0.0, 0.0, 1.0], device=dev).expand_as(fwd)
        right = F.normalize(torch.cross(fwd, up, dim=-1), dim=-1)
        down = torch.cross(fwd, right, dim=-1)
        roll = torch.randn(B, C, 1, generator=g, device=dev) * 0.09
        right, down = right * roll.cos() + down * roll.sin(), down * roll.cos() - right * roll.sin()
        Rwc = torch.stack([right, down, fwd], -2)  # [B,C,3,3], rows = camera axes
        # reject cameras inside or too near to something (5 probe rays)
        px = torch.tensor([[0, 0], [-0.35, -0.35], [0.35, -0.35], [-0.35, 0.35], [0.35, 0.35]], device=dev)
        dc = torch.cat([px, torch.ones(5, 1, device=dev)], -1)
        d = torch.einsum("bcji,pj->bcpi", Rwc, dc)
        t, _ = trace(self.counts, s["c"], s["M"], s["on"], pos, d)
        loc = torch.einsum("bkij,bckj->bcki", s["R"].transpose(-1, -2), pos[:, :, None] - s["c"][:, None]).abs()
        inside = ((loc < s["h"][:, None] + 0.06).all(-1) & s["on"][:, None])[..., :-1].any(-1)
        near = t.amin(-1) < 0.3 * s["rad"][:, None]
        bad = inside | near | (t[..., 0] < 0.45 * s["rad"][:, None])
        score = r(B, C) + bad.float() * 10
        idx = score.topk(V, dim=1, largest=False).indices
        ok = ~bad.gather(1, idx)
        pos = pos.gather(1, idx[..., None].expand(B, V, 3))
        Rwc = Rwc.gather(1, idx[..., None, None].expand(B, V, 3, 3))
        fov = r(B, 1, lo=self.fov[0], hi=self.fov[1]) * math.pi / 180
        f = (max(H, W) / 2) / (fov / 2).tan()
        f = f.expand(B, V)
        K = torch.zeros(B, V, 3, 3, device=dev)
        K[..., 0, 0], K[..., 1, 1], K[..., 0, 2], K[..., 1, 2], K[..., 2, 2] = f, f, W / 2, H / 2, 1.0
        w2c = torch.cat([Rwc, -(Rwc @ pos[..., None])], -1)
        return dict(pos=pos, R=Rwc, K=K, w2c=w2c, ok=ok)

    def candidates(self, s: SceneTensors, C: int) -> tuple[Tensor, Tensor]:
        """C places a scene on an arc around its cluster, and what is looked at from there, both ``[B, C, 3]``."""
        dev, g, r = self.device, self.g, self.r
        B = s["c"].shape[0]
        foc = s["ctr"].clone()
        foc[:, 2] = s["table_h"] + s["rad"] * r(B, lo=0.1, hi=0.5)
        base = r(B, 1) * 2 * math.pi
        span = torch.tensor(self.arcs, device=dev)[torch.randint(0, len(self.arcs), (B, 1), generator=g, device=dev)]
        ang = base + (r(B, C) - 0.5) * span
        dist = s["rad"][:, None] * r(B, 1, lo=1.2, hi=2.6) * r(B, C, lo=0.75, hi=1.25)
        elev = r(B, 1, lo=0.05, hi=0.9) + (r(B, C) - 0.5) * 0.35
        pos = torch.stack([dist * ang.cos() * elev.cos(), dist * ang.sin() * elev.cos(), dist * elev.sin()], -1) + foc[:, None]
        lim = s["half"][:, None] - 0.15
        pos = torch.cat(
            [pos[..., :2].clamp(-lim[..., :2], lim[..., :2]), pos[..., 2:].clamp(min=0.15).minimum(2 * s["half"][:, None, 2:] - 0.15)], -1
        )
        tgt = foc[:, None] + torch.randn(B, C, 3, generator=g, device=dev) * (0.22 * s["rad"])[:, None, None]
        return pos, tgt
