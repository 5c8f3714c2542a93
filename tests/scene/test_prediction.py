"""What models predict: shapes are checked, everything is float32 on the CPU."""

from __future__ import annotations

import pytest
import torch

from lite3r_plugin.errors import AdapterError
from lite3r_plugin.scene.prediction import Prediction


def test_prediction_checks_shapes() -> None:
    good = {
        "depth": torch.ones(2, 3, 4, dtype=torch.float64), "confidence": torch.ones(2, 3, 4), "points": torch.ones(2, 3, 4, 3),
        "world_to_camera": torch.ones(2, 3, 4), "intrinsics": torch.ones(2, 3, 3), "images": torch.ones(2, 3, 4, 3),
    }  # fmt: skip
    made = Prediction(**good)
    assert made.depth.dtype == torch.float32
    assert made.num_views == 2
    for name in good:
        with pytest.raises(AdapterError, match="Prediction"):
            Prediction(**good | {name: torch.ones(2, 3)})
    assert torch.equal(made.geometry().depth, made.depth)
    assert made.geometry().world_to_camera is made.world_to_camera
