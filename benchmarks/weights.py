"""Generations of the testbed's weights, by the hash that results name (`lite3r_plugin.testbed.weights_hash`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GENERATIONS = {"343f6f24b56c": "second", "9731141769ec": "third"}
PACKAGED = list(GENERATIONS)[-1]


def generation(conditions: Mapping[str, Any]) -> str:
    """Which weights of the testbed a report is of, in words: a generation, or their hash where they are none."""
    found = conditions["weights_sha256"]
    if found not in GENERATIONS:
        return f"weights {found}"
    return f"{GENERATIONS[found]} generation{'' if found == PACKAGED else ' (before that in the package)'}"
