"""What a trial says of two results that differ."""

from __future__ import annotations

import pytest
import torch

from lite3r_plugin.adapter.trials import require_equal
from lite3r_plugin.errors import AdapterError


def test_what_differs_is_said_in_a_line() -> None:
    """A fork may leave out what others give: whole tensors are no message."""
    layers = [torch.rand(2, 30, 40), torch.rand(2, 30, 40)]
    with pytest.raises(AdapterError, match=r"gives None and not a tensor, float32 \[2, 30, 40\],"):
        require_equal([None, layers[1]], layers, "the host's own forward")
    with pytest.raises(AdapterError, match="gives 1 and not 2"):
        require_equal([1, layers[1]], [2, layers[1]], "the host's own forward")
    require_equal([None, layers[1]], [None, layers[1].clone()], "the host's own forward")
