"""Choosing views of a scene: the same scene, rule and seed give the same views, in any process."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, get_args

from torch.utils.data import Dataset

from ...errors import InputError
from .scene import Scene, Views

Rule = Literal["spread", "consecutive", "covisible"]


def pick_views(scene: Scene, count: int, rule: Rule = "spread", seed: int = 0) -> list[int]:
    """Numbers of `count` frames of `scene`.

    Args:
        scene: Where from.
        count: How many.
        rule: spread: at equal distances over all frames, from a random start; consecutive: neighbours; covisible: a random frame first,
            then those that the data set lists as seeing most of the same, and theirs.
        seed: Of the random numbers.

    Raises:
        InputError: the scene has fewer frames, or, for covisible, lists too few.
    """
    frames = len(scene)
    if rule not in get_args(Rule):
        raise InputError(f"views are picked by {', '.join(get_args(Rule))}, not {rule!r}")
    if not 1 <= count <= frames:
        raise InputError(f"{scene.origin} has {frames} views, asked for {count}")
    draw = random.Random(f"{seed} {scene.name}")
    if rule == "spread":
        start = draw.randrange(frames)
        return sorted((start + i * frames // count) % frames for i in range(count))
    if rule == "consecutive":
        start = draw.randrange(frames - count + 1)
        return list(range(start, start + count))
    chosen = [draw.randrange(frames)]
    for frame in chosen:  # grows while it is walked: the first frame's partners, then theirs
        chosen.extend(i for i in scene.frames[frame].covisible if i not in chosen)
        if len(chosen) >= count:
            return chosen[:count]
    raise InputError(f"{scene.origin}: frame {scene.frames[chosen[0]].name} has {len(chosen) - 1} listed partners, asked for {count - 1}")


class ViewSets(Dataset[Views]):
    """Draws of views from scenes; item i is the same in every process and order.

    Args:
        scenes: Where from.
        views: How many a draw.
        size: Height and width.
        rule, seed: As in `pick_views`.
        draws: How many a scene.
    """

    def __init__(
        self, scenes: Sequence[Scene], views: int, size: tuple[int, int] | None, rule: Rule = "spread", seed: int = 0, draws: int = 1
    ) -> None:
        self.scenes, self.views, self.size, self.seed, self.draws = scenes, views, size, seed, draws
        self.rule: Rule = rule

    def __len__(self) -> int:
        return len(self.scenes) * self.draws

    def __getitem__(self, index: int) -> Views:
        if not 0 <= index < len(self):
            raise IndexError(index)
        draw, number = divmod(index, len(self.scenes))
        scene = self.scenes[number]
        return scene.sample(pick_views(scene, self.views, self.rule, self.seed * 1_000_003 + draw), self.size)
