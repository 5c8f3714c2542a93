"""The testbed, the small trained model that comes with the package; the adapter of VGGT, whose structure it has, finds its sites."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lite3r_plugin.adapter import hookimpl

if TYPE_CHECKING:
    from lite3r_plugin.adapter import ModelEntry


@hookimpl
def lite3r_models() -> dict[str, ModelEntry]:
    """``testbed``."""
    from .model import ENTRIES  # needs Pillow, which applying does not

    return ENTRIES
