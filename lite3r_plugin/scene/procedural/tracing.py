"""Ray casting against boxes, ellipsoids and capped cylinders, and shading of what the rays hit.

Every primitive is a unit cube, ball or cylinder under an affine map, so a ray is brought into its local frame first. Letters of
shapes: B scenes, V views, P rays of a view, K primitives without the room (which comes last), N = B * V * P.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .textures import TextureBank

INFINITY = float("inf")
SceneTensors = dict[str, Tensor]


@dataclass(frozen=True)
class Primitives:
    """How many primitives a scene has; they are stored in this order, and the room, a box seen from inside, comes last."""

    boxes: int
    ellipsoids: int
    cylinders: int

    @property
    def round_end(self) -> int:
        """Index after the last ellipsoid."""
        return self.boxes + self.ellipsoids

    @property
    def room(self) -> int:
        """Index of the room, and number of primitives without it."""
        return self.boxes + self.ellipsoids + self.cylinders


def trace(counts: Primitives, c: Tensor, M: Tensor, on: Tensor, o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest hit of each ray.

    Args:
        counts: Numbers of primitives.
        c: Centres ``[B, K + 1, 3]``.
        M: Maps from world offsets to unit local coordinates, ``[B, K + 1, 3, 3]``.
        on: Which primitives exist, ``[B, K + 1]`` bool.
        o: Origins ``[B, V, 3]``.
        d: Directions ``[B, V, P, 3]``, of any length.

    Returns:
        The ray parameter t > 0 and the index of the primitive, both ``[B, V, P]``. The room is always hit.
    """
    B, V, P, _ = d.shape
    K1 = M.shape[1]
    local_o = torch.einsum("bkij,bvkj->bvki", M, o[:, :, None] - c[:, None])[:, :, None]
    local_d = (d.reshape(B, V * P, 3) @ M.permute(0, 3, 1, 2).reshape(B, 3, K1 * 3)).reshape(B, V, P, K1, 3)
    box_o, ball_o, tube_o, room_o = _split(counts, local_o)
    box_d, ball_d, tube_d, room_d = _split(counts, local_d)

    near, far = _slabs(torch.cat([box_o, room_o], -2), torch.cat([box_d, room_d], -2))
    t_box = torch.where((near < far) & (near > 1e-4), near, torch.full_like(near, INFINITY))[..., :-1]
    t_room = far[..., -1:]
    disc, near = _ball(ball_o, ball_d)
    t_ball = torch.where((disc > 0) & (near > 1e-4), near, torch.full_like(near, INFINITY))
    disc, near, far = _tube(tube_o, tube_d)
    t_tube = torch.where((disc > 0) & (near < far) & (near > 1e-4), near, torch.full_like(near, INFINITY))
    t = torch.cat([t_box, t_ball, t_tube, t_room], -1)
    t = torch.where(on[:, None, None], t, torch.full_like(t, INFINITY))
    nearest = t.min(-1)
    return nearest.values, nearest.indices


