"""The gate: scenes of a second generator, on which a trained testbed is judged and never trained.

It shares nothing with the training scenes: surfaces are level sets of signed distance functions (tori, octahedra, twisted prisms,
gyroids and drops in a valley) that are found by sphere tracing, colours are sums of waves and cells in space rather than pictures,
the light is a sun with soft shadows, and the cameras are drawn here. A model that gains on its own kind of scene alone does not gain
here. `GATE_SEEDS` decide during training; figures that are published come from `FINAL_SEEDS`, which decide nothing.

Coordinates: x right, y up, z back, in metres; B scenes, V views, N points of a scene.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

GATE_SEEDS = range(5_000, 5_048)
FINAL_SEEDS = range(9_000, 9_128)
FAR = 60.0
PER_KIND = 2  # solids of each kind in a scene
Params = dict[str, Tensor]


@torch.no_grad()
def gate_scenes(
    seeds: Iterable[int], views: int = 8, height: int = 224, width: int = 224, device: torch.device | str = "cpu", chunk: int = 4
) -> dict[str, Tensor]:
    """One scene for each seed; a scene does not depend on the others.

    Args:
        seeds: Of the scenes.
        views, height, width: Views of a scene and their size in pixels.
        device: Where to render. Results differ between devices by rounding only.
        chunk: Scenes that are rendered at once.

    Returns:
        A dict of
            rgb ``[B, V, 3, H, W]`` in [0, 1]; depth ``[B, V, H, W]`` along the optical axis; valid ``[B, V, H, W]`` bool, False in the
            sky; ok ``[B, V]``, True; K ``[B, V, 3, 3]`` in pixels, pixel centres at +0.5; w2c ``[B, V, 3, 4]`` OpenCV.
    """
    with torch.device("cpu"):
        drawn = [_draw(torch.Generator().manual_seed(seed), views, height, width) for seed in seeds]
    parts = []
    for i in range(0, len(drawn), chunk):
        scene = {name: torch.stack([params[name] for params in drawn[i : i + chunk]]).to(device) for name in drawn[i]}
        parts.append(_render(scene, height, width))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _draw(g: torch.Generator, views: int, height: int, width: int) -> Params:
    """Everything that is random in a scene, on the CPU."""

    def uniform(*shape: int, lo: float = 0.0, hi: float = 1.0) -> Tensor:
        return torch.rand(shape, generator=g) * (hi - lo) + lo

    solids = len(_SOLIDS) * PER_KIND
    angle, radius = uniform(solids, hi=2 * math.pi), 3.2 * uniform(solids).sqrt()
    ground = {
        "wave": torch.randn(8, 2, generator=g) * torch.logspace(-0.5, 0.6, 8)[:, None],
        "phase": uniform(8, hi=2 * math.pi),
        "swell": 0.35 * torch.logspace(0.0, -1.3, 8) * uniform(1, lo=0.3),
        "bowl": uniform(1, lo=0.004, hi=0.03),
    }
    centre = torch.stack((radius * angle.cos(), torch.zeros(solids), radius * angle.sin()), -1)
    size = uniform(solids, lo=math.log(0.3), hi=math.log(1.3)).exp()
    centre[:, 1] = _height(ground | {"one": torch.ones(1)}, centre[None])[0] + size * uniform(solids, lo=0.1, hi=0.9)
    materials = solids + 1  # the ground is the last
    octave = torch.arange(6).repeat_interleave(4)
    mean = uniform(materials, 1, lo=0.3, hi=0.65) + uniform(materials, 3, lo=-0.15, hi=0.15)
    hue = uniform(materials, 1) + uniform(materials, 3, hi=0.3)  # where in a band each colour is at its brightest: nearly together
    params = ground | {
        "centre": centre,
        "size": size,
        "turn": _euler(*(uniform(solids, hi=2 * math.pi) for _ in range(3))),
        "shape": uniform(solids),
        "grain": torch.randn(materials, 24, 3, generator=g) * (2.1**octave * 1.3)[:, None] * uniform(materials, 1, 1, lo=0.5, hi=2.0),
        "grain_phase": uniform(materials, 24, hi=2 * math.pi),
        "grain_weight": 0.7**octave * uniform(materials, 24),
        "tint": torch.stack((mean, uniform(materials, 1, lo=0.1, hi=0.35).expand(-1, 3), hue), 1),
        "bands": uniform(materials, lo=0.4, hi=2.5),
        "cells": uniform(materials, lo=1.2, hi=5.0),
        "cell_weight": uniform(materials) * (uniform(materials) < 0.6),
        "sun": _direction(uniform(1, hi=2 * math.pi), uniform(1, lo=0.45, hi=1.35))[0],
        "sunlight": uniform(3, lo=0.9, hi=1.1) * uniform(1, lo=0.6, hi=2.2),
        "skylight": torch.tensor([0.45, 0.55, 0.7]) * uniform(1, lo=0.4, hi=1.2),
        "exposure": uniform(views, lo=0.9, hi=1.1),
        "noise": torch.randn(views, 3, height, width, generator=g) * uniform(1, hi=0.015),
    }
    return params | _cameras(params, g, views, height, width)


def _cameras(scene: Params, g: torch.Generator, views: int, height: int, width: int) -> Params:
    """A hand-held walk along a closed curve, a piece of it, or a straight line, always above the ground and outside of the solids."""

    def uniform(*shape: int, lo: float = 0.0, hi: float = 1.0) -> Tensor:
        return torch.rand(shape, generator=g) * (hi - lo) + lo

    batch = {name: value[None] for name, value in scene.items()}
    along = torch.linspace(0, 1, views) + uniform(views, lo=-0.4, hi=0.4) / views
    reach, start, high = uniform(1, lo=3.5, hi=7.0), uniform(1, hi=2 * math.pi), uniform(1, lo=0.6, hi=3.0)
    turn = start + along * uniform(1, lo=0.5, hi=2.4) * (1 if uniform(1) < 0.5 else -1)
    curve = torch.stack((turn.cos() * reach, high + 0.5 * (3 * turn).sin(), turn.sin() * reach * uniform(1, lo=0.7, hi=1.0)), -1)
    heading = _direction(start, torch.zeros(1))[0]
    side = torch.stack((-heading[2], heading[1], heading[0]))
    drift = uniform(2, lo=-0.7, hi=0.7)
    line = (heading - 0.25 * side) * reach * (1 - drift[0].abs() * along[:, None]) + side * drift[1] * reach * along[:, None]
    line[:, 1] = high
    eye = curve if uniform(1) < 0.6 else line
    eye = eye + torch.randn(views, 3, generator=g) * 0.12
    for _ in range(40):  # upwards until there is room
        room = _distance(batch, eye[None])[0].amin(-1)
        eye = eye + (room < 0.6)[:, None] * torch.tensor([0.0, 0.2, 0.0])
    target = torch.randn(views, 3, generator=g) * 0.5 + torch.tensor([0.0, 0.4, 0.0])
    look = target - eye
    yaw, pitch = torch.atan2(look[:, 0], look[:, 2]), torch.atan2(-look[:, 1], look[:, [0, 2]].norm(dim=-1))
    roll = torch.randn(views, generator=g) * 0.08
    axes = _euler(yaw, pitch, roll)  # columns: right, up and forward for a camera that looks along +z with y up
    to_camera = torch.stack((-axes[..., 0], -axes[..., 1], axes[..., 2]), -2)  # rows of OpenCV: right, down, forward
    focal = max(height, width) / 2 / (uniform(1, lo=40.0, hi=90.0).deg2rad() / 2).tan()
    K = torch.tensor([[0.0, 0.0, width / 2], [0.0, 0.0, height / 2], [0.0, 0.0, 1.0]])
    K[0, 0] = K[1, 1] = focal
    w2c = torch.cat((to_camera, -to_camera @ eye[..., None]), -1)
    return {"eye": eye, "K": K.expand(views, 3, 3), "w2c": w2c}


def _render(scene: Params, height: int, width: int) -> dict[str, Tensor]:
    K, w2c = scene["K"], scene["w2c"]
    batch, views = w2c.shape[:2]
    v = torch.arange(height, device=K.device) + 0.5
    u = torch.arange(width, device=K.device) + 0.5
    pixels = torch.cartesian_prod(v, u).flip(-1)
    focal = K[..., :1, :1]
    rays = torch.cat(((pixels - K[..., None, :2, 2]) / focal, torch.ones_like(pixels[..., :1]).expand(batch, views, -1, -1)), -1)
    rays = (rays @ w2c[..., :3]).flatten(1, 2)  # R^T d, of length 1 along the optical axis
    eye = scene["eye"].repeat_interleave(height * width, 1)
    length = rays.norm(dim=-1)
    depth = torch.full_like(length, 0.05)
    for _ in range(110):
        gap = _distance(scene, eye + rays * depth[..., None]).amin(-1)
        depth = (depth + gap / length).clamp(max=FAR)
    point = eye + rays * depth[..., None]
    gaps = _distance(scene, point)
    seen = (depth < FAR) & (gaps.amin(-1).abs() < 2e-3 * depth)
    pixel = depth / focal.expand(batch, views, height * width, 1).flatten(1)  # metres
    colour = torch.where(seen[..., None], _shade(scene, point, gaps.argmin(-1), pixel), _sky(scene, rays / length[..., None]))

    def maps(x: Tensor) -> Tensor:
        return x.unflatten(1, (views, height, width))

    rgb = maps(colour).permute(0, 1, 4, 2, 3) * scene["exposure"][..., None, None, None]
    rgb = (1 - (-1.4 * rgb).exp()).clamp(min=1e-6) ** (1 / 2.2) + scene["noise"]
    ok = torch.ones(batch, views, dtype=torch.bool, device=K.device)
    return {"rgb": rgb.clamp(0, 1), "depth": maps(depth), "valid": maps(seen), "ok": ok, "K": K, "w2c": w2c}


def _shade(scene: Params, point: Tensor, material: Tensor, pixel: Tensor) -> Tensor:
    """Linear light from points ``[B, N, 3]`` of materials ``[B, N]``; a pixel is ``[B, N]`` metres wide there."""
    corners = torch.tensor([[1.0, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]], device=point.device)
    step = (0.5 * pixel).clamp(min=2e-3)[..., None]
    normal = sum((_distance(scene, point + step * corner).amin(-1, keepdim=True) * corner for corner in corners), torch.zeros_like(point))
    normal = torch.nn.functional.normalize(normal, dim=-1)
    above = point + normal * 0.02
    sun = scene["sun"][:, None]
    lit, at = torch.ones_like(pixel), torch.full_like(pixel, 0.03)
    for _ in range(24):
        gap = _distance(scene, above + sun * at[..., None]).amin(-1)
        lit = torch.minimum(lit, (12 * gap / at).clamp(0, 1))
        at = at + gap.clamp(0.03, 0.6)
    hollow = sum((0.6**i * (0.15 * i - _distance(scene, point + normal * 0.15 * i).amin(-1)) for i in (1, 2, 3)), torch.zeros_like(pixel))
    light = scene["skylight"][:, None] * ((1 - 1.5 * hollow).clamp(0.2, 1) * (0.7 + 0.3 * normal[..., 1]))[..., None]
    light = light + scene["sunlight"][:, None] * (lit * (normal * sun).sum(-1).clamp(min=0))[..., None]
    return _albedo(scene, point, material, pixel) * light


def _albedo(scene: Params, point: Tensor, material: Tensor, pixel: Tensor) -> Tensor:
    """Colours ``[B, N, 3]`` from waves and cells in space; waves that are finer than two pixels fade out."""
    row = torch.arange(len(point), device=point.device)[:, None]
    value = torch.zeros_like(pixel)
    for i in range(scene["grain"].shape[2]):  # one wave after another: all at once would not fit into memory
        wave = scene["grain"][row, material, i]
        fade = (-1.0 * (wave.norm(dim=-1) * pixel).square()).exp()
        bent = (wave * point).sum(-1) + scene["grain_phase"][row, material, i] + 1.5 * value
        value = value + scene["grain_weight"][row, material, i] * fade * bent.sin()
    mean, spread, shift = scene["tint"][row, material].unbind(-2)
    colour = mean + spread * torch.cos(2 * math.pi * (scene["bands"][row, material] * value * 0.35)[..., None] + 2 * math.pi * shift)
    scale = scene["cells"][row, material]
    edge, identity = _cells(point * scale[..., None])
    pattern = torch.where(edge < 0.06, 0.35, 0.6 + 0.8 * identity)
    weight = scene["cell_weight"][row, material] * (-0.5 * (scale * pixel * 12).square()).exp()
    return (colour * (1 + weight * (pattern - 1))[..., None]).clamp(0.02, 0.95) ** 1.6


def _cells(point: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the border of the Worley cell around each point, and a random number of the cell."""
    base = point.floor()
    near = torch.full_like(point[..., 0], 9.0)
    second, identity = near.clone(), near.clone()
    for offset in torch.cartesian_prod(*[torch.arange(-1.0, 2.0, device=point.device)] * 3):
        corner = base + offset
        noise = torch.stack([_hash(corner, k) for k in range(3)], -1)
        gap = (corner + noise - point).norm(dim=-1)
        closer = gap < near
        second = torch.where(closer, near, torch.minimum(second, gap))
        identity = torch.where(closer, _hash(corner, 3), identity)
        near = torch.minimum(near, gap)
    return second - near, identity


