"""Shared test set-up: determinism, poisoned uninitialised memory, the `gpu` marker, tiny models."""

from __future__ import annotations

import pytest
import torch

# Fills torch.empty with NaN, so an output element that nothing wrote fails its test.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
