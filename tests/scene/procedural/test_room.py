"""The furnished room: the same each time, with depth and cameras that fit its pixels."""

from __future__ import annotations

import torch

from lite3r_plugin.scene.geometry import relative_to_first, unproject
from lite3r_plugin.scene.procedural import furnished_room


def test_room() -> None:
    room = furnished_room(3, 64)
    assert room["rgb"].shape == (1, 3, 3, 64, 64)
    assert room["ok"].all()
    assert room["valid"].all()
    assert room["rgb"].std((3, 4)).amin() > 0.1
    torch.testing.assert_close(furnished_room(3, 64)["depth"], room["depth"], rtol=0, atol=0)
    # All views show one room: its walls bound the points, and views look at it from different places.
    points = unproject(room["depth"][0], room["w2c"][0], room["K"][0])
    low, high = points.flatten(0, 2).amin(0), points.flatten(0, 2).amax(0)
    torch.testing.assert_close(low[2], torch.tensor(0.0), rtol=0, atol=1e-3)
    assert (low > torch.tensor([-3.3, -3.0, -0.1])).all()
    assert (high < torch.tensor([3.3, 3.0, 2.8])).all()
    centres = relative_to_first(room["w2c"][0])[:, :, 3]
    assert torch.pdist(centres).amin() > 0.5