def _hash(corner: Tensor, k: int) -> Tensor:
    """Numbers in [0, 1) from integer coordinates ``[..., 3]``; integers, so that all devices agree."""
    x, y, z = corner.long().unbind(-1)
    n = (x * 73_856_093) ^ (y * 19_349_663) ^ (z * 83_492_791) ^ (k * 2_654_435_761)
    n = ((n ^ (n >> 13)) * 1_274_126_177) & 0x7FFFFFFF
    return ((n ^ (n >> 16)) & 0xFFFF).float() / 0x10000


def _sky(scene: Params, direction: Tensor) -> Tensor:
    rise = direction[..., 1:].clamp(0, 1)[..., :1]
    return scene["skylight"][:, None] * (1.6 - 0.9 * rise.sqrt()) + 0.3 * (1 - rise) ** 4


# --- distances ---------------------------------------------------------------------------------------------------------------------


def _distance(scene: Params, point: Tensor) -> Tensor:
    """Signed distances, never too large, of points ``[B, N, 3]`` to every solid and to the ground, ``[B, N, solids + 1]``."""
    rows = []
    for i, (kind, stretch) in enumerate(_SOLIDS):
        some = slice(i * PER_KIND, (i + 1) * PER_KIND)
        size = scene["size"][:, None, some]
        local = point[:, :, None] - scene["centre"][:, None, some]
        local = torch.einsum("bkij,bnkj->bnki", scene["turn"][:, some], local) / size[..., None]
        rows.append(kind(local, scene["shape"][:, None, some]) * size * stretch)
    ground = (point[..., 1] - _height(scene, point)) * 0.6
    return torch.cat((*rows, ground[..., None]), -1)


def _height(scene: Params, point: Tensor) -> Tensor:
    """Height of the ground under points ``[B, N, 3]``, ``[B, N]``."""
    flat = point[..., [0, 2]]
    waves = (flat @ scene["wave"].mT + scene["phase"][..., None, :]).sin()
    return (waves * scene["swell"][..., None, :]).sum(-1) + scene["bowl"] * flat.square().sum(-1).clamp(max=400)


def _torus(p: Tensor, shape: Tensor) -> Tensor:
    ring = p[..., [0, 2]].norm(dim=-1) - 0.75
    return torch.hypot(ring, p[..., 1]) - (0.12 + 0.2 * shape)


def _octahedron(p: Tensor, shape: Tensor) -> Tensor:
    return (p.abs().sum(-1) - 1) * 0.57735 - 0.15 * shape


def _twisted(p: Tensor, shape: Tensor) -> Tensor:
    """A hexagonal prism that turns around its axis with the height."""
    angle = 1.6 * (shape - 0.5) * p[..., 1]
    c, s = angle.cos(), angle.sin()
    x, z = (c * p[..., 0] - s * p[..., 2]).abs(), (s * p[..., 0] + c * p[..., 2]).abs()
    return torch.maximum(torch.maximum(0.866 * x + 0.5 * z, z) - 0.45, p[..., 1].abs() - 1)


