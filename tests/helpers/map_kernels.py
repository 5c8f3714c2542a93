"""Which kernels for feature maps run: for small maps, too, and in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from sla_cases import GPU

from lite3r_plugin.ops import feature_maps
from lite3r_plugin.runtime import maps

NAMES = ("upsample", "add_bias_", "add_embedding", "upsample_with_embedding")


def count_map_kernels(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Let them run for maps of any size; returns how often each has run since."""
    kernels: Any = pytest.importorskip("lite3r_plugin.ops.feature_maps.kernels")
    count = Counter[str]()

    def counting(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            count[name] += 1
            return own(*args, **kwargs)

        return run

    for name in NAMES:
        monkeypatch.setattr(kernels, name, counting(name, getattr(kernels, name)))
    monkeypatch.setattr(maps, "LEAST", 1)
    if not GPU:
        monkeypatch.setattr(feature_maps, "why_no_kernels", lambda device: None)
    return count
