"""The picture of several reconstructions side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lite3r_plugin.scene.export import Column, save_comparison


@pytest.mark.parametrize("views", [1, 12])
def test_comparison(tmp_path: Path, views: int) -> None:
    depth = torch.rand(views, 12, 16) + 1
    look = torch.full((50, 76, 3), 200, dtype=torch.uint8)
    columns = [Column("truth", ["a", "b"], depth, None, look), Column("dense", ["a", "b"], depth * 1.1, depth / 20, look)]
    save_comparison(tmp_path / "a.png", "title", torch.rand(views, 12, 16, 3), columns, ["a note", "another"])
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    # Errors are drawn for the run alone: the lower left is white where the lower right shows a map.
    height, width = pixels.shape[:2]
    rows = [
        r
        for r in range(height)
        if (pixels[r, width // 2 :] < 250).any(-1).mean() > 0.5 and (pixels[r, : width // 2] > 250).all(-1).mean() > 0.95
    ]
    assert len(rows) > 50
