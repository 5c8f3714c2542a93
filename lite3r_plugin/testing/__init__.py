"""The conformance kit for model adapters: one call in a test tells whether an adapter describes its model rightly."""

from ..fp8.block import block_forward
from .adapter import TEST_CONFIG, AdapterReport, check_adapter
from .blocks import check_blocks
from .inspection import Inspection, inspect_model
from .layouts import check_layouts
from .outputs import expect_equal, largest_difference, named_tensors

__all__ = [
    "TEST_CONFIG",
    "AdapterReport",
    "Inspection",
    "block_forward",
    "check_adapter",
    "check_blocks",
    "check_layouts",
    "expect_equal",
    "inspect_model",
    "largest_difference",
    "named_tensors",
]


def __dir__() -> list[str]:
    return sorted(__all__)  # what completion offers