def shade(
    counts: Primitives,
    bank: TextureBank,
    s: SceneTensors,
    o: Tensor,
    d: Tensor,
    t: Tensor,
    k: Tensor,
    f: Tensor,
    unshadowed: Callable[[Primitives, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Light that comes back along each ray: textured diffuse and specular, two point lights, one with shadows.

    Args:
        counts, bank, s: Numbers of primitives, textures, the scene of `layout.sample_scene`.
        o, d: Rays as in `trace`; t, k: its result.
        f: Focal lengths in pixels ``[B, V]``, which choose the mip level.
        unshadowed: The function of that name, or its compiled form.

    Returns:
        Linear radiance and world normals, both ``[B, V, P, 3]``.
    """
    B, V, P, _ = d.shape
    N = B * V * P
    p = (o[:, :, None] + d * t[..., None]).reshape(N, 3)
    scene = torch.arange(B, device=d.device)[:, None, None].expand(B, V, P).reshape(N)
    flat, n, u, v, face = _surface(counts, s, scene, k.reshape(N), p)
    view = F.normalize(d.reshape(N, 3), dim=-1)
    facing = -(n * view).sum(-1)
    repeats = s["rep"].reshape(-1)[flat]
    offset = s["off"].reshape(-1, 2)[flat]
    focal = f[:, :, None].expand(B, V, P).reshape(N)
    footprint = t.reshape(N) / focal * repeats * bank.S / facing.clamp(min=0.25)
    lod = torch.log2(footprint.clamp(min=1e-6))
    texture = s["tex"].reshape(-1, 6)[flat].gather(1, face[:, None])[:, 0]
    albedo = bank.sample(texture, u * repeats + offset[:, 0] + face * 0.37, v * repeats + offset[:, 1], lod)
    albedo = (albedo * s["tint"].reshape(-1, 3)[flat]).clamp(0, 1) ** 2.2
    colour = albedo * s["amb"][scene] * (0.75 + 0.25 * n[:, 2:3])
    specular = s["spec"].reshape(-1)[flat]
    for i in range(2):
        to_light = s["lpos"][:, i][scene] - p
        distance2 = (to_light * to_light).sum(-1)
        light = to_light / distance2.sqrt()[:, None]
        lit = (n * light).sum(-1).clamp(min=0)
        if i == 0:
            lit = lit * unshadowed(counts, s["c"], s["M"], s["on"], p + n * 2e-3, to_light)
        energy = (lit / (1 + distance2 / 6.0))[:, None] * s["lcol"][:, i][scene] * 1.8
        halfway = F.normalize(light - view, dim=-1)
        colour = colour + energy * (albedo + (specular * (n * halfway).sum(-1).clamp(min=0) ** 40)[:, None])
    return colour.reshape(B, V, P, 3), n.reshape(B, V, P, 3)


def _surface(counts: Primitives, s: SceneTensors, scene: Tensor, k: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Flat primitive index, normal, texture coordinates u and v, and face (0..5) of points ``[N, 3]`` on primitives ``[N]``."""
    K1 = s["M"].shape[1]
    flat = scene * K1 + k
    M = s["M"].reshape(-1, 3, 3)[flat]
    R = s["R"].reshape(-1, 3, 3)[flat]
    h = s["h"].reshape(-1, 3)[flat]
    q = torch.einsum("nij,nj->ni", M, p - s["c"].reshape(-1, 3)[flat])  # unit local
    on_ball = (k >= counts.boxes) & (k < counts.round_end)
    on_tube = (k >= counts.round_end) & (k < counts.room)
    magnitude = q.abs()
    n_box = F.one_hot(magnitude.argmax(-1), 3).to(q.dtype) * q.sign()
    n_ball = F.normalize(q / h, dim=-1)
    cap = magnitude[:, 2] > 1 - 1e-3
    zero = torch.zeros_like(q[:, 0])
    n_tube = torch.where(
        cap[:, None],
        torch.stack([zero, zero, q[:, 2].sign()], -1),
        F.normalize(torch.stack([q[:, 0], q[:, 1], zero], -1), dim=-1),
    )
    local_n = torch.where(on_ball[:, None], n_ball, torch.where(on_tube[:, None], n_tube, n_box))
    n = torch.einsum("nij,nj->ni", R, local_n)
    n = torch.where((k == K1 - 1)[:, None], -n, n)
    axis = local_n.abs().argmax(-1)
    face = axis * 2 + (local_n.gather(1, axis[:, None])[:, 0] > 0).long()
    m = q * h
    u = torch.where(axis == 0, m[:, 1], m[:, 0])
    v = torch.where(axis == 2, m[:, 1], m[:, 2])
    return flat, n, u, v, face


def unshadowed(counts: Primitives, c: Tensor, M: Tensor, on: Tensor, p: Tensor, to_light: Tensor) -> Tensor:
    """1 where nothing stands between p and p + to_light, else 0; both ``[N, 3]``; returns ``[N]``. c, M, on as in `trace`."""
    on = on[:, None]
    B, K1 = M.shape[:2]
    n = p.shape[0] // B
    to_local = M.permute(0, 3, 1, 2).reshape(B, 3, K1 * 3)
    centre = torch.einsum("bkij,bkj->bki", M, c)
    local_o = (p.reshape(B, n, 3) @ to_local).reshape(B, n, K1, 3) - centre[:, None]
    local_d = (to_light.reshape(B, n, 3) @ to_local).reshape(B, n, K1, 3)
    box_o, ball_o, tube_o, _ = _split(counts, local_o)
    box_d, ball_d, tube_d, _ = _split(counts, local_d)
    near, far = _slabs(box_o, box_d)
    blocked = ((near < far) & (near < 1) & (far > 0) & on[..., : counts.boxes]).any(-1)
    disc, near = _ball(ball_o, ball_d)
    blocked |= ((disc > 0) & (near > 0) & (near < 1) & on[..., counts.boxes : counts.round_end]).any(-1)
    disc, near, far = _tube(tube_o, tube_d)
    blocked |= ((disc > 0) & (near < far) & (near < 1) & (near > 0) & on[..., counts.round_end : counts.room]).any(-1)
    return (~blocked).to(p.dtype).reshape(-1)


def _split(counts: Primitives, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``[..., K + 1, 3]`` by kind: boxes, ellipsoids, cylinders, the room."""
    boxes, round_end, room = counts.boxes, counts.round_end, counts.room
    return x[..., :boxes, :], x[..., boxes:round_end, :], x[..., round_end:room, :], x[..., room:, :]


def _slabs(o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays enter and leave the cube [-1, 1]^3; they miss it where the first is not smaller."""
    inverse = (d + 1e-9).reciprocal()
    centre, extent = -o * inverse, inverse.abs()
    return (centre - extent).amax(-1), (centre + extent).amin(-1)


def _ball(o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Discriminant (positive where hit) and first hit of rays with the unit ball."""
    a, b, c = (d * d).sum(-1), (o * d).sum(-1), (o * o).sum(-1) - 1
    disc = b * b - a * c
    return disc, (-b - disc.clamp(min=0).sqrt()) / a


def _tube(o: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Discriminant, entry and exit of rays with the unit cylinder along z, which is capped at z = -1 and 1."""
    a = (d[..., :2] ** 2).sum(-1).clamp(min=1e-9)
    b = (o[..., :2] * d[..., :2]).sum(-1)
    c = (o[..., :2] ** 2).sum(-1) - 1
    disc = b * b - a * c
    root = disc.clamp(min=0).sqrt()
    inverse = (d[..., 2] + 1e-9).reciprocal()
    centre, extent = -o[..., 2] * inverse, inverse.abs()
    return disc, torch.maximum((-b - root) / a, centre - extent), torch.minimum((-b + root) / a, centre + extent)