def _gyroid(p: Tensor, shape: Tensor) -> Tensor:
    """A sponge with the outline of a ball."""
    q = p * (4 + 4 * shape)[..., None]
    wall = (q.sin() * q.roll(-1, -1).cos()).sum(-1).abs() - 0.45
    return torch.maximum(wall / (4 + 4 * shape) / 1.5, p.norm(dim=-1) - 1)


def _drops(p: Tensor, shape: Tensor) -> Tensor:
    """Three balls that run into each other."""
    offsets = torch.tensor([[0.0, -0.5, 0.0], [0.15, 0.15, 0.1], [-0.1, 0.75, 0.2]], device=p.device)
    radii = torch.tensor([0.5, 0.4, 0.25], device=p.device)
    gaps = (p[..., None, :] - offsets).norm(dim=-1) - radii * (0.8 + 0.4 * shape[..., None])
    return -(-8 * gaps).logsumexp(-1) / 8


# kind of solid, and by how much its function may be shortened so that no ray passes through it
_SOLIDS: tuple[tuple[Callable[[Tensor, Tensor], Tensor], float], ...] = (
    (_torus, 1.0), (_octahedron, 1.0), (_twisted, 0.6), (_gyroid, 0.8), (_drops, 0.9),
)  # fmt: skip


def _direction(azimuth: Tensor, elevation: Tensor) -> Tensor:
    """Unit vectors ``[..., 3]``."""
    return torch.stack((azimuth.cos() * elevation.cos(), elevation.sin(), azimuth.sin() * elevation.cos()), -1)


def _euler(yaw: Tensor, pitch: Tensor, roll: Tensor) -> Tensor:
    """Rotations ``[..., 3, 3]``: about z by the roll, then about x by the pitch, then about y by the yaw."""
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)

    def about(axis: int, angle: Tensor) -> Tensor:
        c, s = angle.cos(), angle.sin()
        rows = {
            0: (one, zero, zero, zero, c, -s, zero, s, c),
            1: (c, zero, s, zero, one, zero, -s, zero, c),
            2: (c, -s, zero, s, c, zero, zero, zero, one),
        }[axis]
        return torch.stack(rows, -1).unflatten(-1, (3, 3))

    return about(1, yaw) @ about(0, pitch) @ about(2, roll)
