"""What one scene on several devices costs, and whether it pays: what travels at a global site against the time that is saved.

A model of the algorithm of `lite3r_plugin.parallel`, as arithmetic. Its times follow from what is measured on one device and from the
bandwidth of the links; benchmarks/parallel/views.py measures both, and what several devices really take. As long as nobody has run
that on the hardware in question, what comes out is a plan and no measurement.
"""

from __future__ import annotations

import dataclasses
import math

from ..errors import ConfigError

GROUPS = (4, 2)
"""Into how many groups the heads of a sparse site may be divided; keys and values of one travel while another is attended with."""
GROUP_BYTES = 32 << 20
"""From how many bytes for each group on, which take a fast link longer than it takes to launch the kernels of one group more."""


def head_groups(heads: int, received: int, least: int = GROUP_BYTES) -> int:
    """Into how many groups heads are divided, 1 where that does not pay.

    Args:
        heads: How many there are.
        received: Bytes of the keys and values of all heads that a device is sent at one site.
        least: Bytes of a group.
    """
    return next((groups for groups in GROUPS if groups <= heads and received >= groups * least), 1)


@dataclasses.dataclass(frozen=True)
class Scene:
    """A scene at a model.

    Attributes:
        views: S.
        tokens_per_view: P.
        width: Heads times head dimension, of keys.
        heads: Heads.
        sites: How many sites attend over all views.
        pinned: Queries that attend to all keys; all of them, of all views.
        element_bytes: Of a number that travels: 2 for BF16.
        block_q: Tokens of a query block.
    """

    views: int
    tokens_per_view: int
    width: int = 1024
    sites: int = 24
    pinned: int = 0
    element_bytes: int = 2
    block_q: int = 128
    heads: int = 16

    @property
    def tokens(self) -> int:
        """N."""
        return self.views * self.tokens_per_view


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that a device is sent in one forward.

    Attributes:
        keys: Keys and values of the views that it does not hold.
        queries: Queries that others compute for it, or it for others, and their results.
        outputs: Results of views that it does not hold, if all are gathered.
    """

    keys: int
    queries: int
    outputs: int

    @property
    def bytes(self) -> int:
        """All of them."""
        return self.keys + self.queries + self.outputs


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is expected of several devices.

    Attributes:
        seconds: Of a forward.
        gain: By what factor it is faster than one device.
        traffic: What travels.
        share_of_links: How much of the time the links are at work, in [0, 1].
        groups: Into how many groups the heads of a site are divided; all but the first travel while one is attended with.
        held: Bytes of the keys and values of one site that a device holds beside the activations of its own views.
    """

    seconds: float
    gain: float
    traffic: Traffic
    share_of_links: float
    groups: int
    held: int


def traffic(scene: Scene, devices: int, output_bytes_per_view: int = 0) -> Traffic:
    """What a device is sent in one forward over `devices` of them that hold equally many views.

    Args:
        scene: The scene.
        devices: How many.
        output_bytes_per_view: Of the results of a view, where all devices get all of them.

    Raises:
        ConfigError: there are fewer views than devices, or no device.
    """
    if not 1 <= devices <= scene.views:
        raise ConfigError(f"views are spread over 1 to {scene.views} devices, as many as there are views, got {devices}")
    row = scene.width * scene.element_bytes
    elsewhere = scene.tokens - scene.tokens // devices
    # Pinned queries are shared by their order and not by their views; of the others those that blocks over an edge of a part take along.
    travelling = math.ceil(scene.pinned / devices * (devices - 1) / devices) + (scene.block_q if devices > 1 else 0)
    return Traffic(
        keys=scene.sites * 2 * row * elsewhere,
        queries=scene.sites * 2 * row * travelling,
        outputs=output_bytes_per_view * (scene.views - scene.views // devices),
    )


def plan(
    scene: Scene, devices: int, *, seconds: float, attention_share: float, link: float, stand_in: bool = True,
    output_bytes_per_view: int = 0,
) -> Plan:  # fmt: skip
    """What to expect of `devices` devices.

    Args:
        scene: The scene.
        devices: How many.
        seconds: Of a forward on one device.
        attention_share: What part of them global attention takes, in [0, 1].
        link: Bytes a second that a device can be sent.
        stand_in: Whether all devices but one run a view more, for models with a reference view.
        output_bytes_per_view: As of `traffic`.

    Raises:
        ConfigError: a number is out of its range.
    """
    if not 0 <= attention_share <= 1 or not seconds > 0 or not link > 0:
        raise ConfigError(
            f"seconds and link are above 0, attention_share in [0, 1], got {seconds}, {link} and {attention_share}: measure them by "
            "benchmarks/parallel/views.py"
        )
    travels = traffic(scene, devices, output_bytes_per_view)
    slots = math.ceil((scene.views + (devices - 1) * stand_in) / devices)
    local = seconds * (1 - attention_share) * slots / scene.views
    attention = seconds * attention_share / devices
    links = travels.bytes / link
    groups = head_groups(scene.heads, travels.keys // scene.sites)
    keys = travels.keys / link
    # The first group travels while nothing is attended with, the last is attended with while none travels.
    together = keys / groups + (groups - 1) / groups * max(keys, attention) + attention / groups
    total = local + together + links - keys
    held = 0 if devices == 1 else 2 * scene.width * scene.element_bytes * scene.tokens * min(groups, 2) // groups
    return Plan(total, seconds / total, travels, links / total, groups, held)
