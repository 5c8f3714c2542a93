"""Shared test set-up: determinism, poisoned uninitialised memory, Triton's interpreter on CPUs, the markers `gpu` and `exact`."""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton kernels are defined, so before any of them is imported
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns when it is unset

sys.path.insert(0, str(Path(__file__).parent / "helpers"))  # helper modules: numerics, hosts

# Fills torch.empty with NaN, so an output element that nothing wrote fails its test.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data-root", help="folder with real samples, one folder for each layout of lite3r_plugin.scene.data, for tests/scene/data"
    )
    parser.addoption(
        "--fuzz-seconds", type=float, help="how long each fuzz test goes on, from a seed by chance; else shortly and from one seed"
    )
    parser.addoption("--every-line", action="store_true", help="interrupt before every line in tests/apply/test_interruptions.py")


EXACT = ("torch.equal(", "rtol=0, atol=0", "atol=0, rtol=0", "assert_same_bits(", "assert_equal(", "assert_array_equal(")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and any(words in inspect.getsource(item.function) for words in EXACT):
            item.add_marker("exact")
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
