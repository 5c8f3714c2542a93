"""Models that the command line can build: VGGT, Depth Anything 3, Pi3, and the testbed of the package."""

from __future__ import annotations

from lite3r_plugin import hookimpl
from lite3r_plugin.adapter.models import ModelEntry


@hookimpl
def lite3r_models() -> dict[str, ModelEntry]:
    """Entries of the built-in families. Nothing of their libraries is imported here."""
    from . import _da3_model, _pi3_model, _testbed_model, _vggt_model

    return {**_vggt_model.ENTRIES, **_da3_model.ENTRIES, **_pi3_model.ENTRIES, **_testbed_model.entries()}
