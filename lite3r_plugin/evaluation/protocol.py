"""Fixed ways of judging quality: which scenes, which views, at which size, which measures, on which dense kernel."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import InputError
from ..scene.data import Scene

ProtocolName = Literal["da3bench", "lite3r"]
MOST_VIEWS = 100


@dataclass(frozen=True)
class Protocol:
    """A way of judging quality. What it fixes cannot be asked for otherwise.

    In all of them every dense attention, of the dense model and of Lite3R where it is dense, prefers the same backend of PyTorch:
    another dense kernel alone moves results as much as some methods do.

    Attributes:
        name: What it is called.
        heading: What it is, for people.
        views: Which of a scene, for people.
        rule: How they are picked.
        most_views: All views of a scene are taken up to so many, or so many at equal distances; None: two are drawn.
        rows: Its measures, of `lite3r_plugin.scene.metrics.comparison.ROWS`.
        open: Options of `compare` that it leaves open.
        most_scenes: It takes the first so many; None: all.
        shape: Height and width in pixels that images are cut to the shape of, before the model's own preprocessing; None: as they are.
        poses_only: Whether depth and points are not looked at.
        backend: The preferred backend, a key of `lite3r_plugin.runtime.sdpa.BACKENDS`.
        caption: What has to be known to read its numbers, for below a table.
        notes: What else has to be known.
    """

    name: ProtocolName
    heading: str
    views: str
    rule: str
    most_views: int | None
    rows: tuple[str, ...]
    open: frozenset[str]
    most_scenes: int | None
    shape: tuple[int, int] | None
    poses_only: bool
    backend: str
    caption: str
    notes: tuple[str, ...]

    def pick(self, scene: Scene, seed: int = 0) -> list[int]:
        """Numbers of frames of `scene`, that of the reference view first; `seed` is heeded where views are drawn."""
        if self.most_views is None:
            return random.Random(f"{seed} {scene.name}").sample(range(len(scene)), 2)
        count = min(len(scene), self.most_views)
        return [i * len(scene) // count for i in range(count)]

    def refuse(self, **options: object) -> None:
        """Raise `InputError` where one of `options` of `compare` is given, that is not None, and this protocol fixes it."""
        if given := [name for name, value in options.items() if value is not None and name not in self.open]:
            raise InputError(
                f"the protocol {self.name} takes no {', no '.join(given)}: it is {self.views}, {self.rule}; leave out the one or the other"
            )


def find_protocol(name: str) -> Protocol:
    """The protocol called `name`. Raises `InputError` where there is none."""
    if name not in PROTOCOLS:
        raise InputError(f"there is no protocol {name!r}; choose one of {', '.join(get_args(ProtocolName))}")
    return PROTOCOLS[name]


PROTOCOLS: dict[str, Protocol] = {
    "da3bench": Protocol(
        name="da3bench",
        heading="Poses as the Depth Anything 3 benchmark judges them",
        views=f"all views of a scene, at most {MOST_VIEWS}",
        rule="at equal distances",
        most_views=MOST_VIEWS,
        rows=("AUC@3, %", "AUC@30, %", "AUC@3 as published, %", "AUC@30 as published, %"),
        open=frozenset(),
        most_scenes=None,
        shape=None,
        poses_only=True,
        backend="flash",
        caption='"As published" is the benchmark\'s own arithmetic, to set beside its figures; the other AUC are exact.',
        notes=(
            f"Of a scene with more than {MOST_VIEWS} views, as many are taken at equal distances; the benchmark draws them at random.",
            "As published: bins of one degree, opposite directions taken for equal, inv(E_i) E_j for the pose between two "
            "world-to-camera matrices E, pairs without a baseline 90 degrees off. Exact: integrals over the pairs that have a baseline. "
            "Only the former can be set beside the benchmark's figures, and only on its scenes and frames.",
        ),
    ),
    "lite3r": Protocol(
        name="lite3r",
        heading="The protocol of the Lite3R paper",
        views="one random pair of views a scene",
        rule="drawn by the seed",
        most_views=None,
        rows=("AbsRel", "RMSE", "δ1", "δ2", "δ3", "rotation, degrees", "translation, degrees", "Chamfer", "F-score"),
        open=frozenset({"seed", "max_points"}),
        most_scenes=32,
        shape=(518, 518),
        poses_only=False,
        backend="flash",
        caption="This is thin: one random pair of views a scene, 32 pairs at most, some of which show nothing in common. Another seed "
        "moves the means. The paper's figures are of another arithmetic.",
        notes=(
            "The paper's scenes are the first 32 of the 113 of BlendedMVS its models were trained on, and 13 of DTU, with cameras alone.",
            "What the paper's code does and is not done here: it counts the first view with itself, which halves the errors of rotation "
            "and translation at two views; it gives translation as a length; it measures Chamfer and F-score without fitting a scale "
            "and, for Depth Anything 3, with inverted cameras; it does not normalise that model's images; it takes the number of depth "
            "planes for the largest depth.",
            "The paper's models run at 518 x 518 pixels; here a model gets the size that it makes of such an image.",
        ),
    ),
}
