"""A furnished room: the one scene here that people recognise. Metres, z up; the same each time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import SceneSampler
from .render import ProcScenes
from .textures import TextureBank, fractal
from .tracing import Primitives, SceneTensors

# A primitive: kind, centre, half sizes, colour (factors of red, green, blue), texture, its repeats a metre, turn in degrees.
Row = tuple[str, tuple[float, float, float], tuple[float, float, float], tuple[float, float, float], str, float, float]

TEXTURES = ("plaster", "planks", "fabric", "stripes", "rug", "leaves", "painting", "sea", "wallpaper")
FRAMED = ("painting", "sea")  # in the middle of what shows them
SIZE = 128  # texels of a texture's side
WOOD, DARK, CREAM = (0.72, 0.47, 0.28), (0.34, 0.22, 0.15), (0.95, 0.9, 0.8)
TEAL, MUSTARD, RUST, WHITE, GREEN = (0.16, 0.5, 0.55), (0.95, 0.7, 0.2), (0.8, 0.33, 0.2), (1.0, 1.0, 0.98), (0.3, 0.55, 0.25)
BOOKS = (RUST, TEAL, MUSTARD, CREAM, (0.25, 0.3, 0.55), GREEN, (0.6, 0.2, 0.25), WHITE)
HALF = (3.2, 2.9, 1.35)  # of the room


def furniture() -> list[Row]:
    """What stands in the room; the sofa stands at the wall of large y."""
    rows: list[Row] = []

    def put(
        kind: str, at: Sequence[float], half: Sequence[float], colour: Sequence[float], texture: str, repeats: float = 1.5, turn: float = 0
    ) -> None:
        x, y, z = at
        hx, hy, hz = half
        r, g, b = colour
        rows.append((kind, (x, y, z), (hx, hy, hz), (r, g, b), texture, repeats, turn))

    put("box", (0, 0.9, 0.012), (1.75, 1.25, 0.012), (1, 1, 1), "rug", 0.4)
    # the sofa and its cushions
    put("box", (0, 2.2, 0.22), (1.15, 0.45, 0.2), TEAL, "fabric")
    put("box", (0, 2.55, 0.55), (1.15, 0.12, 0.38), TEAL, "fabric")
    for side in (-1, 1):
        put("box", (1.2 * side, 2.2, 0.36), (0.13, 0.47, 0.34), TEAL, "fabric")
        put("box", (0.53 * side, 2.15, 0.47), (0.5, 0.4, 0.07), (0.2, 0.6, 0.64), "fabric")
    put("box", (-0.75, 2.3, 0.72), (0.22, 0.08, 0.2), MUSTARD, "stripes", 3, 12)
    put("box", (0.8, 2.3, 0.72), (0.22, 0.08, 0.2), RUST, "fabric", 1.5, -15)
    # the table, with books and a bowl
    put("box", (0, 0.85, 0.4), (0.62, 0.36, 0.025), WOOD, "planks", 1.2)
    for x in (-0.54, 0.54):
        for y in (0.57, 1.13):
            put("box", (x, y, 0.19), (0.035, 0.035, 0.19), DARK, "planks", 2)
    put("box", (-0.3, 0.8, 0.445), (0.17, 0.12, 0.02), RUST, "fabric", 2, 20)
    put("box", (-0.29, 0.81, 0.483), (0.14, 0.1, 0.018), CREAM, "stripes", 4, 5)
    put("tube", (0.22, 0.9, 0.5), (0.07, 0.07, 0.075), WHITE, "plaster", 3)
    for x, y, z in ((0.2, 0.9, 0.66), (0.27, 0.86, 0.7), (0.2, 0.97, 0.73), (0.15, 0.88, 0.72)):
        put("ball", (x, y, z), (0.07, 0.07, 0.06), RUST if x > 0.2 else MUSTARD, "leaves", 4)
    # the shelf at the left wall, full of books
    for z in (0.05, 0.5, 0.95, 1.4, 1.8):
        put("box", (-2.55, 2.0, z), (0.55, 0.2, 0.02), WOOD, "planks", 1.2)
    for x in (-3.1, -2.0):
        put("box", (x, 2.0, 0.92), (0.02, 0.2, 0.9), WOOD, "planks", 1.2)
    put("box", (-2.55, 2.22, 0.92), (0.55, 0.015, 0.9), DARK, "planks", 1.2)
    for i in range(14):
        shelf, place = (0.07, 0.52, 0.97, 1.42)[i % 4], i // 4
        tall = 0.13 + 0.02 * ((5 * i) % 3)
        put("box", (-2.92 + 0.27 * place, 1.95, shelf + tall), (0.11, 0.12, tall), BOOKS[(3 * i) % 8], "stripes", 9)
    # the lamp, the plant, a stool, an armchair
    put("tube", (1.75, 2.35, 0.02), (0.17, 0.17, 0.02), DARK, "plaster")
    put("tube", (1.75, 2.35, 0.75), (0.02, 0.02, 0.75), DARK, "plaster")
    put("tube", (1.75, 2.35, 1.6), (0.24, 0.24, 0.17), (1.5, 1.35, 1.0), "plaster", 2)
    put("tube", (2.55, 2.0, 0.2), (0.21, 0.21, 0.2), RUST, "stripes", 2)
    for i in range(9):
        angle, up = 2.4 * i, 0.62 + 0.09 * i
        put("ball", (2.55 + 0.2 * math.cos(angle), 2.0 + 0.2 * math.sin(angle), up), (0.2, 0.11, 0.09), GREEN, "leaves", 3, 137 * i)
    put("box", (1.95, 0.75, 0.24), (0.42, 0.4, 0.18), MUSTARD, "fabric", 1.5, -35)
    put("box", (2.24, 0.95, 0.55), (0.1, 0.42, 0.36), MUSTARD, "fabric", 1.5, -35)
    put("tube", (-1.55, 0.75, 0.2), (0.25, 0.25, 0.2), CREAM, "stripes", 2)
    # on the wall
    put("box", (-0.62, 2.88, 1.62), (0.42, 0.025, 0.31), (1, 1, 1), "painting", 0.9)
    put("box", (0.55, 2.88, 1.68), (0.5, 0.025, 0.38), (1, 1, 1), "sea", 0.9)
    return rows


class Room(SceneSampler):
    """The room in place of drawn scenes, and cameras that walk along an arc in front of the sofa.

    Args:
        device: Of the tensors.
        degrees: Which the cameras spread over.
    """

    def __init__(self, device: torch.device, degrees: float = 36.0) -> None:
        rows = furniture()
        self.rows = [row for kind in ("box", "ball", "tube") for row in rows if row[0] == kind]
        count = {kind: sum(row[0] == kind for row in rows) for kind in ("box", "ball", "tube")}
        super().__init__(len(TEXTURES), device, 0, 0, count["box"], 0, count["ball"], count["tube"], (math.radians(degrees),))
        self.counts = Primitives(count["box"], count["ball"], count["tube"])

    def scene(self, B: int) -> SceneTensors:
        """The room, `B` times, as `SceneSampler.scene` gives its scenes."""

        def each(values: object) -> Tensor:
            return torch.tensor(values, device=self.device)

        half = each([list(HALF)])
        c = torch.cat((each([row[1] for row in self.rows]), each([[0.0, 0, HALF[2]]])))
        h = torch.cat((each([row[2] for row in self.rows]), half))
        angle = each([math.radians(row[6]) for row in self.rows] + [0.0])
        zero, one = torch.zeros_like(angle), torch.ones_like(angle)
        R = torch.stack((angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero, zero, zero, one), -1).unflatten(-1, (3, 3))
        tex = each([[TEXTURES.index(row[4])] * 6 for row in self.rows] + [[8, 8, 8, 8, 1, 0]])  # the room: walls, floor, ceiling
        framed = each([[0.5 * (row[4] in FRAMED)] * 2 for row in self.rows] + [[0.0, 0.0]])
        s = {
            "c": c, "h": h, "R": R, "M": R.mT / h[..., None], "on": torch.ones(len(c), dtype=torch.bool, device=self.device), "tex": tex,
            "rep": each([row[5] for row in self.rows] + [0.6]),
            "tint": torch.cat((each([row[3] for row in self.rows]), each([[0.96, 0.9, 0.82]]))),
            "spec": torch.zeros(len(c), device=self.device), "off": framed,
            "lpos": each([[-1.4, -1.2, 2.5], [1.75, 2.1, 1.9]]), "lcol": each([[0.9, 0.88, 0.84], [0.35, 0.28, 0.18]]),
            "amb": each([0.55, 0.55, 0.57]), "outdoor": torch.tensor(False, device=self.device), "half": half[0],
        }  # fmt: skip
        return {key: value.expand(B, *value.shape).clone() for key, value in s.items()}

    def cameras(self, s: SceneTensors, V: int, H: int, W: int) -> SceneTensors:
        """V cameras at the height of eyes, as `SceneSampler.cameras` gives them; the first one stands in the middle of the arc."""
        B, dev = len(s["c"]), self.device
        steps = torch.linspace(-0.5, 0.5, V, device=dev) if V > 1 else torch.zeros(1, device=dev)
        steps = torch.cat((steps[V // 2 :], steps[: V // 2].flip(0)))
        angle = steps * self.arcs[0]
        target = torch.tensor([0.0, 1.75, 0.62], device=dev)
        wave = torch.sin(steps * 9)
        distance = 3.9 + 0.25 * wave
        pos = torch.stack((distance * angle.sin(), target[1] - distance * angle.cos(), 1.5 + 0.18 * torch.cos(steps * 7)), -1)
        forward = F.normalize(target - pos + torch.stack((0.25 * wave, 0 * wave, 0 * wave), -1), dim=-1)
        right = F.normalize(torch.linalg.cross(forward, forward.new_tensor([0, 0, 1.0]).expand_as(forward)), dim=-1)
        R = torch.stack((right, torch.linalg.cross(forward, right), forward), -2)
        focal = max(H, W) / 2 / math.tan(math.radians(64) / 2)
        K = torch.tensor([[focal, 0, W / 2], [0, focal, H / 2], [0, 0, 1]], device=dev).expand(V, 3, 3)
        found = {
            "pos": pos,
            "R": R,
            "K": K,
            "w2c": torch.cat((R, -(R @ pos[..., None])), -1),
            "ok": torch.ones(V, dtype=torch.bool, device=dev),
        }
        return {key: value.expand(B, *value.shape).clone() for key, value in found.items()}


def furnished_room(views: int, size: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Views of the room as `ProcScenes` gives them, ``size`` pixels wide and high, of one scene."""
    scenes = ProcScenes(TextureBank(textures().to(device)), device, augment=False)
    scenes.sampler = Room(torch.device(device))
    return scenes(1, views, size, size)


