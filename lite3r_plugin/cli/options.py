"""Options that several commands read in the same way."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from ..errors import InputError


def parse_fields(items: Iterable[str], option: str) -> dict[str, Any]:
    """``name=value`` items to a dict; a value that is no JSON is a string.

    Raises:
        InputError: an item has no ``=``.
    """
    fields = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise InputError(f"{option} takes name=value, such as {option} keep_ratio=0.25, got {item!r}")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields
