"""What all results have in common: they become plain values for JSON."""

from __future__ import annotations

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Record:
    """Base of all results."""

    def to_dict(self) -> dict[str, Any]:
        """Fields by name, nested results as dicts; None where a number is undefined (NaN has no place in JSON)."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