def textures() -> Tensor:
    """`TEXTURES` as ``[T, 3, SIZE, SIZE]``, mostly grey: the colours are those of the furniture."""
    g = torch.Generator().manual_seed(5)
    y, x = torch.meshgrid(torch.arange(SIZE, device="cpu") / SIZE, torch.arange(SIZE, device="cpu") / SIZE, indexing="ij")
    coarse, fine = fractal(8, SIZE, g, "cpu"), fractal(8, SIZE, g, "cpu", base=16, octaves=3)

    def grey(values: Tensor) -> Tensor:
        return values.expand(3, SIZE, SIZE)

    planks = 0.62 + 0.3 * ((torch.floor(x * 6) * 37 % 11) / 11) + 0.5 * (fractal(1, SIZE, g, "cpu", base=4)[0] - 0.5)
    planks = torch.where(((x * 6) % 1 < 0.05) | ((y * 2 + torch.floor(x * 6) * 0.37) % 1 < 0.02), 0.3, planks) + 0.25 * (fine[1] - 0.5)
    ring = ((x - 0.5) ** 2 + (y - 0.5) ** 2).sqrt()
    bands = (ring * 7 % 1 < 0.4).float()
    cream, rust, gold, white = torch.tensor([[0.85, 0.78, 0.66], [0.55, 0.25, 0.2], [1.0, 0.85, 0.3], [0.97, 0.95, 0.9]], device="cpu")[
        ..., None, None
    ]
    rug = cream * (1 - bands) + rust * bands
    stripes = ((x * 8) % 1 < 0.5).float()
    dots = (((x * 8) % 1 - 0.25) ** 2 + ((y * 8 + torch.floor(x * 8) % 2 * 0.5) % 1 - 0.5) ** 2 < 0.02).float()
    sky = torch.stack((0.9 - 0.5 * y, 0.75 - 0.25 * y, 0.6 + 0.1 * y)) + 0.3 * (coarse[6] - 0.5)
    hills = (y > 0.55 + 0.13 * torch.sin(2 * math.pi * (x + 0.1)))[None]
    sun = ((x - 0.68) ** 2 + (y - 0.32) ** 2 < 0.011)[None]
    painting = torch.where(hills, torch.stack((0.2 + 0.2 * coarse[7], 0.4 + 0.3 * coarse[7], 0.25 + 0 * x)), sky)
    painting = torch.where(sun, gold, painting)
    waves = torch.stack((0.1 + 0.5 * coarse[3], 0.35 + 0.5 * coarse[3], 0.55 + 0.4 * coarse[3])) + 0.15 * torch.sin(60 * y + 6 * x)
    boat = ((x - 0.5).abs() < 0.26 * (y - 0.15)) & (y > 0.2) & (y < 0.6)
    waves = torch.where(boat[None], white, waves)
    found = [
        grey(0.9 + 0.16 * (coarse[0] - 0.5) + 0.12 * (fine[0] - 0.5)),
        grey(planks),
        grey(0.85 + 0.5 * (fine[2] - 0.5) + 0.1 * (coarse[2] - 0.5)),
        grey(0.6 + 0.35 * ((x * 8) % 1 < 0.5).float() + 0.2 * (fine[3] - 0.5)),
        rug + 0.25 * (fine[4] - 0.5),
        grey(0.35 + 0.9 * coarse[5]) + 0.2 * (fine[5] - 0.5),
        (painting + 0.1 * (fine[6] - 0.5)).flip(1),  # v points up
        (waves + 0.1 * (fine[7] - 0.5)).flip(1),
        grey(0.7 + 0.22 * stripes + 0.14 * dots + 0.2 * (coarse[1] - 0.5)),
    ]
    return torch.stack(found).clamp(0.02, 1)
